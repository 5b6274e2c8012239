"""The optional native library: is it there, does it fit, and what was it built with.

``VITKERN_NATIVE=1 pip install --no-build-isolation .`` builds it from kernels/native with CMake; a
plain install has none, and needs none. Nothing is loaded at import.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

# Raise it whenever a C signature in kernels/native changes: a library built before then is refused.
ABI = 1

_LIBRARY = Path(__file__).parent / "native" / "vitkern_native.so"
_MEND = (
    "build it again with `VITKERN_NATIVE=1 pip install --no-build-isolation --force-reinstall "
    "--no-deps .`, or delete it to do without"
)


@dataclass(frozen=True)
class NativeInfo:
    """The loaded library and what it says of itself."""

    path: Path
    version: str
    abi: int
    compiler: str
    cuda: str | None  # the CUDA compiler's version; None in a build without CUDA
    library: ctypes.CDLL


@functools.cache
def load() -> NativeInfo | None:
    """Load the library, once; None when it wasn't built.

    Raises RuntimeError when it is there but can't be loaded, or was built for another version of
    vitkern: a broken build is never passed over in silence.
    """
    # A leaf, imported here so that no kernel module depends on the package above it.
    from vitkern._version import __version__

    if not _LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        abi = int(library.vitkern_abi())
        library.vitkern_version.restype = ctypes.c_char_p
        library.vitkern_compiler.restype = ctypes.c_char_p
        library.vitkern_cuda.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{_LIBRARY} can't be loaded ({error}): {_MEND}") from error
    version = library.vitkern_version().decode()
    if (version, abi) != (__version__, ABI):
        raise RuntimeError(
            f"{_LIBRARY} was built for vitkern {version} (ABI {abi}), and this is vitkern "
            f"{__version__} (ABI {ABI}): {_MEND}"
        )
    return NativeInfo(
        path=_LIBRARY,
        version=version,
        abi=abi,
        compiler=library.vitkern_compiler().decode(),
        cuda=library.vitkern_cuda().decode() or None,
        library=library,
    )


def available() -> bool:
    """Whether the native library is there; raises like `load` when it is there but unfit."""
    return load() is not None
