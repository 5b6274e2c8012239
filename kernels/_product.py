"""A step of a product, with float32 rounded to TF32 as PyTorch's products round it.

In "tf32" `tl.dot` hands float32 to the tensor core as it is, and the core drops the 13 bits of the
mantissa that TF32 has not. cuBLAS and cuDNN round to nearest. Truncation errs by up to twice as
much, and always towards zero, so that errors add up along a row instead of cancelling
(github.com/triton-lang/triton/issues/4574; Triton's documentation of `tl.dot` says it, too).
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from ._triton import jit, tl


@jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; of 16-bit operands it is `tl.dot` and nothing else."""
    a, b = round_to_tf32(a, PRECISION), round_to_tf32(b, PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def round_to_tf32(x, PRECISION: tl.constexpr):
    """float32 to the nearest TF32, ties away from zero, in registers; the rest as it is.

    Done on the bits, as PTX's cvt.rna.tf32.f32 is not for the interpreter. A carry goes into the
    exponent, where it belongs, and infinity stays; a NaN is let through, since the one that GPUs
    make, all ones, would become -0.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x
