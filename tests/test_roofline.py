"""The roofline model: the bytes and figures it must give, what it says is really launched, several
GPUs, the command line, and that its page is current."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vitkern.__main__ import main
from vitkern.kernels import REGISTRY
from vitkern.model.config import ViTConfig
from vitkern.roofline import (
    MACHINES,
    Machine,
    Rates,
    Work,
    card,
    forward_flops,
    parameters,
    predict,
    project,
    report,
    works,
)
from vitkern.roofline.executions import recording
from vitkern.roofline.recorder import record

EXECUTIONS = ("fused", "compiler", "eager")
# images/s on an H100 at 800 TFLOP/s and 3.0 TB/s, batch 256, counted once by hand: forward and
# training, each fused, compiler and eager; and MFU of training, fused, in per cent.
TABLES = {
    "vit_small_patch16_224": ((70_711, 39_251, 30_545), (20_653, 11_176, 8_788), 58),
    "vit_base_patch16_224": ((21_220, 14_051, 11_670), (6_501, 4_137, 3_441), 69),
    "vit_large_patch16_224": ((6_172, 4_413, 3_769), (1_911, 1_318, 1_124), 71),
    "vit_huge_patch14_224": ((2_311, 1_745, 1_521), (725, 529, 460), 74),
}
H100 = Machine.measured("NVIDIA H100 80GB HBM3", 800e12, 3.0e12)
# A network whose blocks all run whole.
SMALL = ViTConfig(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=2, global_pool="avg")


@pytest.mark.parametrize("model", TABLES)
@pytest.mark.parametrize("training", [False, True])
def test_the_tables_counted_by_hand(model: str, training: bool) -> None:
    for execution, images in zip(EXECUTIONS, TABLES[model][training], strict=True):
        found = predict(model, H100, 256, training, execution)
        assert found.images_per_s == pytest.approx(images, rel=0.02), execution
        if training and execution == "fused":
            assert 100 * found.mfu == pytest.approx(TABLES[model][2], rel=0.02)


@pytest.mark.parametrize(
    ("model", "gflop"),
    [("tiny_patch16", 2.51), ("small_patch16", 9.20), ("base_patch32", 8.82),
     ("base_patch16", 35.1), ("large_patch32", 30.8), ("large_patch16", 123),
     ("huge_patch14", 335)],
)  # fmt: skip
def test_flops_of_a_forward_pass(model: str, gflop: float) -> None:
    assert forward_flops(f"vit_{model}_224") / 1e9 == pytest.approx(gflop, rel=0.005)


def test_one_image_is_bound_by_reading_the_weights() -> None:
    found = predict("vit_base_patch16_224", H100, 1, False, "fused")
    assert 1e6 * found.seconds == pytest.approx(84, rel=0.02)
    read = 2 * parameters(found.config)
    assert 0.5 < read / sum(work.calls * work.bytes for work in found.works) < 0.9
    assert not any(work.compute_bound(H100) for work in found.works)


def per_layer(config: ViTConfig, execution: str, training: bool, part: str) -> float:
    """Bytes a token and unit of width that a layer adds, by differences of depth and batch: weights
    and what stands around the blocks cancel."""

    def total(depth: int, batch: int) -> int:
        found = works(replace(config, depth=depth), batch, execution, training)
        return sum(work.calls * work.bytes for work in found if work.part == part)

    tokens = config.grid_size[0] * config.grid_size[1] + config.num_prefix_tokens
    layer = (total(2, 2) - total(1, 2)) - (total(2, 1) - total(1, 1))
    return layer / (tokens * config.embed_dim)


@pytest.mark.parametrize(
    ("execution", "forward", "training"),
    [("fused", 44, 148), ("compiler", 80, 280), ("eager", 104, 360)],
)
def test_bytes_of_a_layer(execution: str, forward: int, training: int) -> None:
    assert per_layer(SMALL, execution, False, "forward") == forward
    parts = [per_layer(SMALL, execution, True, part) for part in ("forward", "backward")]
    assert sum(parts) == training


def test_passes_of_the_waste_in_eager() -> None:
    """The five kinds of waste that were counted once by hand, in units of D."""
    width = SMALL.embed_dim * 17

    def passes(execution: str, *names: str) -> float:
        two, one = (works(replace(SMALL, depth=d), 1, execution, True) for d in (2, 1))
        sums = [sum(w.calls * w.bytes for w in found if w.op in names) for found in (two, one)]
        return (sums[0] - sums[1]) / width

    assert passes("eager", "bias gradients") == 18
    assert passes("eager", "stack of dqkv") == 24
    assert passes("eager", "attention delta and dq") == 22
    casts = passes("eager", "cast of norm", "cast to branch", "cast to norm")
    # Norms, additions and sums of gradients on a float32 stream, over what they'd be in bfloat16.
    wide = passes("eager", "norm", "residual add", "sum of gradients")
    narrow = [works(replace(SMALL, depth=d), 1, "eager", True, precision="bf16") for d in (2, 1)]
    names = ("norm", "residual add", "sum of gradients")
    sums = [sum(w.calls * w.bytes for w in found if w.op in names) for found in narrow]
    assert casts + wide - (sums[0] - sums[1]) / width == 84


def recorded_layer(eager: bool, training: bool = True) -> dict[tuple[str, str], int]:
    """Bytes of one more layer of SMALL, by op and part, as recorded at a batch of 8."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for depth, sign in ((3, 1), (2, -1)):
        config = replace(SMALL, depth=depth)
        weights, autocast = torch.float32, torch.bfloat16
        for call in record(config, 8, training, weights, autocast, eager).calls:
            found[call.op, call.part] += sign * call.bytes
    return {key: size for key, size in found.items() if size}


