"""The house: who may import whom, and what an import may do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
OPS = {p.stem for p in KERNELS.iterdir() if not p.name.startswith("_") and p.suffix == ".py"} | {
    p.name for p in KERNELS.iterdir() if not p.name.startswith("_") and (p / "__init__.py").exists()
}


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file of kernels/ or vitkern/ imports at its top."""
    package = ["vitkern", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    if path.is_relative_to(ROOT / "vitkern"):
        package = package[1:]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def sources(folder: str) -> list[Path]:
    """Files of a folder; vitkern/kernels is a link that `make` may have laid to the other one."""
    files = (p for p in (ROOT / folder).rglob("*.py") if "native" not in p.parts)
    return sorted(p for p in files if not p.is_relative_to(ROOT / "vitkern" / "kernels"))


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_neither_the_model_nor_another_op(path: Path) -> None:
    place = path.relative_to(KERNELS).parts
    own = place[0].removesuffix(".py")
    for name in imports(path):
        assert not name.startswith(("benchmarks", "tests")), name
        if name.startswith("vitkern") and not name.startswith("vitkern._version"):
            assert name.startswith("vitkern.kernels"), f"{name}: an arrow up to the model"
            op = name.removeprefix("vitkern.kernels").strip(".").split(".")[0]
            assert own == "__init__" or op not in OPS - {own}, f"{name}: another op"
        if name.split(".")[0] == "triton":
            assert place == ("_triton.py",), f"{name}: only _triton.py imports triton"


# Who may import timm: what registers our models there, and a backbone that is one of its models.
TIMMS = ("vitkern/timm.py", "vitkern/model/hybrid.py")


@pytest.mark.parametrize("path", sources("vitkern"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_model_imports_no_triton_and_nothing_above_it(path: Path) -> None:
    forbidden = {"triton", "benchmarks", "tests", "transformers", "torchvision", "vit_pytorch"}
    if path.relative_to(ROOT).as_posix() not in TIMMS:
        forbidden.add("timm")
    for name in imports(path):
        assert name.split(".")[0] not in forbidden, name


def in_a_fresh_process(code: str, *flags: str) -> str:
    """Run `code` in a new interpreter as a user would, and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_TRITON = "import sys; sys.modules['triton'] = None\n"
TRAIN = """
import torch, vitkern
model = vitkern.ViT(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
model(torch.randn(2, 3, 8, 8)).sum().backward()
"""


def test_importing_touches_no_gpu_and_warns_of_nothing() -> None:
    out = in_a_fresh_process(
        "import torch, warnings\n"
        "warnings.simplefilter('error')\n"
        "torch.cuda.init = torch._C._cuda_init = None\n"
        "import vitkern, vitkern.kernels\n"
        "print(torch.cuda.is_initialized())"
    )
    assert out.strip() == "False"


def test_works_without_triton() -> None:
    code = """
from vitkern.kernels import layer_norm
try:
    layer_norm(torch.randn(2, 8), torch.ones(8), impl="triton")
except ValueError as error:
    print(error)
"""
    out = in_a_fresh_process(NO_TRITON + TRAIN + code)
    assert "impl='triton' can't run here: triton can't be imported" in out


def test_works_after_a_fork() -> None:
    code = """
import os
pid = os.fork()
if pid == 0:
    model(torch.randn(1, 3, 8, 8))
    print("child is well", flush=True)
    os._exit(0)
print(os.waitpid(pid, 0)[1])
"""
    assert in_a_fresh_process("import os\n" + TRAIN + code).split("\n")[:2] == [
        "child is well",
        "0",
    ]


def test_no_gpu_is_no_error_but_asking_for_its_kernels_is() -> None:
    code = """
from vitkern.kernels import layer_norm
try:
    layer_norm(torch.randn(2, 8), torch.ones(8), impl="triton")
except ValueError as error:
    print(error)
"""
    assert "Triton kernels need CUDA tensors, these are on cpu" in in_a_fresh_process(TRAIN + code)
