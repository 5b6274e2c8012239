"""``python -m tests.pretend COMMAND ...``: run a command where a card is pretended."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "pretend"
DRIVER = "libcuda.so.1"


def package(name: str) -> Path:
    """The folder of an installed package, which isn't imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: {name} is not installed")
    return Path(spec.origin).parent


def wanted(libraries: Path, prefix: str) -> set[str]:
    """Functions that the libraries in a folder expect others to have."""
    found = set()
    for library in libraries.glob("*.so"):
        command = ["nm", "-D", "--undefined-only", str(library)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found |= set(re.findall(rf"\b({prefix}\w+)", listed))
    return found


def build(name: str, sources: list[str], functions: set[str], include: Path) -> Path:
    """A library of these sources; the functions that they lack return success."""
    made = {n for s in sources for n in re.findall(r"\b(\w+)\(", (HERE / s).read_text())}
    rest = BUILD / f"{name}.rest.c"
    rest.write_text("".join(f"int {f}() {{ return 0; }}\n" for f in sorted(functions - made)))
    library, draft = BUILD / name, BUILD / f"{name}.{os.getpid()}"
    command = ["gcc", "-w", "-O1", "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{name}"]
    command += ["-o", str(draft), *(str(HERE / s) for s in sources), str(rest), "-ldl"]
    subprocess.run(command, check=True)
    os.replace(draft, library)  # another process may be running on it
    return library


def environment() -> dict[str, str]:
    """In which a card is pretended; builds the libraries."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise SystemExit(f"error: the pretended card needs {tool}")
    include = package("triton") / "backends" / "nvidia" / "include"
    libraries = package("torch") / "lib"
    if not (libraries / "libtorch_cuda.so").exists():
        raise SystemExit("error: the pretended card needs PyTorch's build for CUDA")
    BUILD.mkdir(parents=True, exist_ok=True)
    declared = set(re.findall(r"CUDAAPI (cu[A-Z]\w+)", (include / "cuda.h").read_text()))
    driver = build(DRIVER, ["driver.c"], declared, include)
    functions = wanted(libraries, "(?:__)?cuda") | wanted(libraries, "cublas")
    runtime = build("libpretend.so", ["cudart.c", "cublas.c"], functions, include)
    path = [str(HERE / "site"), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "LD_PRELOAD": f"{driver}:{runtime}",
        "TRITON_LIBCUDA_PATH": str(BUILD),
        "TRITON_INTERPRET": "0",
        "VITKERN_SELFCHECK": "0",  # which would find every kernel wrong
        "VITKERN_CACHE": str(BUILD),
        "PYTHONPATH": os.pathsep.join(path),
    }


if __name__ == "__main__":
    command = sys.argv[1:]
    if not command:
        raise SystemExit(__doc__)
    if command[0] == "python":
        command[0] = sys.executable
    os.execvpe(command[0], command, environment())
