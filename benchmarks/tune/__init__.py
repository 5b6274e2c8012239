"""The tuner: what is the fastest on this card, as a table: launch configs, then implementations.

The configs of our kernels come first (``configs.py``), so that the implementations are measured
with those. Every implementation of an op is then held against float64 and timed, on the calls that
ViT-B/16 and L/16 make (``places.py``) and on the samples of real models; those of a backward op
together with the forward pass that goes before it. Tables are by bucket, and the bucket of a call
is asked of `choose` itself: the public function is called, and its record says under which name it
looked. The table is on disk after every case, so that a run may end at any time, and the next one
goes on where it stopped.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitkern.kernels import _tuned, _verified
from vitkern.kernels._gemm import launch as gemm
from vitkern.kernels._op import Choice, Op, dtype_name, record_choices

from .. import _ops
from .._cases import DTYPES, Case, cases, dealt, implementations, public, timed
from .._contest import Absent, Log, Unfit, failure, held
from .._measure import Timer, environment
from . import configs, places

# Of a run: what must be the same for its figures to hold.
SAME = ("gpu", "torch", "triton", "vitkern", "commit")

# Implementations of linear_residual that leave the statistics of its rows for the next norm.
LEAVING = ("triton", "cublas")


class Draft:
    """A table as it grows, in its file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Begin a run, in the table that stands in the file, if one does.

        Raises:
            ValueError: the file holds something else.
        """
        about = environment(device)
        packages = about["packages"]
        gpu = about["card"]["name"] if "card" in about else "cpu"
        run = {name: packages[name] for name in ("torch", "triton", "vitkern")}
        run |= {"gpu": gpu} | {name: about[name] for name in ("date", "commit", "uncommitted")}
        self.path = path
        self.table: dict[str, Any] = {"schema": _tuned.SCHEMA, "gpu": gpu}
        self.table |= {"runs": [], "entries": [], "configs": [], "verified": {}}
        if path.exists():
            if _tuned.read(path) is None:
                raise ValueError(f"--out: {path} holds no table of schema {_tuned.SCHEMA}")
            self.table = json.loads(path.read_text())
            if self.table["gpu"] != gpu:
                raise ValueError(f"--out: {path} is of {self.table['gpu']}, and this is {gpu}")
        self.runs: list[dict[str, Any]] = self.table["runs"]
        self.entries: list[dict[str, Any]] = self.table["entries"]
        self.configs: list[dict[str, Any]] = self.table.setdefault("configs", [])
        self.number = len(self.runs)
        self.runs.append(run)

    def holds(self, case: Case) -> bool:
        """Whether a run like this one has measured `case`."""
        found = (e["cases"][str(case)]["run"] for e in self.entries if str(case) in e["cases"])
        return any(map(self._like_this, found))

    def _like_this(self, run: int) -> bool:
        now = self.runs[self.number]
        return all(self.runs[run][name] == now[name] for name in SAME)

    def found_configs(self) -> dict[_tuned.Key, dict[str, Any]]:
        """The launch configs that a run like this one has found, by their fields."""
        return {
            (c["kernel"], c["bucket"], _tuned.dtype_of(c["dtype"])): c["config"]
            for c in self.configs
            if self._like_this(c["run"])
        }

    def add_config(self, key: _tuned.Key, row: dict[str, Any]) -> None:
        """Write down the launch config that was found, be it the default."""
        words = {"kernel": key[0], "bucket": key[1], "dtype": dtype_name(key[2])}
        self.configs[:] = [c for c in self.configs if not words.items() <= c.items()]
        kept = {name: row[name] for name in ("config", "default", "seconds", "place")}
        self.configs.append({**words, **kept, "run": self.number})
        self.save()

    def add(self, case: Case, choice: Choice, seconds: dict[str, float]) -> dict[str, Any]:
        """Write down what one case took, and who is the fastest of its bucket now."""
        key = {"op": choice.op, "bucket": choice.bucket, "dtype": dtype_name(choice.dtype)}
        entry = next((e for e in self.entries if key.items() <= e.items()), None)
        measured = {} if entry is None else dict(entry["cases"])
        measured[str(case)] = {"run": self.number, "seconds": seconds}
        best = _tuned.fastest(_tuned.totals(measured))
        new = {**key, "implementation": best, "cases": measured}
        if entry is not None:
            self.entries.remove(entry)
        self.entries.append(new)
        self.save()
        return new

    def verify(self, op: Op, impl: str, dtype: torch.dtype, device: torch.device) -> None:
        """Write down the verdict on a kernel, for machines that have not checked it."""
        card, verdict = _tuned.card(device), _verified.settle(op, impl, dtype, device)
        if card is not None and verdict is not None and not verdict.raised:
            self.table["verified"][_verified.key(op, impl, dtype, card)] = vars(verdict)

    def launch_configs(self) -> _tuned.Table:
        """The table as launchers read it, and without what `auto` would."""
        contents = _tuned.read(self.path) if self.path.exists() else None
        found = {} if contents is None else contents.configs
        return _tuned.Table(configs=found)

    def save(self) -> None:
        """Replace the file."""
        _tuned.replace(self.path, self.table)


def seconds_of(
    case: Case, function: Callable[..., Any], arguments: dict[str, Any], timer: Timer
) -> float:
    """Median of a call; in a backward case of both passes, as training needs them."""
    call = timed(case, function, arguments)
    with torch.no_grad():
        seconds = timer(call).median
    if case.is_backward:
        with torch.enable_grad():
            seconds += timer(partial(function, **arguments)).median
    return seconds


def as_called(impl: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a model has them: who leaves no statistics behind isn't asked for them."""
    if impl in LEAVING or "need_stats" not in arguments:
        return arguments
    return {**arguments, "need_stats": False}


