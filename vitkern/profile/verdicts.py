"""What holds a run back, and what to do: rules over the figures, each with what was measured.

A verdict's `gain` is the share of a step that it is about, which is the most that following its
advice could save.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vitkern.kernels import REGISTRY
from vitkern.kernels._op import kernel_problem
from vitkern.profile.figures import MOST_UNSEEN, OVERHEAD, Analysis


@dataclass(frozen=True)
class Verdict:
    """One finding; `good` where it is no complaint."""

    title: str
    evidence: str
    advice: str
    gain: float
    good: bool = False


def ms(seconds: float) -> str:
    """Milliseconds as a person reads them."""
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 2}f} ms"


def loader_bound(a: Analysis) -> Iterator[Verdict]:
    """The loop waits for its data."""
    if a.idle is not None:
        waited = a.idle.causes.get("data", 0.0)
        who = "the GPU ran nothing while the loop waited for its loader"
    else:
        waited, who = a.phase("data").seconds, "the loop waited for its data"
    if a.seconds and waited / a.seconds >= 0.05:
        yield Verdict(
            "Data arrives too late",
            f"{ms(waited)} of a step of {ms(a.seconds)}: {who}.",
            "More loader workers (num_workers, persistent_workers=True), a larger prefetch_factor, "
            "pinned memory, less work on each image. vitkern's models take uint8 images and "
            "normalise them in the patch embedding: a quarter of the bytes to move.",
            waited / a.seconds,
        )


def launch_bound(a: Analysis) -> Iterator[Verdict]:
    """The GPU waits for Python."""
    if a.idle is None or not a.seconds:
        return
    waited = a.idle.causes.get("host", 0.0)
    if waited / a.seconds < 0.08:
        return
    waits = a.synchronisations or 0
    graphs = a.graph_launches or 0
    evidence = (
        f"The GPU was idle for {ms(waited)} of {ms(a.seconds)} because the next kernel had not "
        f"been launched yet, longest for {ms(a.idle.longest_late)} before "
        f"{a.idle.longest_late_before}; {a.launches:,.0f} kernels and copies a step."
    )
    room = ""
    m = a.memory
    if m is not None and m.total and m.peak < 0.5 * m.total and not graphs:
        room = (
            f" A larger batch would fit: the peak is {m.peak / 2**30:.1f} of "
            f"{m.total / 2**30:.0f} GiB."
        )
    if waits >= 1:
        evidence += f" Python waited for the GPU {waits:.0f} times a step."
        room += " Fewer .item(), .cpu() and print of tensors: each lets the queue run dry."
    if graphs:
        evidence += f" CUDA graphs were replayed {graphs:,.1f} times a step."
        advice = "Capture more of the step: the GPU waits for what is launched beside the graphs"
    elif a.trains:
        advice = "torch.compile(model, mode='reduce-overhead')"
    else:
        advice = "CUDA graphs (vitkern.capture)"
    yield Verdict("The GPU waits for Python", evidence, f"{advice}.{room}", waited / a.seconds)


def host_overhead(a: Analysis) -> Iterator[Verdict]:
    """On a CPU, time in which no op ran."""
    if a.on_gpu:
        return
    row = next((r for r in a.rows if r.op == OVERHEAD), None)
    if row is not None and row.share >= 0.15:
        yield Verdict(
            "Python and PyTorch around the ops take their time",
            f"{ms(row.seconds)} of {ms(a.seconds)} passed outside of any op, part of it the "
            "profiler's own"
            + (
                ", part of it in kernels that torch.compile made: on a CPU these record nothing."
                if a.compiled
                else "."
            ),
            "A larger batch, so that each call does more"
            + ("." if a.compiled else "; torch.compile."),
            row.share,
        )


def precision(a: Analysis) -> Iterator[Verdict]:
    """Products run in float32 where bfloat16 is faster."""
    slow = a.ceilings.flops_per_s.get("float32")
    fast = a.ceilings.flops_per_s.get("bfloat16")
    if a.main_dtype != "float32" or not slow or not fast or fast < 1.3 * slow:
        return
    rows = [r for r in a.rows if r.dtype == "float32" and r.bound == "compute"]
    share = sum(r.share for r in rows)
    if share * (1 - slow / fast) < 0.05:
        return
    tf32 = ""
    if a.on_gpu and a.settings.get("float32_matmul_precision", "highest") == "highest":
        tf32 = (
            " Or torch.set_float32_matmul_precision('high') for TF32, which keeps float32 tensors."
        )
    yield Verdict(
        "Products run in float32",
        f"{share:.0%} of a step is in ops that compute in float32. A large product here runs at "
        f"{slow / 1e12:.3g} TFLOP/s in float32 and at {fast / 1e12:.3g} in bfloat16.",
        f"torch.autocast(device_type, dtype=torch.bfloat16) around the forward pass.{tf32}",
        share * (1 - slow / fast),
    )


def optimizer(a: Analysis) -> Iterator[Verdict]:
    """The optimizer is a loop over parameters, or a pass for each of its operations."""
    phase = a.phase("optimizer")
    fused = any(r.op.startswith("optimizer") and r.implementation == "fused" for r in a.rows)
    if phase.share < 0.04 or fused:
        return
    kernels = f", {phase.launches:,.0f} kernels" if phase.launches else ""
    yield Verdict(
        "The optimizer is not fused",
        f"{ms(phase.seconds)} a step ({phase.share:.0%}){kernels}, without a fused kernel.",
        "fused=True for torch.optim.AdamW, Adam or SGD: one pass over parameters and state.",
        phase.share,
    )


def fallbacks(a: Analysis) -> Iterator[Verdict]:
    """Ops of ours that run on ATen on a GPU."""
    if not a.on_gpu:
        return
    rows = [r for r in a.rows if r.implementation == "ATen" and not r.op.endswith("(backward)")]
    reasons = []
    for row in rows:
        op = row.op.partition(" ")[0]
        whys = [
            c["why"]
            for c in a.choices
            if c["op"] == op and c["implementation"] not in ("triton", "cublas", "gluon")
        ]
        reasons.append(f"{op} ({ms(row.seconds)}): {whys[0] if whys else 'reason not recorded'}")
    back = [r for r in a.rows if r.implementation == "ATen"]
    share = sum(r.share for r in back)
    if reasons and share >= 0.03:
        yield Verdict(
            "Ops without vitkern's kernels",
            "; ".join(reasons) + ".",
            "vitkern.explain(model, images) lists every choice. If a reason is that nothing was "
            "measured on this card: python -m benchmarks tune.",
            share,
        )


def pointwise(a: Analysis) -> Iterator[Verdict]:
    """Much time in ATen's own passes over memory."""
    rows = [
        r
        for r in a.rows
        if r.op.startswith("aten::") and not r.flops and r.phase in ("forward", "backward")
    ]
    share = sum(r.share for r in rows)
    if share >= 0.12:
        most = ", ".join(f"{r.op} {r.share:.0%}" for r in rows[:4])
        yield Verdict(
            "Passes over memory that a fused kernel would not make",
            f"{share:.0%} of a step is in ATen's ops without products: {most}.",
            "For a ViT: vitkern.create_model with the same state dict, whose ops do these steps on "
            "the way. For other modules: torch.compile.",
            share,
        )


