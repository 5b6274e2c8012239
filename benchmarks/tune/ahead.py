"""Alternatives compiled ahead, for a card that isn't needed, by many processes without a GPU.

What they make lies in Triton's cache, where a launch finds it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from vitkern.kernels._tuned import Key

from .. import _offline
from .._workers import Worker
from .places import Place, looked_at

COMPILE_TIMEOUT = 60.0


def compiled(
    place: Place, target: tuple[int, int], processors: int, key: Key, config: Any
) -> list[str]:
    """Compile a kernel with this config for a card that isn't needed; why it is of no use."""
    arch = 10 * target[0] + target[1]
    processor = _offline.MULTIPROCESSORS.get(arch)
    if processor is None:
        return []
    problems: list[str] = []
    for question, launches in looked_at(place, target, processors, {key: config}):
        if question.key != key:
            continue
        for launch in launches:
            job = as_launched(_offline.make_job(place.case(), launch, arch))
            in_gluon = getattr(launch.kernel, "is_gluon", bool)()
            row = compile_gluon(job) if in_gluon else _offline.compile_job(job)
            if "error" in row:
                problems.append(row["error"])
            elif row["spill_bytes"]:
                problems.append(f"spills {row['spill_bytes']} bytes")
            elif row["shared_bytes"] > processor.shared_limit:
                problems.append(f"shared memory: {row['shared_bytes']} bytes")
    return problems


def as_launched(job: _offline.Job) -> _offline.Job:
    """The job in Triton's own words for a launch, without which it would be compiled once more.

    They differ from release to release in what means nothing, and is part of the cache's key.
    """
    pack = getattr(job.launch.kernel, "_pack_args", None)  # of Triton 3.5 and later
    if pack is None:
        return job
    kernel, launch = job.launch.kernel, job.launch
    given = {**launch.constexprs, **_offline._options(launch)}
    bound, specialised, options = _offline._binder(kernel, job.arch)(*launch.args, **given)
    backend = _offline._backend(job.arch)
    _, signature, constexprs, attrs = pack(backend, given, bound, specialised, options)
    return replace(job, signature=signature, constexprs=constexprs, attrs=attrs)


def compile_gluon(job: _offline.Job) -> dict[str, Any]:
    """Compile a kernel in Gluon; none of its configs spills (tests/test_gluon.py)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    try:
        compiled = triton.compile(
            GluonASTSource(job.launch.kernel, job.signature, job.constexprs, job.attrs),
            target=GPUTarget("cuda", job.arch, 32),
            options=_offline._backend(job.arch)
            .parse_options(_offline._options(job.launch))
            .__dict__,
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"spill_bytes": 0, "shared_bytes": int(compiled.metadata.shared)}


class Compiler:
    """Processes without a GPU, each behind a thread, that compile what is submitted, in order."""

    def __init__(self, processes: int) -> None:
        # A compiler compiles, whatever this process does with kernels, and leaves the GPU alone.
        variables = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.workers = [Worker(variables) for _ in range(processes)]
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(processes)

    def submit(self, *arguments: Any) -> "Future[list[str]]":
        """Have `compiled` called with these arguments."""
        return self.threads.submit(self._run, *arguments)

    def _run(self, *arguments: Any) -> list[str]:
        worker = self.idle.get()
        try:
            return worker.ask(compiled, *arguments, timeout=COMPILE_TIMEOUT)
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        """End the processes; what was not begun is dropped."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()
