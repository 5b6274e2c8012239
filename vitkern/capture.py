"""capture(): inference by CUDA graphs, one for each of a few batch sizes.

A small batch takes a GPU less time than Python takes to launch its kernels. A graph launches all of
them at once, but runs on the addresses that it was captured with. So images are copied into a
buffer, a batch is padded to the next size that has a graph, and the result is copied out.

Graphs are captured at once and not when first needed: no request waits for a capture, all memory is
taken in the beginning, and after the largest the smaller ones live in its memory.
"""

import contextlib
import threading
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter, index, is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitkern.fold import FoldedViT, unfoldable
from vitkern.fold import fold as fold_model
from vitkern.kernels._op import autocast_dtype, dtype_name
from vitkern.model.layers import plain

Graph = tuple[Callable[[], None], Tensor]  # how to replay it, and the output that it writes


class Backend(Protocol):
    """What captures and replays; a test puts a recorder here."""

    def problem(self, device: torch.device) -> str | None:
        """Why nothing can be captured on `device`; None where it can."""

    def capturing(self) -> bool:
        """Whether the caller is itself being captured."""

    def reset(self, device: torch.device) -> None:
        """Begin anew: later captures share memory with each other, not with earlier ones."""

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """The graph of `run`."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Surrounds each use of the buffers."""