def test_the_list_of_eager_passes_is_what_pytorch_runs() -> None:
    """EagerViT's calls as autograd and autocast make them, against the passes written down."""
    recorded = recorded_layer(eager=True)
    two, one = (works(replace(SMALL, depth=d), 8, "eager", True, optimizer=False) for d in (3, 2))
    for part in ("forward", "backward"):
        listed = [
            sum(w.calls * w.bytes for w in found if w.part == part) for found in (two, one)
        ]  # fmt: skip
        expected = listed[0] - listed[1]
        if part == "backward":
            # Behind one call PyTorch runs several kernels, which the list counts each: the norm's
            # own gradients, and attention's delta and float32 dq.
            expected -= (16 + 22) * 8 * 17 * SMALL.embed_dim
        total = sum(size for (_, where), size in recorded.items() if where == part)
        assert total == pytest.approx(expected, rel=0.04), part


def test_the_recorded_layer_is_that_of_the_launch_counts() -> None:
    for training, part, launches in (
        (False, "forward", 5),
        (True, "forward", 5),
        (True, "backward", 13),
    ):
        counts = []
        for depth in (3, 2):
            calls = recording(replace(SMALL, depth=depth), 2, training).calls
            counts.append(
                sum(len(c.kernels) for c in calls if c.op in REGISTRY and c.part == part)
            )  # fmt: skip
        assert counts[0] - counts[1] == launches, (training, part)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_flops_are_those_that_the_ops_declare(pool: str) -> None:
    config = replace(SMALL, global_pool=pool, fc_norm=None)
    declared: dict[tuple[str, str], int] = defaultdict(int)
    launched: dict[tuple[str, str], int] = defaultdict(int)
    for call in recording(config, 4, True).calls:
        if call.op in REGISTRY and "layer_norm" not in call.op:
            declared[call.step, call.part] += call.flops
            launched[call.step, call.part] += sum(kernel.flops for kernel in call.kernels)
    assert launched == declared
    listed: dict[tuple[str, str], int] = defaultdict(int)
    for work in works(config, 4, "fused", True):
        listed[work.op, work.part] += work.calls * work.flops
    for key, flops in declared.items():
        if pool == "avg" or key[0] == "patch_embed":
            assert listed[key] == flops, key
        else:  # the last block computes the class token only
            assert flops < listed[key], key


def test_launches_move_at_least_what_the_ops_declare() -> None:
    for training in (False, True):
        for call in recording(SMALL, 4, training).calls:
            if call.op != "patch_embed":  # it casts its weight, which it declares as it came
                launched = sum(kernel.bytes for kernel in call.kernels)
                assert launched >= 0.97 * call.bytes, call


def test_what_is_kept_for_backward() -> None:
    def layer(save: str | None, eager: bool = False) -> float:
        sizes = [
            recording(replace(SMALL, depth=d, save=save), 8, True, eager=eager).saved_bytes
            for d in (3, 2)
        ]
        weights = 2 * 12 * SMALL.embed_dim**2  # rounded copies
        return (sizes[0] - sizes[1] - weights) / (8 * 17 * SMALL.embed_dim)

    balanced, minimal, eager = layer("balanced"), layer("minimal"), layer(None, eager=True)
    assert layer(None) == balanced
    assert 20 <= balanced <= 20.8  # x_hat twice, qkv, out, z; and a few float32 a token
    assert 10 <= minimal <= 10.8
    assert 36 <= eager <= 37.5
    assert balanced <= 0.56 * eager