def statistics_seconds(arguments: dict[str, Any], timer: Timer) -> float:
    """What the next norm's statistics take, where who wrote the stream has left none behind."""
    if timer.device.type != "cuda" or "residual" not in arguments:
        return 0.0
    if not arguments.get("need_stats"):
        return 0.0
    rows = gemm.as_matrix(arguments["residual"].detach())
    return timer(partial(gemm.row_statistics, rows)).median


Run = Callable[..., Any]


def right(case: Case, device: torch.device, fail: Callable[[str, Any], None]) -> dict[str, Run]:
    """The implementations of one case that run and are right; `fail` hears of the wrong ones."""
    contenders, good = _ops.contest(case, device).contenders, {}
    for name, run in implementations(case).items():
        if name == "reference":  # what the others are held against
            continue
        try:
            verdict = held(contenders[name].start().check)
        except (Absent, Unfit):
            continue
        except torch.OutOfMemoryError:
            print(f"{case} {name} is left out: not enough memory to check it", flush=True)
            continue
        except Exception as problem:
            verdict = failure(problem)
        if verdict["ok"]:
            good[name] = run
        else:
            fail(f"{case} {name}", verdict)
    return good


def tune_case(case: Case, draft: Draft, timer: Timer, fail: Callable[[str, Any], None]) -> str:
    """Check and time all implementations of one case; what was found, in words."""
    if isinstance(case, places.StepCase):  # as the model calls them; casts are part of a step
        with torch.autocast(timer.device.type, case.dtype, cache_enabled=False):
            return _tune_case(case, draft, timer, fail)
    return _tune_case(case, draft, timer, fail)


