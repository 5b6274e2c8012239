"""What a Vision Transformer can reach on a card at best: FLOPs and bytes, counted, made into time.

Every figure is the prediction of a model, not a measurement. What is assumed:

- A kernel takes as long as its FLOPs at the card's achievable rate, or as its bytes at its
  achievable bandwidth, whichever is more; kernels don't overlap, and a launch costs nothing unless
  asked for. Achievable is what a large matrix product and a large copy reach: on others' H100 and
  A100 that was measured (800 of 989 TFLOP/s and 3.0 of 3.35 TB/s; 271 of 312 and 1.8 of 2.0), for
  other cards it is taken to be 0.81 and 0.9 of the datasheet.
- A tensor is read or written once by each kernel that has to; caches hold nothing from one kernel
  to the next. FLOPs are those of matrix products, 2 a multiply-add. MFU counts three times the
  forward pass for training, and is held against the datasheet's dense peak.
- So a figure is the least time of an execution's kernels; real ones reach a part of it.
- A training step has forward, backward and AdamW (28 bytes a parameter), no input pipeline.

Four executions of one model:

- "fused", the bound: no step writes what the next could have taken from a register. Per token,
  layer and unit of width D in bfloat16, MLP of 4 D: 44 bytes forward (qkv 8, attention 8,
  projection 6, fc1 10, fc2 12), 148 with backward. It may be passed where the count is of a plain
  ViT: attention's backward need not read its own output, as here it does, and see below.
- "vitkern": what this code launches today, recorded by calling it on tensors without memory. FLOPs
  are those that its ops declare, bytes those of each launch's tensors, so operands that one kernel
  leaves for the next count, too. By default the residual stream is float32, as autocast leaves it,
  and weights are cast in each pass; the last block computes the class token only, if that is all
  the classifier reads. A card may take another implementation by a measured table.
- "compiler": matrix products and attention are opaque calls, all between them is fused as well as
  dependencies let it: 80 D forward, 280 D with backward.
- "eager": the same calls, and each pointwise step a pass of its own under autocast: 104 D, 360 D.
  These two count a plain block, LayerScale, stochastic depth and gated MLPs; norms of queries and
  keys, dropout and attention pooling are left out.

Several GPUs: ring collectives. Each GPU sends and receives (n - 1) / n of the gradients twice in
data parallel ("ddp", float32), and in "fsdp" the same share of the weights twice (bfloat16) and of
the gradients once (float32). Between nodes all cards of a node share the traffic. Two bounds: all
of it hidden behind the computation that it may overlap with, or none. Links reach 0.8 of their
datasheet.
"""

from .executions import (
    EXECUTIONS,
    PRECISIONS,
    Precision,
    Work,
    forward_flops,
    parameters,
    works,
)
from .machines import MACHINES, Machine, Rates, card
from .prediction import Prediction, predict
from .projection import STRATEGIES, Projection, project

__all__ = [
    "EXECUTIONS",
    "MACHINES",
    "PRECISIONS",
    "STRATEGIES",
    "Machine",
    "Precision",
    "Prediction",
    "Projection",
    "Rates",
    "Work",
    "card",
    "forward_flops",
    "parameters",
    "predict",
    "project",
    "works",
]