VARIANTS: dict[str, dict[str, Any]] = {
    "swiglu": {"mlp_layer": "swiglu_packed", "act_layer": "silu", "norm_layer": "rmsnorm"},
    "two first layers": {"mlp_layer": "swiglu", "act_layer": "silu"},
    "options": {"qk_norm": True, "init_values": 1e-5, "drop_path_rate": 0.3, "reg_tokens": 4},
    "subset": {"drop_path_rate": 0.3, "drop_path_mode": "subset"},
    "attention pool": {"global_pool": "map"},
    "all tokens": {"global_pool": "", "num_classes": 0},
    "no biases": {"qkv_bias": False, "proj_bias": False, "pos_embed": "none"},
    "dropout": {"proj_drop_rate": 0.1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_any_model_can_be_predicted(name: str) -> None:
    config = replace(SMALL, fc_norm=None, **VARIANTS[name])
    for execution in ("vitkern", *EXECUTIONS):
        forward, step = (predict(config, H100, 4, t, execution) for t in (False, True))
        assert 0 < forward.seconds < step.seconds, execution


def test_gating_and_layer_scale_are_passes_of_eager() -> None:
    plain = per_layer(SMALL, "eager", True, "forward")
    scaled = per_layer(replace(SMALL, init_values=1e-5), "eager", True, "forward")
    assert scaled - plain == 2 * (2 + 4) + 2 * (4 - 2)  # a pass each, and float32 branches
    dropped = per_layer(replace(SMALL, drop_path_rate=0.5), "eager", True, "forward")
    assert dropped - plain == 2 * 4
    gated = replace(SMALL, mlp_layer="swiglu_packed", act_layer="silu")
    # fc1 8 D and gate and value 4 D each: 20 D in place of 16, and a narrower fc2 (6 D less 2).
    assert per_layer(gated, "eager", False, "forward") - plain == (5 * 4 - 16) - 4


def test_recording_leaves_no_trace_and_takes_no_memory() -> None:
    state = torch.get_rng_state()
    found = record(ViTConfig.from_name("vit_base_patch16_224"), 4096, True, torch.float32, None)
    assert found.saved_bytes > 250e9  # which this machine doesn't have
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_faster_machine_is_never_slower() -> None:
    slow = Machine.measured("slow", 100e12, 1e12)
    for flops, copy in ((200e12, 1e12), (100e12, 2e12)):
        fast = Machine.measured("fast", flops, copy)
        for execution in ("vitkern", *EXECUTIONS):
            times = [predict(SMALL, m, 64, True, execution).seconds for m in (slow, fast)]
            assert times[1] <= times[0]
    twice = Machine.measured("twice", 200e12, 2e12)
    ratio = predict(SMALL, slow, 64).seconds / predict(SMALL, twice, 64).seconds
    assert ratio == pytest.approx(2)


def test_launch_time_and_optimizer() -> None:
    base = predict(SMALL, H100, 4, True)
    kernels = sum(work.calls for work in base.works)
    late = predict(SMALL, H100, 4, True, launch_seconds=1e-3)
    assert late.seconds - base.seconds == pytest.approx(1e-3 * kernels)
    bare = predict(SMALL, H100, 4, True, optimizer=False)
    adamw = 28 * parameters(SMALL) / H100.bytes_per_s
    assert base.seconds - bare.seconds == pytest.approx(adamw)


def test_float32_reads_twice_the_bytes_and_has_its_own_rate() -> None:
    assert per_layer(SMALL, "fused", False, "forward") == 44
    wide = works(SMALL, 2, "fused", precision="float32")
    narrow = works(SMALL, 2, "fused", precision="bf16")
    assert [w.bytes for w in wide] == [2 * w.bytes for w in narrow]
    rates = Machine.measured("m", {"bfloat16": 100e12, "tf32": 50e12, "float32": 10e12}, 1e15)
    narrowing = ("bf16", "tf32", "float32")
    times = [predict(SMALL, rates, 64, precision=p, execution="fused").seconds for p in narrowing]
    assert times == sorted(times)
    assert times[-1] / times[0] == pytest.approx(10, rel=0.01)
    # No casts where there is nothing to cast.
    assert not any("cast" in w.op for w in works(SMALL, 2, "eager", True, precision="float32"))


def test_machines() -> None:
    assert card("nvidia h100 80gb hbm3") is card("H100") is MACHINES["H100"]
    assert card("rtx4090").memory == 24e9
    for m in MACHINES.values():
        assert 0.7 < m.rate("bfloat16") / m.rate("bfloat16", peak=True) < 0.95
        assert 0.8 < m.bytes_per_s / m.peak_bytes_per_s < 0.95
    own = Machine.measured("mine", {"float16": 1e12}, 1e11, like="L4")
    assert (own.rate("bfloat16"), own.bytes_per_s) == (1e12, 1e11)
    assert (own.memory, own.peak) == (MACHINES["L4"].memory, MACHINES["L4"].peak)
    assert Machine.measured("H100", 1e12, 1e11).peak == MACHINES["H100"].peak
    assert Machine.measured("unheard of", 1e12, 1e11).peak == Rates(bfloat16=1e12)
    assert Work("op", "forward", 4, 100).seconds(own) == 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: card("H101"), "unknown GPU 'H101'; expected one of H100, A100"),
        (lambda: predict("vit_base_patch16_224", "NVIDIA H100 PCIe"), "unknown GPU"),
        (lambda: predict("vit_bas_patch16_224", "H100"), "did you mean 'vit_base_patch16_224'"),
        (lambda: predict("vit_small_r26_s32_224", "H100"), "doesn't count embed_layer="),
        (lambda: predict("vit_small_patch16_18x2_224", "H100"), "doesn't count block_fn="),
        (lambda: works(SMALL, 0), "batch must be a positive integer, got 0"),
        (lambda: works(SMALL, True), "batch must be a positive integer"),
        (lambda: works(SMALL, 1, "jax"), "execution must be one of 'eager', 'compiler'"),
        (lambda: works(SMALL, precision="fp8"), "precision must be one of 'bf16 autocast'"),
        (lambda: works(SMALL, precision="float32"), "leaves float32 products to PyTorch"),
        (lambda: predict(SMALL, Machine.measured("m", 1e12, 1e11), precision="tf32",
                         execution="eager").seconds, "machine m has no rate of tf32"),
        (lambda: Machine.measured("m", {"int8": 1e12}, 1e11), "flops_per_s names int8"),
        (lambda: Machine.measured("m", 1e12, 0), "must be positive, got 0"),
        (lambda: project(SMALL, "H100", strategy="tp"), "strategy must be one of 'ddp', 'fsdp'"),
        (lambda: project(SMALL, "H100", gpus=12), "gpus must be a multiple of gpus_per_node=8"),
        (lambda: project(SMALL, "H100", gpus=0), "gpus must be a positive integer, got 0"),
    ],
)  # fmt: skip
def test_errors_name_what_was_expected(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_one_gpu_is_itself() -> None:
    for strategy in ("ddp", "fsdp"):
        plan = project(SMALL, "H100", 8, gpus=1, strategy=strategy)
        assert plan.reduce == plan.gather == 0
        assert plan.seconds == pytest.approx((plan.single.seconds,) * 2)
        assert plan.efficiency == pytest.approx((1, 1))


def test_communication_of_data_parallel() -> None:
    model, slow = "vit_base_patch16_224", MACHINES["A10"]
    plan = project(model, slow, 8, gpus=4)
    gradients = 4 * parameters(ViTConfig.from_name(model))
    assert plan.reduce == pytest.approx(2 * 3 / 4 * gradients / slow.node_link)
    best, worst = plan.seconds
    assert worst == pytest.approx(plan.single.seconds + plan.reduce)
    assert plan.single.seconds <= best < worst
    # Between nodes the adapters of all cards of a node share the work.
    far = project(model, slow, 8, gpus=16)
    assert far.link == 8 * slow.network < slow.node_link
    assert project(model, slow, 8, gpus=16, gpus_per_node=4).link == 4 * slow.network
    assert far.efficiency[1] < plan.efficiency[1]
    near, infinite = MACHINES["H100"], replace(MACHINES["H100"], network=1e15)
    assert project(model, infinite, 8, gpus=16).link == near.node_link


def test_sharding_moves_less_than_twice_and_keeps_less() -> None:
    model = "vit_base_patch16_224"
    ddp, fsdp = (project(model, "H100", 64, gpus=8, strategy=s) for s in ("ddp", "fsdp"))
    assert fsdp.reduce == pytest.approx(ddp.reduce / 2)
    assert fsdp.gather == pytest.approx(fsdp.reduce / 2)  # bfloat16 weights, float32 gradients
    moments = "AdamW's two moments"
    assert fsdp.memory[moments] == pytest.approx(ddp.memory[moments] / 8)
    assert fsdp.memory["activations"] == ddp.memory["activations"]
    assert sum(fsdp.memory.values()) < sum(ddp.memory.values())


def test_whether_it_fits() -> None:
    model = ViTConfig.from_name("vit_base_patch16_224")
    assert project(model, "L4", 256).fits
    assert not project(model, "L4", 1024).fits
    assert "TOO MUCH" in str(project(model, "L4", 1024))
    kept = [
        project(replace(model, save=save), "L4", 64).memory["activations"]
        for save in ("balanced", "minimal")
    ]
    assert kept[1] < 0.6 * kept[0]
    eager = project(model, "L4", 64, execution="eager").memory["activations"]
    assert kept[0] < 0.6 * eager
    whole, half = (project(model, "L4", b).memory["activations"] for b in (64, 32))
    assert whole == pytest.approx(2 * half)


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    model = "vit_tiny_patch16_224"
    assert main(["roofline", model, "--gpu", "a100", "--batch", "8"]) == 0
    text = capsys.readouterr().out
    assert "a forward pass of 8 images on A100. Predicted, not measured." in text
    assert [line.split()[0] for line in text.splitlines()[3:7]] == [
        *("eager", "compiler", "vitkern", "fused"),
    ]
    options = ["--gpus", "16", "--strategy", "fsdp", "--markdown", "--save", "minimal"]
    assert main(["roofline", model, "--batch", "8", *options]) == 0
    text = capsys.readouterr().out
    assert "a training step of 8 images on H100" in text
    assert "| adamw | optimizer |" in text
    assert f"{model} on 16 x H100, fsdp" in text
    assert main(["roofline", model, "--precision", "float32", "--batch", "8"]) == 0
    assert "no prediction for it" in capsys.readouterr().out


def test_the_command_says_why_the_bound_is_passed(capsys: pytest.CaptureFixture[str]) -> None:
    """A bound below which an execution stands needs a word."""
    model = "vit_base_patch16_224"
    assert main(["roofline", model, "--gpu", "A100"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"vitkern .* 0\.9\dx", text)
    assert report.PASSES in text
    assert main(["roofline", "vit_tiny_patch16_224", "--gpu", "A100"]) == 0
    assert report.PASSES not in capsys.readouterr().out


def test_weights_are_gathered_twice() -> None:
    plan = project("vit_base_patch16_224", "H100", 8, gpus=8, strategy="fsdp")
    assert f"weights twice {2e3 * plan.gather:.3g} ms" in str(plan)
    _, worst = plan.seconds
    saved = plan.single.part_seconds("optimizer") * 7 / 8
    assert worst == pytest.approx(plan.single.seconds - saved + 2 * plan.gather + plan.reduce)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vit_tny", "unknown model 'vit_tny'; expected one of 2"),
        ("vit_tiny_patch16_225", "did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224 --gpu TPU", "unknown GPU 'TPU'; expected one of H100, A100"),
        ("--gpu TPU", "unknown GPU 'TPU'"),
        ("--batch -3", "--batch must be a positive integer, got -3"),
        ("vit_tiny_patch16_224 --gpus -2", "--gpus must be a positive integer, got -2"),
        ("vit_tiny_patch16_224 --gpus-per-node 0", "--gpus-per-node must be a positive integer"),
        ("vit_tiny_patch16_224 --forward --gpus 8", "--forward and --gpus 8 exclude each other"),
        ("--gpu A100 --gpus-per-node 4 --markdown", "--gpu, --gpus-per-node only with a MODEL"),
    ],
)
def test_the_command_refuses_what_it_would_not_heed(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["roofline", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out


def test_the_page_is_current() -> None:
    """Its words, and its figures up to 1 %; what PyTorch calls by itself depends on its version."""
    number = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
    path = Path(__file__).parent.parent / "docs" / "roofline.md"
    written, made = (
        "\n".join(line for line in text.splitlines() if not line.startswith(("| other", "| casts")))
        for text in (path.read_text(), report.page())
    )
    assert number.sub("0", written) == number.sub("0", made), f"run: {report.COMMAND}"
    for old, new in zip(number.findall(written), number.findall(made), strict=True):
        a, b = (float(n.replace(",", "")) for n in (old, new))
        assert a == pytest.approx(b, rel=0.01, abs=1), f"run: {report.COMMAND}"
