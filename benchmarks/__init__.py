"""Measuring vitkern, and the gates that need no GPU. ``python -m benchmarks --help`` lists them."""