def slow_ops(a: Analysis) -> Iterator[Verdict]:
    """Ops of weight, far from what the device could do."""
    far = [r for r in a.rows if r.share >= 0.08 and r.roofline is not None and r.roofline < 0.4]
    if not far:
        return
    texts = []
    for row in far[:4]:
        if row.bound == "compute":
            flops = row.flops_per_s or 0.0
            reached = (
                f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"
            )
        else:
            reached = f"{(row.bytes_per_s or 0) / 1e9:,.3g} GB/s"
        texts.append(
            f"{row.op}, {ms(row.seconds)} ({row.share:.0%}), runs at {row.roofline:.0%} of what "
            f"{row.bound} allows ({reached})"
        )
    tune = any(row.op.partition(" ")[0] in REGISTRY for row in far) and a.on_gpu
    yield Verdict(
        "Ops far from their roofline",
        "; ".join(texts) + ".",
        "Small calls never reach it: a larger batch. If calls are large: "
        + (
            "python -m benchmarks tune, which measures every implementation of vitkern's ops here."
            if tune
            else "torch.compile, or on a CPU more threads and fewer programs beside this one."
        ),
        sum(row.share * (1 - (row.roofline or 0.0)) for row in far),
    )


def memory(a: Analysis) -> Iterator[Verdict]:
    """Hardly any memory is left."""
    m = a.memory
    if m is None or not m.total or m.peak < 0.85 * m.total:
        return
    saved = "" if m.saved is None else f" {m.saved / 2**30:.1f} GiB of it are saved for backward."
    yield Verdict(
        "Memory is nearly full",
        f"The peak is {m.peak / 2**30:.1f} of {m.total / 2**30:.1f} GiB, in {m.peak_phase}.{saved}",
        "vitkern's save='minimal', which recomputes attention and the MLP's first layer.",
        0.0,
    )


