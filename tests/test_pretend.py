"""A model on a card that is pretended (tests/pretend): all but the numbers of a GPU's run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pretend import __main__ as pretend

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real card is here"),
    pytest.mark.skipif(
        not (torch.version.cuda or "").startswith("13.")
        or not sys.platform.startswith("linux")
        or not all(map(shutil.which, ("gcc", "nm"))),
        reason="needs Linux, gcc, nm and PyTorch's build for CUDA 13",
    ),
]

SCRIPT = """
import ctypes, json, torch, vitkern
pretended = ctypes.CDLL(None)
model = vitkern.ViT(
    img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, init_values=0.1,
    drop_path_rate=0.2, global_pool="avg", device="cuda",
)
images, counts = torch.randn(4, 3, 32, 32).cuda(), []
with torch.autocast("cuda", torch.bfloat16):
    rows = vitkern.explain(model, images).rows
    for _ in range(2):
        before = pretended.pretended_launches()
        model(images).float().sum().backward()
        counts.append(pretended.pretended_launches() - before)
    with torch.no_grad():
        logits = vitkern.capture(model.eval(), images)(images[:3])
assert images.cpu().std() > 0.5  # copies copy
assert all(p.grad.shape == p.shape for p in model.parameters())
print(json.dumps({"taken": {row.op: row.implementation for row in rows}, "counts": counts,
                  "logits": list(logits.shape), "memory": torch.cuda.max_memory_allocated()}))
"""


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.pretend", "python", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_a_training_step_and_a_graph_of_inference() -> None:
    done = run("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours = ("patch_embed", "norm_linear", "attention", "linear_residual", "layer_norm")
    assert {op: found["taken"][op] for op in ours} == dict.fromkeys(ours, "triton")
    assert found["counts"][0] == found["counts"][1] > 2 * 18  # launches of two blocks, and around
    assert found["logits"] == [3, 1000]
    assert found["memory"] > 0


def test_what_a_card_refuses_is_refused() -> None:
    code = "import torch; torch.empty(90 << 30, dtype=torch.uint8, device='cuda')"
    assert "out of memory" in run("-c", code).stderr


def test_without_a_command_it_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretend"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "COMMAND" in done.stderr
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="needs gcc"):
        pretend.environment()
