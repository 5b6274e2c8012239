"""Plain-text tables."""

from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]]) -> str:
    """The lines with their columns aligned; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