class CudaGraphs:
    """Backend on a GPU: one pool of memory, one stream to capture on, one event to take turns."""

    def problem(self, device: torch.device) -> str | None:
        """Graphs are CUDA's."""
        return None if device.type == "cuda" else f"the example is on {device.type}, not on a GPU"

    def capturing(self) -> bool:
        """Whether the current stream belongs to another capture."""
        return torch.cuda.is_current_stream_capturing()

    def reset(self, device: torch.device) -> None:
        """Wait for what still runs, then take a new pool."""
        self.device = device
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()
            self.done = torch.cuda.Event()

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Run it on a side stream first: compilation and libraries' workspaces stay outside."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    run()
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as one that pins memory for a loader, may go on meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
                output = run()
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay, output

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Calls on several streams share the buffers: each waits until the last one is through."""
        with torch.cuda.device(self.device):
            self.done.wait()
            yield
            self.done.record()


_END = object()


class _Watch:
    """Notices tensors and modules that were replaced since; with `values`, in-place changes, too.

    It looks before every call, and a model's own iterators take longer than a small batch does. So
    the tables in which modules keep their parts are walked here, by loops inside the interpreter.
    """

    def __init__(self, model: nn.Module, values: bool) -> None:
        modules = list(model.modules())
        tables = [t for m in modules for t in (m._modules, m._parameters, m._buffers) if t]
        self.tables: list[dict[str, Any]] = tables
        self.parts = list(self._parts())
        self.tensors = [part for part in self.parts if isinstance(part, Tensor)]
        # Inference tensors don't count their changes.
        self.counted = [t for t in self.tensors if values and not t.is_inference()]
        self.places, self.versions = self._places(), self._versions()

    def _parts(self) -> Iterator[Any]:
        # Something at the end by which one part more or fewer is noticed.
        return chain(chain.from_iterable(map(dict.values, self.tables)), (_END,))

    def _places(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def _versions(self) -> list[int]:
        return list(map(attrgetter("_version"), self.counted))

    def changed(self) -> bool:
        """Whether anything did."""
        return not (
            all(map(is_, self._parts(), self.parts))
            and self._places() == self.places
            and self._versions() == self.versions
        )


class CapturedModel:
    """A model for inference on images of one shape: what `capture` returns. Call it on images.

    Attributes:
        model: the model that was given, called directly where no graph fits.
        served: the model in the graphs: a folded copy, or `model` itself.
        batch_sizes: those that have a graph, ascending.
        problem: why there are no graphs; None where there are.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        batch_sizes: Iterable[int] | None = None,
        fold: bool = True,
        backend: Backend | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if model.training:
            raise ValueError("model must be in evaluation mode: call model.eval() first")
        if not isinstance(example, Tensor):
            raise TypeError(f"example must be a tensor of images, got {type(example).__name__}")
        if example.dim() < 2 or not example.numel():
            raise ValueError(f"example must be [B, ...] with B > 0, got {list(example.shape)}")
        self.model, self.served, self.fold = model, model, fold
        self.batch_sizes = _batch_sizes(batch_sizes, len(example))
        self.device, self.dtype, self.shape = example.device, example.dtype, example.shape[1:]
        dense = example.is_contiguous()
        last = example.dim() == 4 and example.is_contiguous(memory_format=torch.channels_last)
        self._layout = torch.channels_last if last and not dense else torch.contiguous_format
        self._backend = backend or CudaGraphs()
        self._graphs: dict[int, Graph] = {}
        self._lock = threading.RLock()  # the buffers are shared
        self._calls: Counter[str] = Counter()
        self.autocast: torch.dtype | None = None
        self.problem = self._backend.problem(self.device)
        if self.problem is None:
            self.autocast = autocast_dtype(self.device)
            self.refresh()

    def __call__(self, images: Tensor, *, copy: bool = True) -> Tensor:
        """The model's output for images [b, ...], of the example's shape but for any b.

        Args:
            images: on the example's device and of its dtype; otherwise `model` is called directly,
                with whatever it says about them. Larger batches than the largest are split.
            copy: return a tensor of its own. If False, a batch that was not split returns a view
                of the graph's output, which the next call, from any thread, overwrites.

        Returns:
            [b, ...], without gradient where a graph ran.
        """
        reason = self._misfit(images)
        if reason is None:
            with self._lock:
                if self._watch.changed():
                    self.refresh()
                if self.problem is None:
                    return self._replay(images, copy)
                reason = self.problem
        with self._lock:
            self._calls[f"direct: {reason}"] += 1
        output: Tensor = self.model(images)
        return output

    def _misfit(self, images: Tensor) -> str | None:
        """Why these images can't go through a graph; few texts, as they are counted."""
        if self.problem is not None:
            return self.problem
        if not isinstance(images, Tensor) or not images.dim() or not len(images):
            return "no images"
        if images.device != self.device:
            return "images on another device"
        if images.dtype != self.dtype:
            return "images of another dtype"
        if images.shape[1:] != self.shape:
            return "images of another shape"
        if self.model.training:
            return "the model is in training mode"
        if images.requires_grad and torch.is_grad_enabled():
            return "images that require a gradient"
        if autocast_dtype(self.device) != self.autocast:
            return "another autocast"
        if self._backend.capturing():
            return "inside another capture"
        return None

    def _replay(self, images: Tensor, copy: bool) -> Tensor:
        batch, largest = len(images), self.batch_sizes[-1]
        parts = []
        # Buffers are ordinary tensors, whichever mode the caller is in.
        with torch.inference_mode(False), torch.no_grad(), self._backend.turn():
            for part in images.split(largest):
                count = len(part)
                size = self.batch_sizes[bisect_left(self.batch_sizes, count)]
                replay, output = self._graphs[size]
                self._input[:count].copy_(part)
                replay()
                self._calls[f"graph of batch {size}"] += 1
                rows = output[:count]
                parts.append(rows.clone() if copy or batch > largest else rows)
            return torch.cat(parts) if len(parts) > 1 else parts[0]

    def refresh(self) -> None:
        """Capture anew. A call does it by itself when weights or modules were replaced or, with
        folded weights, changed in place; it can't see changes through ``.data``, nor new hooks.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.problem = self._backend.problem(self.device)
            if self.problem is not None:
                return
            self._graphs.clear()
            self._backend.reset(self.device)
            own = self.fold and not (isinstance(self.model, FoldedViT) or unfoldable(self.model))
            self._watch = _Watch(self.model, values=own)
            self.served = self._folded() if own else self.model
            size = (self.batch_sizes[-1], *self.shape)
            self._input = torch.zeros(size, dtype=self.dtype, device=self.device)
            self._input = self._input.contiguous(memory_format=self._layout)
            for batch in reversed(self.batch_sizes):
                self._capture(self._input[:batch])
                if self.problem is not None:
                    self._graphs.clear()
                    break

    def _folded(self) -> nn.Module:
        served = fold_model(self.model, head=True)  # type: ignore[arg-type]
        for layer in served.modules():
            # Autocast would cast the weight again in every replay.
            if self.autocast and plain(layer, nn.Linear) and layer.weight.dtype == torch.float32:
                layer.to(self.autocast)
        return served

    def _capture(self, images: Tensor) -> None:
        def run() -> Tensor:
            # Autocast's cache would hand a weight to the graph that is freed after it.
            on = self.autocast is not None
            kind = self.device.type
            with torch.autocast(kind, dtype=self.autocast, enabled=on, cache_enabled=False):
                output: Tensor = self.served(images)
            return output

        output = run()  # what goes wrong here is no matter of graphs, and the caller's to see
        if not isinstance(output, Tensor) or not output.dim() or len(output) != len(images):
            raise TypeError("model must return one tensor [B, ...] for images [B, ...]")
        del output
        try:
            self._graphs[len(images)] = self._backend.capture(run)
        except Exception as error:
            self.problem = f"capture failed: {type(error).__name__}: {error}"
            text = f"vitkern.capture runs without graphs: {self.problem}"
            warnings.warn(text, RuntimeWarning, stacklevel=5)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, ("B", *self.shape)))
        text = f"{type(self.model).__name__}, {dtype_name(self.dtype)} [{shape}] on {self.device}"
        if self.autocast is not None:
            text += f", autocast to {dtype_name(self.autocast)}"
        if self.problem is not None:
            return f"CapturedModel({text}, no graphs: {self.problem})"
        text += ", folded" * (self.served is not self.model)
        return f"CapturedModel({text}, graphs of batches {', '.join(map(str, self.batch_sizes))})"

    def explain(self) -> str:
        """What was captured, and how often calls took which graph, or none and why."""
        with self._lock:
            lines = (f"{how}: {count} x" for how, count in sorted(self._calls.items()))
            return "\n".join([repr(self), *lines])

    def __reduce__(self) -> Any:
        raise TypeError("a CapturedModel can't be copied or pickled: do it with its model")


def _batch_sizes(given: Iterable[int] | None, largest: int) -> tuple[int, ...]:
    if given is None:
        return (*(1 << i for i in range((largest - 1).bit_length())), largest)
    problem = f"batch_sizes must be one or more positive integers, got {given!r}"
    try:
        sizes = sorted({index(size) for size in given})
    except TypeError:
        raise TypeError(problem) from None
    if not sizes or sizes[0] < 1:
        raise ValueError(problem)
    return tuple(sizes)


def capture(
    model: nn.Module,
    example: Tensor,
    *,
    batch_sizes: Iterable[int] | None = None,
    fold: bool = True,
) -> CapturedModel:
    """`model` for inference on images like `example`, replayed from CUDA graphs.

    Autocast is captured as it is now: call the result under the same, or it runs without a graph.
    Where no graph can run (on a CPU, say), the model is called directly; `explain()` tells. What
    Python does in the model, hooks included, happens once and not in each replay.

    Weights that change in place count from the next call on. A graph of the model itself reads
    them where they are; folded ones are folded and captured anew, as are replaced ones.

    Args:
        model: a ViT, or any module that takes images [B, ...] and returns one tensor [B, ...]; in
            evaluation mode. It keeps no trace of the capture.
        example: images [B, ...], such as float or uint8 [B, C, H, W], or uint8 [B, H, W, C]. Only
            its shape, dtype, device and layout count.
        batch_sizes: those to capture; the powers of two below the example's batch size, and that,
            if None.
        fold: capture a folded copy (see `vitkern.fold`), if it is a ViT. It takes the memory of its
            weights once more; under autocast they are cast in advance.

    Raises:
        TypeError: a model, example or batch size of another type, or another kind of output.
        ValueError: a model in training mode, an empty example, batch sizes below 1.
    """
    return CapturedModel(model, example, batch_sizes=batch_sizes, fold=fold)
