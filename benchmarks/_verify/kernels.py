"""Every kernel checked thoroughly on a GPU, in several processes, each verdict on disk at once.

What is checked, `_verified.check` says: memory filled with NaN, each call many times, float32 under
IEEE and under TF32; on all small samples and, if wanted, on those of real models, whose launches
fill a card, so that a race has every chance to show.

An item of work is one kernel of one op in one dtype, precision and size of samples. Compiling takes
most of the time, so as many workers as there are cores take items. A worker that dies, or says
nothing for too long, costs the item that it was at; the next item gets a new one. So does one whose
GPU doesn't answer any more, as after an illegal access. What lacks memory waits for fewer workers.

A run goes on where another of the same sources stopped. At the end the verdicts go where `auto`
finds them: into a table of ``_tuned.py``, and into this machine's cache.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from vitkern.kernels import REGISTRY, _tuned, _verified
from vitkern.kernels._op import Sample, dtype_name
from vitkern.kernels._verified import Verdict

from .. import _report
from .._cases import choose_ops
from .._contest import Log, Row
from .._measure import Clock, environment

# The most valuable first, as time may run out.
DTYPES = (torch.bfloat16, torch.float32, torch.float16)

# Seconds after which a worker without a word has hung: it starts, or is at one sample, whose
# kernels compile in a few seconds each, while all cores do the same.
PATIENCE = 120.0

# Seconds that a process has to end.
ENDING = 20.0

# Beyond that many processes, they only wait for the GPU.
MOST_PROCESSES = 14

# The small ones first: they are the verdict that counts, and take little memory.
SIZES = ("tiny", "vit")

# In the words of PyTorch's allocator, the driver and cuBLAS.
SIGNS_OF_NO_MEMORY = ("OutOfMemoryError", "out of memory", "STATUS_ALLOC_FAILED")
NO_MEMORY = "not enough memory beside the other processes"


@dataclass(frozen=True)
class Item:
    """One kernel of one op in one dtype and precision, on samples of one size.

    precision: as in `_verified.check`. size: of SIZES.
    """

    op: str
    impl: str
    dtype: torch.dtype
    precision: str
    size: str = SIZES[0]

    def __str__(self) -> str:
        return " ".join(word for word in self.words.values() if word)

    @property
    def words(self) -> Row:
        """For a row of results."""
        return {**vars(self), "dtype": dtype_name(self.dtype)}

    def key(self, card: str) -> str:
        """By what its verdict is kept, with those of other precisions."""
        return _verified.key(REGISTRY[self.op], self.impl, self.dtype, card)

    @property
    def samples(self) -> list[Sample]:
        """Those it is checked on."""
        return _verified.samples(REGISTRY[self.op], self.dtype, self.size)


def items(
    ops: Iterable[str] | None, device: torch.device, sizes: Sequence[str] = SIZES[:1]
) -> list[Item]:
    """All there is to check, size by size, dtype by dtype, what takes longest first.

    Raises:
        ValueError: an unknown op or size, or no op that has a kernel.
    """
    for size in sizes:
        if size not in SIZES:
            raise ValueError(f"--sizes: expected some of {', '.join(SIZES)}, got {size!r}")
    dtypes = [d for d in DTYPES if device.type == "cuda" or d != torch.bfloat16]
    found = [
        Item(op.name, impl, dtype, precision, size)
        for size in sizes
        for dtype in dtypes
        for op in choose_ops(ops)
        for impl in _verified.kernels(op, device)
        for precision in _verified.precisions(dtype, device)
    ]
    if not found:
        raise ValueError("--op: expected at least one op that has a kernel")

    def place(item: Item) -> tuple[int, int, int]:
        return SIZES.index(item.size), dtypes.index(item.dtype), -len(item.samples)

    return sorted((item for item in found if item.samples), key=place)


# In a worker.


def examine(item: Item, device: torch.device, repeats: int, tell: Callable[[str], None]) -> Row:
    """The verdict on an item as a row has it; `tell` hears the name of each sample."""
    at = ""

    def watched() -> Iterator[Sample]:
        nonlocal at
        for sample in item.samples:
            at = sample.label
            tell(at)
            yield sample

    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        verdict = _verified.check(
            REGISTRY[item.op],
            item.impl,
            item.dtype,
            device,
            watched(),
            precision=item.precision,
            repeats=repeats,
            poison=True,
        )
    except _verified.Unfit:
        return {**asdict(Verdict(True, 0)), "ok": None, "why": "it fits none of the samples here"}
    except Exception as problem:
        why = f"{type(problem).__name__}: {problem}"[:500]
        verdict = Verdict(False, 0, why=why, raised=True, sample=at)
    if verdict.raised and any(sign in verdict.why for sign in SIGNS_OF_NO_MEMORY):
        return {**failed(NO_MEMORY, at), "ok": None}
    return asdict(verdict)


def failed(why: str, sample: str) -> Row:
    """The verdict on what never came to an end."""
    return asdict(Verdict(False, 0, why=why, raised=True, sample=sample))


def healthy(device: torch.device) -> bool:
    """Whether the GPU still answers this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def serve(pipe: Any, device: torch.device, repeats: int) -> None:
    """A worker's life: an item comes in; names of samples and then its verdict, a dict, go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends workers
    os.environ["VITKERN_SELFCHECK"] = "0"  # this is the check
    torch.set_num_threads(1)
    while True:
        try:
            item = pipe.recv()
        except EOFError:  # the parent is gone
            return
        found = examine(item, device, repeats, pipe.send)
        if device.type == "cuda" and healthy(device):
            torch.cuda.empty_cache()  # the other processes need it
        well = healthy(device)
        pipe.send(found)
        if not well:
            return


Serve = Callable[[Any, torch.device, int], None]


# In the parent.


class Worker:
    """A process, and what it is at."""

    def __init__(self, serve: Serve, device: torch.device, repeats: int, clock: Clock) -> None:
        """Start it."""
        # A forked process can't use a GPU that its parent has used.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, device, repeats), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen at this one
        self.clock, self.started = clock, False
        self.item: Item | None = None

    def give(self, item: Item) -> bool:
        """Whether it is alive, and takes the item."""
        self.item, self.at, self.begun = item, "", self.clock()
        self.heard = self.begun
        try:
            self.pipe.send(item)
        except OSError:
            return False
        return True

    def hear(self, patience: float) -> Row | None:
        """The verdict on its item, if there is one by now; a worker that is lost has failed."""
        try:
            while self.pipe.poll():
                self.heard, self.started = self.clock(), True
                word = self.pipe.recv()
                if isinstance(word, dict):
                    return word
                self.at = word
        except (EOFError, OSError):
            self.process.join(ENDING)
            return failed(f"its process died, exit code {self.process.exitcode}", self.at)
        limit = patience if self.started else max(patience, PATIENCE)
        if self.clock() - self.heard > limit:
            self.end()
            return failed(f"it hung: no word for {limit:.0f} s", self.at)
        return None

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join(ENDING)  # a driver may take its time over a kernel that hangs
        self.pipe.close()


def run(
    todo: list[Item],
    new: Callable[[], Worker],
    processes: int,
    patience: float,
    late: Callable[[], bool],
) -> Iterator[tuple[Item, Row]]:
    """Items with their verdicts, as they come; once it is late, what is unfinished is given up."""
    waiting, idle, busy = list(reversed(todo)), list[Worker](), list[Worker]()
    try:
        while (waiting or busy) and not late():
            while waiting and len(busy) < processes:
                worker = idle.pop() if idle else new()
                if worker.give(waiting[-1]):
                    waiting.pop()
                    busy.append(worker)
                else:  # it was lost after its last verdict
                    worker.end()
            connection.wait([worker.pipe for worker in busy], timeout=1)
            for worker in list(busy):
                found = worker.hear(patience)
                if found is not None and worker.item is not None:
                    busy.remove(worker)
                    if found["raised"]:  # whatever it was, it isn't to reach another item
                        worker.end()
                    else:
                        idle.append(worker)
                    yield worker.item, {**found, "seconds": worker.heard - worker.begun}
    finally:
        for worker in (*idle, *busy):
            worker.end()


Name = tuple[str, str, str]  # the key of a verdict, the precision, the size of samples


def settled(path: Path, repeats: int) -> dict[Name, Row]:
    """The rows in a results file that needn't be made again.

    Raises:
        ValueError: it is no results file.
    """
    rows = _report.read(path).of("verified") if path.exists() and path.stat().st_size else []
    return {
        (row["key"], row["precision"], row["size"]): row
        for row in rows
        if not row["raised"] and (row["ok"] is None or row["repeats"] >= repeats)
    }


def verdicts(found: dict[Name, Row], device: torch.device) -> dict[str, Verdict]:
    """By key, what holds for all precisions and sizes; none where a precision is open."""
    grouped: dict[str, list[Row]] = {}
    for (key, *_), row in found.items():
        if row["ok"] is not None and not row["raised"]:
            grouped.setdefault(key, []).append(row)
    made = {}
    for key, rows in grouped.items():
        names = [field.name for field in fields(Verdict)]
        worst = _verified.worst(Verdict(**{n: row[n] for n in names}) for row in rows)
        wanted = _verified.precisions(_tuned.dtype_of(rows[0]["dtype"]), device)
        if not worst.ok or len({row["precision"] for row in rows}) == len(wanted):
            made[key] = worst
    return made


def keep(table: Path, gpu: str, found: dict[str, Verdict]) -> None:
    """Add verdicts to the table in a file, a new one if there is none.

    Raises:
        ValueError: the file holds something else, or is of another card.
    """
    contents: dict[str, Any] = {"schema": _tuned.SCHEMA, "gpu": gpu, "runs": [], "entries": []}
    if table.exists():
        if _tuned.read(table) is None:
            raise ValueError(f"--table: {table} holds no table of schema {_tuned.SCHEMA}")
        contents = json.loads(table.read_text())
        if contents["gpu"] != gpu:
            raise ValueError(f"--table: {table} is of {contents['gpu']}, and this is {gpu}")
    made = {key: asdict(verdict) for key, verdict in found.items()}
    _tuned.replace(table, {**contents, "verified": {**contents.get("verified", {}), **made}})


@contextmanager
def interpreted(wanted: bool) -> Iterator[None]:
    """Processes that start inside the block run kernels in Triton's interpreter, or don't."""
    name = "TRITON_INTERPRET"
    before = os.environ.get(name)
    os.environ[name] = "1" if wanted else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def in_words(row: Row) -> str:
    """A verdict for the eye."""
    if row["ok"] is None:
        return str(row["why"])
    verdict = Verdict(**{field.name: row[field.name] for field in fields(Verdict)})
    if not verdict.ok:
        return f"WRONG: {verdict}" + (f" [{verdict.sample}]" if verdict.sample else "")
    counts = f"{verdict.samples} samples x {verdict.repeats}"
    return f"right, {counts}, error/budget {verdict.ratio:.2f}"


def main(
    results: Path,
    table: Path | None,
    device: torch.device,
    ops: Iterable[str] | None = None,
    repeats: int = 100,
    minutes: float | None = None,
    processes: int | None = None,
    sizes: Sequence[str] = SIZES[:1],
    patience: float = PATIENCE,
    serve: Serve = serve,
    clock: Clock = time.monotonic,
) -> int:
    """Check what is not settled in `results`; 0: all right, 1: something wrong, 2: not all checked.

    Args:
        results: rows are appended there. table: of ``_tuned.py``, for the verdicts.
        ops: names; all for None. repeats: of each call. minutes: what is unfinished by then is left
            for the next run. device: "cpu" is a rehearsal in Triton's interpreter.
        sizes: of samples: "tiny", and "vit" for the sizes of real models.
        patience: seconds without a word after which a worker is taken to hang.

    Raises:
        ValueError: an argument, or a file, that is of no use.
    """
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        print("error: no CUDA GPU here, and this command checks its kernels", file=sys.stderr)
        return 2
    for name, value in {"repeats": repeats, "minutes": minutes, "processes": processes}.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name}: must be above 0, got {value}")
    if cuda and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    start, card = clock(), _tuned.card(device) or device.type
    every, before = items(ops, device, sizes), settled(results, repeats)
    names = {item: (item.key(card), item.precision, item.size) for item in every}
    todo = [item for item in every if names[item] not in before]
    found = {names[item]: before[names[item]] for item in every if names[item] in before}
    processes = min(processes or min(MOST_PROCESSES, (os.cpu_count() or 2) - 2), len(todo)) or 1
    about, log = environment(device), Log(results)
    gpu = about["card"]["name"] if cuda else "cpu"
    if table is not None and todo:
        keep(table, gpu, {})  # if that is impossible, it is to be known now
    print(f"{len(every)} kernels to check, {len(found)} settled before; {processes} processes")
    if todo:
        log.add({"kind": "about", "environment": about, "device": device.type})

    def late() -> bool:
        return minutes is not None and clock() - start > 60 * minutes

    def new() -> Worker:
        return Worker(serve, device, repeats, clock)

    def check(some: list[Item], processes: int) -> list[Item]:
        """Which of them lacked memory."""
        starved = []
        for item, verdict in run(some, new, processes, patience, late):
            row = {"kind": "verified", **item.words, **verdict, "key": names[item][0]}
            row |= {name: about[name] for name in ("commit", "uncommitted", "date")}
            log.add(row)
            found[names[item]] = row
            print(f"[{len(found)}/{len(every)}] {item}: {in_words(row)}", flush=True)
            if row["why"] == NO_MEMORY:
                starved.append(item)
        return starved

    try:
        with interpreted(not cuda):
            for number in (processes, processes // 4 or 1, 1):
                todo = check(todo, number)
    finally:
        log.close()
        kept = verdicts(found, device)
        if table is not None:
            keep(table, gpu, kept)
        for key, worst in kept.items() if cuda else ():
            _verified.keep(key, worst)
    if len(found) < len(every):
        print(f"out of time: {len(every) - len(found)} kernels are left for the next run")
    wrong = sum(row["ok"] is False for row in found.values())
    starved = sum(row["why"] == NO_MEMORY for row in found.values())
    print(f"{len(found) - starved} of {len(every)} checked on {gpu}, {wrong} wrong")
    return 1 if wrong else 2 if starved or len(found) < len(every) else 0
