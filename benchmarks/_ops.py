"""Contests between the implementations of an op, on one of its samples.

Ours is what auto takes. The baseline is the op's portable implementation, in ATen's calls; the rest
are our other kernels, what PyTorch's compiler makes of the baseline, and other packages' ops.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tests.error_budget import as_tuple, in_float64
from vitkern.kernels._op import KERNELS, record_choices

from ._cases import Case, implementations, public, results, timed, unfit
from ._contest import Contender, Contest, OursFailed, Ready, Unfit
from ._measure import parity, versions
from .peers import ops as peers

# Whose the attentions of these names are; which of them "flash" is depends on the card.
FLASH = {"flash2": "flash-attn", "flash3": "flash-attn-3", "flash4": "flash-attn-4"}

# With these an op returns more than its public function does, for a backward pass to read.
SAVING = ("need_saved", "need_stats")


def contest(case: Case, device: torch.device, backend: str | None = None) -> Contest:
    """All implementations of one case; with a `backend`, what that compiler makes, too."""
    known, portable = implementations(case), case.forward.op.portable_name

    @cache
    def shared() -> tuple[dict[str, Any], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(arguments, eager's results, those in float64), for all contenders."""
        arguments = case.arguments(device)
        eager = results(case, known[portable], arguments)
        return arguments, eager, results(case, known["reference"], in_float64(arguments))

    def ours() -> str:
        arguments = shared()[0]
        try:
            with record_choices() as choices, torch.set_grad_enabled(case.is_backward):
                public(case.forward.op, "auto")(**arguments)
        except Exception as problem:
            raise OursFailed(f"{type(problem).__name__}: {problem}") from problem
        return choices[0].implementation

    def enter(name: str, build: Callable[[], Callable[..., Any]], note: str = "") -> Ready:
        arguments, eager, exact = shared()
        function = build()

        def check() -> dict[str, Any]:
            made = results(case, function, arguments)
            if case.is_backward or name in known:
                verdict = parity(made, eager, exact)
            else:  # a peer returns what the public function does
                verdict = parity(made, eager[: len(made)], exact[: len(made)])
            if verdict["ok"] and case.is_backward and name in KERNELS:
                verdict = by_itself(case, name, device)
            return verdict

        return Ready(timed(case, function, arguments), check, note)

    def own(name: str) -> Callable[..., Any]:
        reason = unfit(case, name, shared()[0])
        if reason is not None:
            raise Unfit(reason)
        return known[name]

    def compiled() -> Callable[..., Any]:
        return torch.compile(known[portable], dynamic=False, backend=backend or "inductor")

    def foreign(peer: peers.Peer) -> Callable[..., Any]:
        options = case.forward.sample.options
        if not case.is_backward and any(options.get(name) for name in SAVING):
            raise Unfit("it keeps nothing for a backward pass")
        to_public = case.forward.op.to_public
        return lambda **arguments: peer.call(**to_public(arguments))

    torch_version = f"torch {torch.__version__}"
    contenders: dict[str, Contender] = {}
    for name in known:
        package = None if name in KERNELS or name == "flash" else torch_version
        if name in FLASH:
            package = f"{FLASH[name]} {versions([FLASH[name]])[FLASH[name]]}"
        contenders[name] = Contender(
            partial(enter, name, partial(own, name)), package, name in KERNELS, name == portable
        )
    if backend is not None:
        name = f"compile({portable})"
        contenders[name] = Contender(partial(enter, name, compiled), torch_version)
    for name, peer in peers.OPS.get(case.forward.op.name, {}).items():
        start = partial(enter, name, partial(foreign, peer), peer.note)
        version = versions([peer.distribution])[peer.distribution]
        contenders[name] = Contender(start, version and f"{peer.distribution} {version}")
    costs = case.meta()
    flops, moved = case.op.flops(**costs), case.op.bytes_moved(**costs)
    return Contest(
        level="op",
        group=str(case),
        case=case.as_dict(),
        contenders=contenders,
        ours=ours,
        flops=flops,
        moved=moved,
        bound=lambda ceilings: ceilings.seconds(flops, moved, case.dtype),
    )


def by_itself(case: Case, name: str, device: torch.device) -> dict[str, Any]:
    """Hold a backward op's own kernel against float64, with autograd out of the way."""
    arguments = case.sample.make(device, case.dtype)
    with torch.no_grad():
        return parity(
            as_tuple(case.op.kernel(name)(**arguments)),
            as_tuple(case.op.portable(**arguments)),
            as_tuple(case.op.reference(**in_float64(arguments))),
        )
