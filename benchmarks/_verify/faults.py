"""Kernels that are wrong on purpose: whether a tool sees anything at all, before it is believed."""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch

from vitkern.kernels._triton import jit, tl


@jit
def copy_fault_kernel(source, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(source + i))


@jit
def race_fault_kernel(source, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    # All threads write one word of shared memory, then read it, and no barrier is between.
    value = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 spot; st.volatile.shared.b32 [spot], $1; "
        "ld.volatile.shared.b32 $0, [spot]; }",
        "=r,r",
        [tl.load(source + i)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(out + i, value)


@jit
def barrier_fault_kernel(source, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    # Half of a warp comes to a barrier for whole warps.
    value = tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.s32 p, $1, 16; @p bar.sync 1, 32; mov.b32 $0, $1; }",
        "=r,r",
        [i],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(out + i, value + tl.load(source + i))


# By tool, what it is shown.
KERNELS = {
    "racecheck": "race_fault_kernel",
    "memcheck": "copy_fault_kernel",
    "initcheck": "copy_fault_kernel",
    "synccheck": "barrier_fault_kernel",
}


def run(tool: str) -> None:
    """Launch, on the GPU, what `tool` must report."""
    source = torch.arange(128, dtype=torch.int32).cuda()
    out = torch.empty(128, dtype=torch.int32, device="cuda")
    if tool == "memcheck":  # 124 words behind its end, which are padding
        copy_fault_kernel[(1,)](source, torch.empty(4, dtype=torch.int32, device="cuda"), SIZE=128)
    elif tool == "initcheck":
        copy_fault_kernel[(1,)](torch.empty_like(source), out, SIZE=128)
    elif tool == "racecheck":
        race_fault_kernel[(1,)](source, out, SIZE=128, num_warps=4)
    else:
        barrier_fault_kernel[(1,)](source, out, SIZE=32, num_warps=1)
