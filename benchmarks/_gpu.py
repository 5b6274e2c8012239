"""Everything that needs a GPU, in one command: tests, parity of every op and model, then times.

Correctness comes first, for everything; a case that fails it prints no time. Every result is one
line of results.jsonl at once, so a run that is cut off loses nothing. Four more files:
environment.json, tests.log, tests.xml, summary.md.

Times: CUDA events, medians and quartiles, L2 flushed, an A/A pair by the side of each kernel, and
the shares of a matrix product and a copy measured in the same run. A backward pass is timed alone,
on a graph built before. Losses are listed, not left out.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.error_budget import as_tuple, in_float64
from vitkern.kernels import REGISTRY

from . import _models
from ._cases import Case, cases, columns, implementations, results, timed, unfit
from ._measure import Ceilings, Stats, Timer, environment, parity

# Share of the time by which each stage must end; what one leaves over goes to the next. Compilers
# take the longest, so they come last; what they make is checked just before it is timed.
STAGES = {
    "tests": 0.25,
    "op parity": 0.4,
    "model parity": 0.5,
    "op times": 0.65,
    "model times": 0.8,
    "compiled model times": 0.95,
    "compiled op times": 1.0,
}

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")


class Report:
    """The growing results.jsonl, and the summary made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._file = (folder / "results.jsonl").open("w")

    def add(self, kind: str, **values: Any) -> None:
        """Append one result, on disk before this returns."""
        row = {"kind": kind, **values}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        state = "" if values.get("ok", True) else " FAILED " + str(values.get("why", ""))
        name = " ".join(str(values[k]) for k in ("case", "model", "what", "impl") if k in values)
        print(f"[{kind}] {name}{state}", flush=True)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The results of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The results that say so."""
        return [row for row in self.rows if not row.get("ok", True)]

    def close(self) -> None:
        """Write summary.md."""
        self._file.close()
        (self.folder / "summary.md").write_text(summary(self))


class Clock:
    """The time budget."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes

    def left(self, stage: str) -> float:
        """Seconds until `stage` must end."""
        return self.start + STAGES[stage] * self.seconds - time.monotonic()


def run_tests(report: Report, clock: Clock) -> None:
    """The part of the test suite that needs a GPU, in a process of its own."""
    if find_spec("pytest") is None:
        report.add("tests", ok=True, what="left out: pytest is not installed")
        return
    log = report.folder / "tests.log"
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report.folder / 'tests.xml'}"]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with log.open("w") as out:
        try:
            done = subprocess.run(
                command,
                cwd=Path(__file__).parent.parent,
                env=inherited,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=max(1, clock.left("tests")),
            )
            # 5: nothing collected, which without a GPU, and only there, is right.
            report.add("tests", ok=done.returncode in (0, 5), what=f"exit code {done.returncode}")
        except subprocess.TimeoutExpired:
            report.add("tests", ok=True, what="cut off by the time budget; see tests.log")


def compiled(case: Case, backend: str) -> dict[str, Callable[..., Any]]:
    """What PyTorch's compiler makes of the portable implementation."""
    name = case.forward.op.portable_name
    torch.compiler.reset()
    function = torch.compile(implementations(case)[name], dynamic=False, backend=backend)
    return {f"compile({name})": function}


def held(
    run: Callable[[], Sequence[Tensor]], eager: Sequence[Tensor], exact: Sequence[Tensor]
) -> dict[str, Any]:
    """`parity` of what `run` returns; one that raises has failed."""
    try:
        return parity(run(), eager, exact)
    except Exception as problem:
        return failure(problem)


def failure(problem: Exception) -> dict[str, Any]:
    """A result for what raised."""
    return {"ok": False, "why": f"{type(problem).__name__}: {problem}"[:500]}


def check_kernel(report: Report, case: Case, device: torch.device) -> bool:
    """Hold a backward op's kernel against float64, with autograd out of the way."""
    arguments = case.sample.make(device, case.dtype)
    with torch.no_grad():
        eager = as_tuple(case.op.portable(**arguments))
        exact = as_tuple(case.op.reference(**in_float64(arguments)))
        result = held(lambda: as_tuple(case.op.call(**arguments)), eager, exact)
    report.add("op parity", case=str(case), impl="triton, by itself", **result)
    return bool(result["ok"])