def _tune_case(case: Case, draft: Draft, timer: Timer, fail: Callable[[str, Any], None]) -> str:
    good = right(case, timer.device, fail)
    if case.is_backward:  # right gradients alone don't make what trains right
        forward = right(case.forward, timer.device, fail)
        good = {name: run for name, run in good.items() if name in forward}
    if not good:
        return "nothing to time"
    arguments = case.arguments(timer.device)
    with record_choices() as choices, torch.set_grad_enabled(case.is_backward):
        public(case.forward.op, "auto")(**arguments)
    seconds = {
        name: seconds_of(case, run, as_called(name, arguments), timer) for name, run in good.items()
    }
    more = statistics_seconds(arguments, timer)
    seconds = {name: s if name in LEAVING else s + more for name, s in seconds.items()}
    for kernel in _verified.KERNELS.intersection(good, case.op.implementations):
        draft.verify(case.op, kernel, case.dtype, timer.device)
    entry = draft.add(case, choices[0], seconds)
    return f"{_tuned.in_words(seconds)}; {entry['implementation']} for {entry['bucket']}"


def main(
    minutes: float,
    ops: list[Op],
    out: Path | None,
    device: torch.device,
    again: bool,
    log: Path | None = None,
    share: float = 0.6,
    processes: int | None = None,
) -> int:
    """Tune until done or out of time; 0 if everything was right, 1 if not, 2 without a GPU.

    log: a results file, for what each launch config took; beside the table if None. share: of the
    time, at most, for launch configs. processes: that compile these; two less than there are cores
    if None.
    """
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        print("error: no CUDA GPU here, and this command measures one", file=sys.stderr)
        return 2
    if minutes <= 0:
        raise ValueError(f"--minutes: must be above 0, got {minutes}")
    begun = time.monotonic()
    end = begun + 60 * minutes
    if out is None:
        name = f"{_tuned.card(device) or device.type}.json"
        out = (_tuned.FOLDER if cuda else Path("build/tuned")) / name
    draft, failed = Draft(out, device), []

    def fail(what: str, verdict: Any) -> None:
        failed.append(what)
        print(f"FAILED {what}: {json.dumps(verdict)}", flush=True)

    if share > 0:
        rows = Log(log or out.with_suffix(".jsonl"))
        try:
            until = begun + 60 * minutes * share
            configs.tune(draft, ops, device, until, again, rows.add, fail, processes)
        finally:
            rows.close()
    with _tuned.using(device, draft.launch_configs()):
        tune_implementations(draft, ops, device, end, again, fail)
    return 1 if failed else 0


def ordered(
    ops: Iterable[Op],
    size: str,
    dtypes: Iterable[torch.dtype],
    stages: Iterable[places.Batches] = (),
    card: tuple[tuple[int, int], int] = ((8, 0), 108),
) -> list[Case]:
    """The calls of these steps on such a card, then dtype by dtype the first sample of every op.

    Then the second and so on: a run may be cut off.
    """
    ops = list(ops)
    found: list[Case] = [c for batches in stages for c in places.step_cases(ops, batches, *card)]
    return found + [case for dtype in dtypes for case in dealt(cases(ops, [size], [dtype]))]


def tune_implementations(
    draft: Draft,
    ops: list[Op],
    device: torch.device,
    end: float,
    again: bool,
    fail: Callable[[str, Any], None],
) -> None:
    """Fill the table's entries until done or until `end`, by time.monotonic."""
    cuda, timer = device.type == "cuda", Timer(device)
    if cuda:
        every = ordered(ops, "vit", DTYPES, places.STAGES, configs.describe(str(device)))
    else:
        every = ordered(ops, "tiny", [torch.float32])
    todo = [case for case in every if again or not draft.holds(case)]
    print(f"{draft.path}: {len(every)} cases, {len(every) - len(todo)} measured before")
    print(timer.policy)
    for n, case in enumerate(todo):
        if time.monotonic() > end:
            print(f"out of time: {len(todo) - n} cases are left for the next run")
            break
        try:
            print(f"{case}: {tune_case(case, draft, timer, fail)}", flush=True)
        except Exception as problem:  # one case must not end the run
            fail(str(case), failure(problem))
        if cuda:
            torch.cuda.empty_cache()
