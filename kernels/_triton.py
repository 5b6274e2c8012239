"""The one place that imports triton.

Where triton is absent (macOS, Windows, a bare CPU build) every op file still imports, and its
``triton`` implementation reports why it can't run; the portable one carries on.
"""

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    TRITON_MISSING: str | None = None
except ImportError as error:  # pragma: no cover - exercised in a process of its own by the tests
    triton = None
    TRITON_MISSING = f"triton can't be imported ({error})"

    class tl:  # type: ignore[no-redef]
        """Stands in for ``triton.language`` in annotations, the only part read at import."""

        constexpr = object


# Triton decides between compiling and interpreting when a kernel is decorated, so this is fixed
# for the life of the process.
INTERPRET = TRITON_MISSING is None and os.environ.get("TRITON_INTERPRET", "0") == "1"


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit`` where there is triton, the plain function elsewhere."""
    return kernel if triton is None else triton.jit(kernel)


__all__ = ["INTERPRET", "TRITON_MISSING", "jit", "tl", "triton"]
