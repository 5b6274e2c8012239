"""Which packages are here, asked without importing them, and how they are imported when needed.

A name proves nothing: flash-attn-4 brings a `flash_attn` without FlashAttention 2, and `apex` on
PyPI is not NVIDIA's. So a package is here if its distribution is installed and has the modules
that are called.
"""

import importlib
import importlib.util
from importlib.machinery import PathFinder
from typing import Any

from .._contest import Absent
from .._measure import versions


def version(distribution: str) -> str | None:
    """Installed version of a distribution; None if there is none."""
    return versions([distribution])[distribution]


def problem(distribution: str, *modules: str) -> str | None:
    """Why `distribution` can't be used for want of itself or of one of `modules`; None if it can.

    Nothing is imported, so that a module which is found may yet fail to load.
    """
    found = version(distribution)
    if found is None:
        return f"{distribution} is not installed"
    for module in modules:
        if not _exists(module):
            return f"{distribution} {found} has no {module}"
    return None


def _exists(module: str) -> bool:
    """Whether `module` can be found, without importing the packages that it lies in."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    name = top
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        name = f"{name}.{part}"
        # As text: transformers lists its folders as Path, which the finder passes over.
        spec = PathFinder.find_spec(name, [str(p) for p in spec.submodule_search_locations])
    return spec is not None


def load(distribution: str, module: str) -> Any:
    """Import `module` of `distribution`.

    Raises:
        Absent: it isn't there, or it doesn't load, as a build for another torch doesn't.
    """
    missing = problem(distribution, module)
    if missing:
        raise Absent(missing)
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Absent(
            f"{distribution} {version(distribution)} doesn't load: {module}: {reason}"
        ) from error
