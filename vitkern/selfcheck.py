"""selfcheck(): whether every kernel is right on this machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vitkern._table import columns
from vitkern.kernels import REGISTRY, _tuned, _verified
from vitkern.kernels._op import KERNEL_DTYPES, Op, dtype_name
from vitkern.kernels._triton import INTERPRET, TRITON_MISSING


class Row(NamedTuple):
    """One kernel of one op in one dtype; of float32 products in one precision, "ieee" or "tf32"."""

    op: str
    kernel: str
    dtype: torch.dtype
    precision: str
    verdict: _verified.Verdict


@dataclass(frozen=True)
class Report:
    """Rows in the order of the ops; prints as a table.

    "error/budget" is the largest error of a result against float64 over what is allowed, twice the
    error that eager PyTorch makes in the same dtype: above 1 is wrong. Memory that a kernel got was
    filled with NaN before, so that an element which it left unwritten is wrong, too.
    """

    device: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every kernel is right."""
        return all(row.verdict.ok for row in self.rows)

    def __str__(self) -> str:
        lines = [("op", "kernel", "dtype", "samples", "calls", "error/budget", "verdict")]
        for op, kernel, dtype, precision, verdict in self.rows:
            words = "right" if verdict.ok else f"WRONG: {verdict} [{verdict.sample}]"
            kind = f"{dtype_name(dtype)} {precision}".rstrip()
            counts = (str(verdict.samples), str(verdict.repeats), f"{verdict.ratio:.2f}")
            lines.append((op, kernel, kind, *counts, words))
        wrong = sum(not row.verdict.ok for row in self.rows)
        counted = f"{len(self.rows)} checked on {self.device}, {wrong} wrong"
        return f"{columns(lines)}\n{counted}"


def selfcheck(
    ops: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    device: str | torch.device | None = None,
    repeats: int = 1,
) -> Report:
    """Hold every kernel, forward and backward, against float64 on all small samples of its op.

    Float32 is checked twice on a GPU, with its products in IEEE's precision and in TF32, each
    against PyTorch's own in the same. What fits none of an op's samples has no row.

    On a GPU the verdicts are kept, and from then on decide whether "auto" takes a kernel; before
    its first use a kernel is checked on fewer samples by itself.

    Args:
        ops: names of ops, backward ops included; all that have a kernel if None.
        dtypes: float32, float16 or bfloat16; all three if None, but for bfloat16 in Triton's
            interpreter, whose products in it are wrong.
        device: a GPU, or "cpu" for the interpreter; the current GPU, if there is one, if None.
        repeats: how often each call is made, from 1; the results must have the same bits.

    Raises:
        ValueError: an unknown op or one without a kernel, a dtype that no kernel takes, repeats
            below 1.
        RuntimeError: nothing here can run a kernel; the text says what is missing.
    """
    here = _device(device)
    chosen = [_op(name) for name in ops] if ops is not None else list(REGISTRY.values())
    if dtypes is None:
        dtypes = [d for d in KERNEL_DTYPES if here.type == "cuda" or d != torch.bfloat16]
    wanted = tuple(dtypes)
    for dtype in wanted:
        if dtype not in KERNEL_DTYPES:
            known = ", ".join(map(dtype_name, KERNEL_DTYPES))
            raise ValueError(f"selfcheck: dtypes must be of {known}, got {dtype_name(dtype)}")
    if repeats < 1:
        raise ValueError(f"selfcheck: repeats must be at least 1, got {repeats}")
    card = _tuned.card(here)
    rows: list[Row] = []
    for op in chosen:
        for kernel in _verified.kernels(op, here):
            for dtype in wanted:
                found = [
                    Row(op.name, kernel, dtype, precision, verdict)
                    for precision in _verified.precisions(dtype, here)
                    if (verdict := _check(op, kernel, dtype, here, precision, repeats))
                ]
                rows += found
                if card is not None and found:
                    verdict = _verified.worst(row.verdict for row in found)
                    _verified.record(_verified.key(op, kernel, dtype, card), verdict)
    return Report(card or "the CPU, in Triton's interpreter", tuple(rows))


def _check(
    op: Op, kernel: str, dtype: torch.dtype, device: torch.device, precision: str, repeats: int
) -> _verified.Verdict | None:
    """The thorough verdict; None where no sample is for this kernel."""
    using = _verified.samples(op, dtype)
    try:
        return _verified.check(
            op, kernel, dtype, device, using, precision=precision, repeats=repeats, poison=True
        )
    except _verified.Unfit:
        return None


def _device(device: str | torch.device | None) -> torch.device:
    """A device that kernels run on.

    Raises:
        RuntimeError: there is none.
    """
    if TRITON_MISSING is not None:
        raise RuntimeError(f"selfcheck: {TRITON_MISSING}")
    gpu = torch.cuda.is_available()
    here = torch.device(device or ("cuda" if gpu and not INTERPRET else "cpu"))
    if here.type == "cuda" and gpu:
        current = torch.cuda.current_device()
        return torch.device("cuda", current if here.index is None else here.index)
    if here.type == "cpu" and INTERPRET:
        return here
    raise RuntimeError(
        f"selfcheck: no kernel runs on {here} here: expected a CUDA GPU, which PyTorch "
        f"{'sees' if gpu else 'does not see'}, or the CPU with TRITON_INTERPRET=1 set before "
        "vitkern is imported, which runs the kernels in Triton's interpreter"
    )


def _op(name: str) -> Op:
    op = REGISTRY.get(name)
    if op is None or not _verified.kernels(op, torch.device("cuda")):
        known = [n for n, o in REGISTRY.items() if _verified.kernels(o, torch.device("cuda"))]
        raise ValueError(f"selfcheck: ops must be of {', '.join(known)}, got {name!r}")
    return op