def check_op(
    report: Report, case: Case, device: torch.device, backend: str | None = None
) -> dict[str, Callable[..., Any]]:
    """Hold implementations against float64, and return those that passed.

    They are the op's own; or, with a backend, its portable one compiled by that.
    """
    good: dict[str, Callable[..., Any]] = {}
    arguments = case.arguments(device)
    known = implementations(case)
    try:
        eager = results(case, known[case.forward.op.portable_name], arguments)
        exact = results(case, known.pop("reference"), in_float64(arguments))
        for name, function in (known if backend is None else compiled(case, backend)).items():
            reason = unfit(case, name, arguments) if backend is None else None
            if reason is not None:
                report.add("note", case=str(case), impl=name, what=reason)
                continue
            result = held(partial(results, case, function, arguments), eager, exact)
            report.add("op parity", case=str(case), impl=name, **result)
            right = result["ok"]
            if case.is_backward and name == "triton":
                right = check_kernel(report, case, device) and right
            if right:
                good[name] = function
    except torch.OutOfMemoryError:
        report.add("note", case=str(case), what="left out: not enough memory for its reference")
    except Exception as problem:  # one case must not end the run
        report.add("op parity", case=str(case), impl="reference", **failure(problem))
    return good


def all_cases(size: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Dtype by dtype, so that a cut-off leaves whole tables."""
    return [c for dtype in dtypes for c in cases(REGISTRY.values(), [size], [dtype])]


def op_parity(
    report: Report, clock: Clock, todo: list[Case], device: torch.device
) -> dict[str, dict[str, Callable[..., Any]]]:
    """Check every op; by case, the implementations that may be timed."""
    good: dict[str, dict[str, Callable[..., Any]]] = {}
    for n, case in enumerate(todo):
        if clock.left("op parity") < 0:
            report.add("cut off", what=f"op parity: {len(todo) - n} of {len(todo)} cases unchecked")
            break
        good[str(case)] = check_op(report, case, device)
        _free(device)
    return good


def op_times(
    report: Report,
    clock: Clock,
    stage: str,
    todo: list[Case],
    timer: Timer,
    ceilings: Ceilings,
    good: dict[str, dict[str, Callable[..., Any]]],
) -> None:
    """Time what passed; in the compiled stage, compile and check it first."""
    for n, case in enumerate(todo):
        if clock.left(stage) < 0:
            report.add("cut off", what=f"{stage}: {len(todo) - n} of {len(todo)} cases untimed")
            return
        runs = good.get(str(case), {})
        if stage.startswith("compiled"):
            runs = check_op(report, case, timer.device, _backend(timer.device))
        if not runs:
            continue
        arguments, costs = case.arguments(timer.device), case.meta()
        moved, flops = case.op.bytes_moved(**costs), case.op.flops(**costs)
        for name, function in runs.items():
            call = timed(case, function, arguments)
            with torch.no_grad():
                first, again = timer(call, 0.1), timer(call, 0.1)
            report.add(
                "op time",
                case=str(case),
                op=case.op.name,
                impl=name,
                seconds=vars(first),
                a_a=again.median / first.median,
                gb_per_s=moved / first.median / 1e9,
                tflop_per_s=flops / first.median / 1e12,
                of_copy=moved / first.median / ceilings.bytes_per_s,
                of_matmul=flops / first.median / ceilings.flops_per_s,
            )
            del call
        del arguments
        _free(timer.device)


def _backend(device: torch.device) -> str:
    # On a CPU this path exists for the tests of the machinery: no C++ compiler is asked for there.
    return "inductor" if device.type == "cuda" else "eager"


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Setting:
    """One model in one precision; `exact` holds its float64 outcome."""

    name: str
    precision: _models.Precision
    exact: list[Tensor]

    def models(self, device: torch.device) -> dict[str, nn.Module]:
        """The networks, by implementation."""
        built = _models.build(self.name)
        return {k: m.to(device, self.precision.weights) for k, m in built.items()}


def check_models(
    report: Report,
    setting: Setting,
    models: dict[str, nn.Module],
    calls: dict[str, Callable[..., Tensor]],
    device: torch.device,
) -> set[str]:
    """Hold logits and gradients of `calls` against float64; the names of those that passed."""
    good: set[str] = set()
    images, labels = _models.batch(models["vitkern"], 2, device, setting.precision.weights)
    eager = _models.outcome(models["eager"], models["eager"], images, labels, setting.precision)
    for impl, call in calls.items():
        model = models[impl.split(" ")[0]]
        run = partial(_models.outcome, model, call, images, labels, setting.precision)
        result = held(run, eager, setting.exact)
        what = setting.precision.name
        report.add("model parity", model=setting.name, what=what, impl=impl, **result)
        if result["ok"]:
            good.add(impl)
    return good


def model_parity(
    report: Report,
    clock: Clock,
    names: tuple[str, ...],
    precisions: tuple[_models.Precision, ...],
    device: torch.device,
) -> list[tuple[Setting, set[str]]]:
    """Check every model; what may be timed of each."""
    checked: list[tuple[Setting, set[str]]] = []
    for name in names:
        if clock.left("model parity") < 0:
            report.add("cut off", what=f"model parity: {name} and what follows")
            break
        exact = _models.exact_outcome(name, device)
        for precision in precisions:
            setting = Setting(name, precision, exact)
            models = setting.models(device)
            checked.append((setting, check_models(report, setting, models, dict(models), device)))
            del models
            _free(device)
    return checked


def model_times(
    report: Report,
    clock: Clock,
    stage: str,
    checked: list[tuple[Setting, set[str]]],
    batches: tuple[int, ...],
    timer: Timer,
    ceilings: Ceilings,
) -> None:
    """Time forward and training step of what passed; compiled models are checked here first."""
    device = timer.device
    for setting, good in checked:
        models = setting.models(device)
        flops = _models.forward_flops(models["vitkern"])
        for impl, model in models.items():
            call: Callable[..., Tensor] = model
            allowed = {impl} & good
            name = impl
            if clock.left(stage) < 0:
                report.add("cut off", what=f"{stage}: {setting.name} {impl} and what follows")
                return
            if stage.startswith("compiled"):
                torch.compiler.reset()
                name, call = f"{impl} compiled", torch.compile(model, backend=_backend(device))
                allowed = check_models(report, setting, models, {name: call}, device)
            if name not in allowed:
                continue
            for size in batches:
                images, labels = _models.batch(
                    models["vitkern"], size, device, setting.precision.weights
                )
                steps = {
                    "forward": _forward(call, images, setting.precision),
                    "train": _train(model, call, images, labels, setting.precision),
                }
                for what, step in steps.items():
                    passes = 3 if what == "train" else 1
                    if clock.left(stage) < 0:
                        report.add("cut off", what=f"{stage}: {setting.name} {impl} b{size} {what}")
                        return
                    about = {
                        "model": setting.name,
                        "what": f"{what} b{size} {setting.precision.name}",
                        "impl": name,
                    }
                    try:
                        first, again = timer(step, 0.5), timer(step, 0.5)
                    except torch.OutOfMemoryError:
                        report.add("note", **about, why="not enough memory")
                        continue
                    report.add(
                        "model time",
                        **about,
                        seconds=vars(first),
                        a_a=again.median / first.median,
                        images_per_s=size / first.median,
                        # MFU against the product measured in this run, not the datasheet.
                        of_matmul=size * passes * flops / first.median / ceilings.flops_per_s,
                    )
            model.zero_grad(set_to_none=True)
        del models
        _free(device)


def _forward(
    call: Callable[..., Tensor], images: Tensor, precision: _models.Precision
) -> Callable[[], Any]:
    return lambda: _models.forward(call, images, precision)


def _train(
    model: nn.Module,
    call: Callable[..., Tensor],
    images: Tensor,
    labels: Tensor,
    precision: _models.Precision,
) -> Callable[[], Any]:
    return lambda: _models.train_step(model, call, images, labels, precision)


def summary(report: Report) -> str:
    """The results as a page of Markdown; ratios are against the fastest other implementation."""
    parts = ["# Measurements on one machine\n"]
    for row in report.of("about"):
        about = row["environment"]
        card = about.get("card", {}).get("name", "CPU")
        parts.append(
            f"{card}, torch {about['packages']['torch']}, triton {about['packages']['triton']}, "
            f"{about['date']}, commit {about['commit']}. {row['policy']}.\n"
        )
    for row in report.of("ceilings"):
        parts.append(
            f"Ceilings: {row['flops_per_s'] / 1e12:.1f} TFLOP/s ({row['matmul']}), "
            f"{row['bytes_per_s'] / 1e9:,.0f} GB/s ({row['copy']}).\n"
        )
    for row in report.of("tests"):
        parts.append(f"Tests: {row['what']}.\n")
    checked = [r for r in report.rows if r["kind"] in ("op parity", "model parity")]
    parts.append(f"Parity: {len(checked)} checked, {sum(not r['ok'] for r in checked)} failed.\n")
    parts += [f"- FAILED {json.dumps(row)}\n" for row in report.failed]
    parts += [f"- cut off: {row['what']}\n" for row in report.of("cut off")]
    unfit_here = Counter(row["what"] for row in report.of("note") if {"case", "impl"} <= row.keys())
    parts += [f"- left out of {n} op cases: {reason}\n" for reason, n in unfit_here.items()]
    ours = {"op time": "triton", "model time": "vitkern"}
    for kind, mine in ours.items():
        groups: dict[str, dict[str, dict[str, Any]]] = {}
        for row in report.of(kind):
            if "seconds" in row:
                key = row["case"] if kind == "op time" else f"{row['model']} {row['what']}"
                groups.setdefault(key, {})[row["impl"]] = row
        if not groups:
            continue
        lines = [("case", "implementation", "ms: median [quartiles]", "A/A", "roof", "speed-up")]
        for key, rows in groups.items():
            for impl, row in rows.items():
                stats = Stats(
                    **{k: v * (1 if k == "n" else 1e3) for k, v in row["seconds"].items()}
                )
                others = [
                    r["seconds"]["median"]
                    for name, r in rows.items()
                    if name.split(" ")[0] != mine and impl.split(" ")[0] == mine
                ]
                roof = max(row.get("of_copy", 0), row["of_matmul"])
                lines.append(
                    (
                        key,
                        impl,
                        f"{stats:.4g}",
                        f"{row['a_a']:.3f}",
                        f"{roof:.0%}",
                        f"{min(others) / row['seconds']['median']:.2f}" if others else "-",
                    )
                )
        parts.append(f"\n## {kind}s\n\n```\n{columns(lines)}\n```\n")
    return "\n".join(parts)


def main(minutes: float, folder: Path, device: torch.device) -> int:
    """Run all stages; 0 if everything was right, 1 if not, 2 without a GPU."""
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        print("error: no CUDA GPU here, and this command measures one", file=sys.stderr)
        return 2
    if minutes <= 0:
        raise ValueError(f"--minutes: must be above 0, got {minutes}")
    folder.mkdir(parents=True, exist_ok=True)
    clock, report = Clock(minutes), Report(folder)
    about = environment(device)
    (folder / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
    size = "vit" if cuda else "tiny"
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if cuda else (torch.float32,)
    names = MODELS if cuda else ("toy",)
    precisions = (_models.AUTOCAST, _models.BFLOAT16) if cuda else (_models.FLOAT32,)
    batches = (128, 1) if cuda else (2,)
    try:
        timer = Timer(device)
        report.add("about", environment=about, policy=timer.policy)
        if cuda:
            run_tests(report, clock)
        todo = all_cases(size, dtypes)
        ops = op_parity(report, clock, todo, device)
        models = model_parity(report, clock, names, precisions, device)
        ceilings = Ceilings.measure(timer)
        report.add("ceilings", **ceilings.as_dict())
        op_times(report, clock, "op times", todo, timer, ceilings, ops)
        model_times(report, clock, "model times", models, batches, timer, ceilings)
        model_times(report, clock, "compiled model times", models, batches, timer, ceilings)
        first = all_cases(size, dtypes[:1])  # the dtype that models run in
        op_times(report, clock, "compiled op times", first, timer, ceilings, ops)
    finally:
        report.close()
    print((folder / "summary.md").read_text())
    return 1 if report.failed else 0
