"""What is built and installed: the plain wheel, the one with the native library, and their files.

Builds run as a user's do, through pip, but without network.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import vitkern
from vitkern import _version
from vitkern.kernels import _native

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, native: bool = False) -> str:
    """What the command prints; fails with all of it if the command fails."""
    env = {**os.environ, "VITKERN_NATIVE": "1" if native else "0"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, out: Path, native: bool = False) -> zipfile.ZipFile:
    """The wheel of a source folder or an sdist."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", out, source, cwd=out, native=native)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def metadata(wheel: zipfile.ZipFile, name: str) -> Message:
    """METADATA or WHEEL of a wheel."""
    return Parser().parsestr(wheel.read(f"vitkern-{vitkern.__version__}.dist-info/{name}").decode())


def files(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def import_from(wheel: zipfile.ZipFile, to: Path, code: str) -> str:
    """What `code` prints in an interpreter that sees this wheel first, and not the checkout."""
    wheel.extractall(to)
    return run(
        sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(to)!r}); {code}", cwd=to
    ).strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without tests and benchmarks, with the link that `make` lays."""
    source = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    leave = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=leave)
    shutil.copytree(
        ROOT / "vitkern", source / "vitkern", symlinks=True, ignore=leave, dirs_exist_ok=True
    )
    if not (source / "vitkern/kernels").is_symlink():
        (source / "vitkern/kernels").symlink_to("../kernels")
    (source / "kernels/tuned").mkdir(exist_ok=True)
    (source / "kernels/tuned/some_gpu.json").write_text("{}")
    return source


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build_wheel(source, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def native(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    if shutil.which("cmake") is None:
        pytest.skip("the native build needs cmake")
    if not any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])):
        pytest.skip("the native build needs a C++ compiler")
    return build_wheel(source, tmp_path_factory.mktemp("native"), native=True)


def test_plain_wheel_is_pure(plain: zipfile.ZipFile) -> None:
    assert Path(plain.filename or "").name == f"vitkern-{vitkern.__version__}-py3-none-any.whl"
    assert metadata(plain, "WHEEL")["Root-Is-Purelib"] == "true"


def test_plain_wheel_holds_every_module_and_nothing_else(
    plain: zipfile.ZipFile, source: Path
) -> None:
    modules = {
        str(Path(package, path.relative_to(source / folder)))
        for folder, package in {"vitkern": "vitkern", "kernels": "vitkern/kernels"}.items()
        for path in (source / folder).rglob("*.py")
        if "vitkern/kernels" not in str(path)
    }
    data = {"vitkern/py.typed"} | {
        f"vitkern/kernels/tuned/{path.name}" for path in (source / "kernels/tuned").iterdir()
    }
    assert files(plain) == modules | data


def test_wheel_by_way_of_sdist_is_the_same(
    plain: zipfile.ZipFile, source: Path, tmp_path: Path
) -> None:
    run(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})",
        cwd=source,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert files(build_wheel(sdist, tmp_path)) == files(plain)


def test_version_is_declared_once(plain: zipfile.ZipFile) -> None:
    assert vitkern.__version__ == _version.__version__ == metadata(plain, "METADATA")["Version"]


def test_core_needs_only_torch_and_triton(plain: zipfile.ZipFile) -> None:
    needs = metadata(plain, "METADATA").get_all("Requires-Dist", [])
    core = {need.split(">")[0] for need in needs if "extra ==" not in need}
    assert core == {"torch", "triton"}


def test_plain_wheel_imports_without_native(plain: zipfile.ZipFile, tmp_path: Path) -> None:
    code = "from vitkern.kernels import _native; print(_native.__file__, _native.load())"
    assert import_from(plain, tmp_path, code) == f"{tmp_path}/vitkern/kernels/_native.py None"


def test_native_wheel(native: zipfile.ZipFile, plain: zipfile.ZipFile, tmp_path: Path) -> None:
    tag = metadata(native, "WHEEL")["Tag"]
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    assert files(native) - files(plain) == {"vitkern/kernels/native/vitkern_native.so"}
    code = (
        "from vitkern.kernels import _native as n; i = n.load(); "
        "print(n.available(), i.version, i.abi == n.ABI, i.cuda, bool(i.compiler.strip()))"
    )
    assert import_from(native, tmp_path, code) == f"True {vitkern.__version__} True None True"


@pytest.mark.parametrize("differs", ["version", "ABI"])
def test_native_library_of_another_build_is_refused(
    differs: str, native: zipfile.ZipFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Path(native.extract("vitkern/kernels/native/vitkern_native.so", tmp_path))
    monkeypatch.setattr(_native, "_LIBRARY", library)
    if differs == "version":
        monkeypatch.setattr(_version, "__version__", "0.0.0")
    else:
        monkeypatch.setattr(_native, "ABI", _native.ABI + 1)
    with pytest.raises(RuntimeError, match=r"vitkern_native\.so was built for .*pip install"):
        _native.load.__wrapped__()


def test_native_library_that_does_not_load_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "vitkern_native.so"
    library.write_text("no library")
    monkeypatch.setattr(_native, "_LIBRARY", library)
    with pytest.raises(RuntimeError, match=r"vitkern_native\.so can't be loaded .*pip install"):
        _native.load.__wrapped__()


def test_kernels_is_no_top_level_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "import vitkern.kernels" in done.stderr