def overlap(a: Analysis) -> Iterator[Verdict]:
    """Kernels behind others: in no share, but no secret."""
    rows = sorted((r for r in a.rows if r.hidden), key=lambda r: -r.hidden)
    hidden = sum(r.hidden for r in rows)
    if hidden >= 0.01 * a.seconds and rows:
        most = ", ".join(f"{r.op} {ms(r.hidden)}" for r in rows[:3])
        yield Verdict(
            "Kernels ran beside others",
            f"{ms(hidden)} a step ran while another stream was busy: {most}. No step is "
            "longer for it: times and shares leave it out, rates count it.",
            "None needed. What runs at once slows down each other: these rates are lower than "
            "alone.",
            0.0,
            good=True,
        )


def unseen(a: Analysis) -> Iterator[Verdict]:
    """Why there is no MFU."""
    if a.unseen > MOST_UNSEEN:
        yield Verdict(
            "The model's FLOPs are unknown",
            f"{a.unseen:.0%} of the {'forward pass' if a.on_gpu else 'time'} is in kernels that a "
            "trace ties to no op: those of CUDA graphs, of torch.compile's own products, or of "
            "other extensions. An MFU would leave them out, so there is none.",
            "Profile the same model without graphs and compiler: its FLOPs are the same.",
            0.0,
            good=True,
        )


def compute_bound(a: Analysis) -> Iterator[Verdict]:
    """Good: the time is in ops near the device's ceilings."""
    near = [r for r in a.rows if r.roofline is not None and r.roofline >= 0.6]
    share = sum(r.share for r in near)
    if share >= 0.5:
        most = ", ".join(f"{r.op} {r.roofline:.0%}" for r in near[:3])
        yield Verdict(
            "Most of the time goes where it should",
            f"{share:.0%} of a step is in ops at 60 % or more of their roofline: {most}.",
            "Faster from here: fewer FLOPs (smaller images, larger patches, less recomputation), "
            "or more GPUs.",
            0.0,
            good=True,
        )


RULES: tuple[Callable[[Analysis], Iterator[Verdict]], ...] = (
    loader_bound,
    launch_bound,
    host_overhead,
    precision,
    optimizer,
    fallbacks,
    pointwise,
    slow_ops,
    memory,
    overlap,
    unseen,
    compute_bound,
)


def judge(a: Analysis) -> list[Verdict]:
    """What the rules find, the weightiest first; never nothing."""
    found = [verdict for rule in RULES for verdict in rule(a)]
    if not found and not a.rows:
        found = [Verdict("Nothing ran in these steps", "No op, no kernel.", "More steps.", 0.0)]
    elif not found:
        first = a.rows[0]
        found = [
            Verdict(
                "No rule found anything that holds this run back",
                f"The largest op is {first.op} with {first.share:.0%} of a step.",
                "The table below says what the rest is.",
                0.0,
                good=True,
            )
        ]
    if not a.on_gpu:
        why = kernel_problem([torch.empty(0)])
        found.append(
            Verdict(
                "This was a CPU",
                f"vitkern's own kernels did not run: {why}." if why else "No GPU ran anything.",
                "The same command on a machine with an NVIDIA GPU.",
                0.0,
                good=True,
            )
        )
    return sorted(found, key=lambda v: (v.good, -v.gain))
