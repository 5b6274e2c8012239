"""The one place that imports triton.

Where triton is absent (macOS, Windows, a bare CPU build) every op file still imports, and its
``triton`` implementation reports why it can't run; the portable one carries on.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

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


class Gluon(NamedTuple):
    """The parts of ``triton.experimental.gluon``; `missing` says why there are only stand-ins."""

    missing: str | None
    jit: Callable[..., Any]
    language: Any
    hopper: Any = None
    TensorDescriptor: Any = None


@cache
def gluon() -> Gluon:
    """Gluon, imported when first asked for: only a GPU of one generation has a use for it."""
    absent = Gluon(TRITON_MISSING, lambda kernel=None, **_: kernel or (lambda it: it), tl)
    if triton is None:
        return absent
    # Before that release it lacked warp groups' products, or took warp_specialize's arguments in
    # another order; it is experimental, so that a later one may have moved it.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return absent._replace(missing=f"needs triton 3.6 or newer, this is {triton.__version__}")
    try:
        from triton.experimental import gluon as compiler
        from triton.experimental.gluon import language
        from triton.experimental.gluon.language.nvidia import hopper
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    except ImportError as error:
        return absent._replace(missing=f"triton's gluon can't be imported ({error})")
    return Gluon(None, compiler.jit, language, hopper, TensorDescriptor)


__all__ = ["INTERPRET", "TRITON_MISSING", "gluon", "jit", "tl", "triton"]
