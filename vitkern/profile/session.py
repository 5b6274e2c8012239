"""The context manager: it records some steps of a loop, and writes the report at its end."""

import os
import time
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.profiler import emit_nvtx
from torch.optim.optimizer import register_optimizer_step_post_hook

from vitkern._device import device_name
from vitkern._version import __version__
from vitkern.kernels._op import record_choices
from vitkern.profile.trace import BEGIN, END, STEP

# vitkern.profile.analysis and what is built on it are imported once there is a trace to look at.


class profile:  # used like a function, as torch.profiler.profile is
    """Profile the steps of a training or inference loop, of vitkern's models or any others.

    Recording begins with the block and ends after `warmup` + `steps` steps, or with the block; the
    steps that follow run as if there were no profiler, and tell what it costs. The report leaves
    the first `warmup` steps out, if there are more. It is written when the block ends, also by an
    exception, which then goes on. What goes wrong with it is a warning: it never stops the loop.

    A step ends where `step` is called; in a loop that never calls it, with each optimizer step; and
    without either the block is one step. Ranges named "data", "forward", "backward" or "optimizer"
    (``torch.profiler.record_function``) are taken for these phases; without them, they are found
    by what autograd, optimizers and loaders leave in a trace.

    Args:
        out: folder for report.html, report.json and trace.json (for chrome://tracing or Perfetto);
            it is made if need be. Where torch.distributed runs several processes, each writes to
            a folder "rank0", "rank1", ... in it.
        warmup: steps that are recorded but not reported: compilation, allocation, caches.
        steps: steps that are reported.
        nvtx: emit NVTX ranges of steps, ops and gradients for ``nsys profile`` in place of a
            report; the two can't be had at once.
        ceilings: measure, for a second at the end, what the device does at best; without, there
            are no percentages of a roofline.
        show: print the report's table and verdicts; of several processes rank 0 does.

    Attributes:
        analysis: all figures, once the block has ended; None with `nvtx`, and without a report.
        error: why there is no report, None if nothing went wrong.

    Raises:
        ValueError: a negative warmup, less than one step, or `nvtx` without a GPU.
        RuntimeError: another profiler is active.
    """

    def __init__(
        self,
        out: str | os.PathLike[str] = "runs/profile",
        *,
        warmup: int = 2,
        steps: int = 3,
        nvtx: bool = False,
        ceilings: bool = True,
        show: bool = True,
    ) -> None:
        if warmup < 0:
            raise ValueError(f"profile: warmup must be 0 or more, got {warmup}")
        if steps < 1:
            raise ValueError(f"profile: steps must be 1 or more, got {steps}")
        if nvtx and not torch.cuda.is_available():
            raise ValueError("profile: nvtx=True needs a CUDA GPU, and PyTorch sees none")
        self.out = Path(out)
        self.warmup, self.steps, self.nvtx = warmup, steps, nvtx
        self.ceilings, self.show = ceilings, show
        self.analysis: Any = None
        self.error: Exception | None = None
        self._marks = self._optimizer_steps = 0
        self._images: list[int | None] = []
        self._recording = ExitStack()
        self._profiler: torch.profiler.profile | None = None
        self._choices: Counter[tuple[str, str, str]] = Counter()
        self._clock = _Clock(2 * steps)

    def __enter__(self) -> "profile":
        if torch.autograd.profiler._is_profiler_enabled:
            raise RuntimeError("profile: another profiler is active; end it first")
        if self.nvtx:
            self._recording.enter_context(emit_nvtx(record_shapes=True))
            torch.cuda.nvtx.range_push("step 0")
            self._recording.callback(torch.cuda.nvtx.range_pop)
            return self
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.out /= f"rank{dist.get_rank()}"
            self.show = self.show and dist.get_rank() == 0
        self.out.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.is_available()
        if not gpu:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU
        activity = torch.profiler.ProfilerActivity
        profiler = torch.profiler.profile(
            activities=[activity.CPU, *([activity.CUDA] if gpu else [])],
            record_shapes=True,
            profile_memory=True,
        )
        _synchronise()  # what was launched before the block is none of its steps
        with ExitStack() as stack:  # undone if one of these fails
            profiler.start()
            stack.callback(profiler.stop)
            choices = stack.enter_context(record_choices())
            stack.callback(self._keep, choices)
            _mark(BEGIN)
            self._recording = stack.pop_all()
        self._profiler = profiler
        # Until the block ends: PyTorch loops over its hooks when it calls one, so none may go then.
        self._hook = register_optimizer_step_post_hook(self._optimizer_step)
        return self

    def step(self, images: int | None = None) -> None:
        """A step ends here.

        Args:
            images: how many it took, for images/s; without it, what vitkern's patch embedding saw.
        """
        if self.nvtx:
            self._marks += 1
            torch.cuda.nvtx.range_pop()
            torch.cuda.nvtx.range_push(f"step {self._marks}")
            return
        if self._profiler is None:
            self._clock.tick()
            return
        _mark(f"{STEP} {self._marks}")
        self._marks += 1
        self._images.append(images)
        if self._marks >= self.warmup + self.steps:
            self._stop()

    def _optimizer_step(self, *_: Any) -> None:
        if self._marks:
            return
        if self._profiler is None:
            self._clock.tick()
            return
        self._optimizer_steps += 1
        # One more than are wanted: this one's range in the trace is cut off here.
        if self._optimizer_steps > self.warmup + self.steps:
            self._stop()

    def _keep(self, choices: list[Any]) -> None:
        self._choices.update((c.op, c.implementation, c.why) for c in choices)

    def _stop(self) -> None:
        """End recording and write the trace; what runs from here on runs as ever."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        try:
            with self._recording:
                _synchronise()
                _mark(END)
            profiler.export_chrome_trace(str(self.out / "trace.json"))
            self._clock.start()
        except Exception as problem:  # the loop that is looked at goes on
            self.error = problem

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.nvtx:
            try:
                self._recording.close()
            except Exception:
                if error is None:  # otherwise the block's own goes on
                    raise
            return
        self._hook.remove()
        self._stop()
        kept = ""
        if self.error is None:
            path = self.out / "trace.json"
            kept = f"; the trace is kept, try again: python -m vitkern profile --trace {path}"
            try:
                self._report(path)
            except Exception as problem:
                self.error = problem
        if self.error is not None:
            text = f"profile: no report: {self.error!r}{kept}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _report(self, path: Path) -> None:
        from vitkern.profile import report
        from vitkern.profile.trace import load

        contents = load(path)
        contents["vitkern"] = {
            "device": device_name(torch.device("cpu")),  # where no GPU ran; the trace names those
            "images": self._images,
            "warmup": self.warmup,
            "untraced_seconds": self._clock.seconds,
            "choices": [
                {"op": op, "implementation": name, "why": why, "calls": calls}
                for (op, name, why), calls in self._choices.items()
            ],
            "settings": {
                "torch": str(torch.__version__),
                "vitkern": __version__,
                "threads": torch.get_num_threads(),
                "float32_matmul_precision": torch.get_float32_matmul_precision(),
            },
        }
        try:
            self.analysis = report.write(contents, self.out, measure=self.ceilings)
        finally:
            report.save(contents, path)
        if self.show:
            report.show(self.analysis, self.out)


def _mark(name: str) -> None:
    with torch.profiler.record_function(name):
        pass


def _gpus() -> list[int]:
    """Those that hold tensors of this process."""
    if not torch.cuda.is_initialized():
        return []
    return [i for i in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(i)]


def _synchronise() -> None:
    for gpu in _gpus():
        torch.cuda.synchronize(gpu)


class _Clock:
    """Seconds of at most `most` steps without the profiler.

    On GPUs by events, which wait for nothing; of several GPUs those of the slowest.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.ticks = 0
        self.gpus: list[int] = []
        self.began: Any = None
        self.last: Any = None

    def start(self) -> None:
        """The first step begins."""
        self.gpus = _gpus()
        self.began = self._now()

    def tick(self) -> None:
        """A step ended."""
        if self.began is not None and self.ticks < self.most:
            self.ticks += 1
            self.last = self._now()

    @property
    def seconds(self) -> float | None:
        """The mean; None without a step."""
        if not self.ticks:
            return None
        if not self.gpus:
            return float(self.last - self.began) / self.ticks
        for event in self.last:
            event.synchronize()
        pairs = zip(self.began, self.last, strict=True)
        return max(began.elapsed_time(last) for began, last in pairs) / 1e3 / self.ticks

    def _now(self) -> Any:
        if not self.gpus:
            return time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in self.gpus]
        for gpu, event in zip(self.gpus, events, strict=True):
            event.record(torch.cuda.current_stream(gpu))
        return events
