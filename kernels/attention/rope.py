"""Angles of the rotary position embedding over the two axes of an image."""
