"""Training on several GPUs: communication against computation, and memory."""

from dataclasses import dataclass

from vitkern._table import columns
from vitkern.model.config import ViTConfig

from .executions import PRECISIONS, one_of, parameters, positive, recording
from .machines import Machine
from .prediction import Prediction, predict

STRATEGIES = ("ddp", "fsdp")

# Of the memory on a card: what the CUDA context, libraries and fragmentation leave.
USABLE = 0.93


@dataclass(frozen=True)
class Projection:
    """A training step on several GPUs; prints as a short report.

    single: the step of one of the GPUs, alone. gather: seconds that weights take to arrive for one
    pass ("fsdp"). reduce: seconds that the gradients take. memory: bytes on each GPU, by kind.
    """

    single: Prediction
    gpus: int
    strategy: str
    link: float
    gather: float
    reduce: float
    memory: dict[str, float]

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: all communication hidden that may be, and none."""
        forward = self.single.part_seconds("forward")
        backward = self.single.part_seconds("backward")
        update = self.single.part_seconds("optimizer")
        if self.strategy == "fsdp":
            update /= self.gpus  # each updates its own share
        hidden = max(forward, self.gather) + max(backward, self.gather + self.reduce)
        bare = forward + backward + 2 * self.gather + self.reduce
        return hidden + update, bare + update

    @property
    def images_per_s(self) -> tuple[float, float]:
        """Of all GPUs together, for the two bounds."""
        best, worst = (self.gpus * self.single.batch / seconds for seconds in self.seconds)
        return best, worst

    @property
    def efficiency(self) -> tuple[float, float]:
        """Images a second over those of as many single GPUs; above 1 where sharding the optimizer
        saves more than communication costs."""
        best, worst = (self.single.seconds / seconds for seconds in self.seconds)
        return best, worst

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory is enough, 7 % of it left to the system and to fragmentation."""
        return sum(self.memory.values()) <= USABLE * self.single.machine.memory

    def __str__(self) -> str:
        one, (best, worst) = self.single, self.images_per_s
        lines = [("memory of a GPU", "GB")]
        lines += [(kind, f"{size / 1e9:.2f}") for kind, size in self.memory.items()]
        total, room = sum(self.memory.values()) / 1e9, one.machine.memory / 1e9
        lines.append(("total", f"{total:.2f} of {room:.0f}: {'fits' if self.fits else 'TOO MUCH'}"))
        high, low = self.efficiency
        return (
            f"{one.model} on {self.gpus} x {one.machine.name}, {self.strategy}, {one.batch} images "
            f"a GPU, {one.execution} (predicted):\n"
            f"{worst:,.0f} to {best:,.0f} images/s, {low:.1%} to {high:.1%} of {self.gpus} single "
            f"GPUs (communication not hidden at all, or as far as it can be)\n"
            f"gradients {1e3 * self.reduce:.3g} ms, weights twice {2e3 * self.gather:.3g} ms, at "
            f"{self.link / 1e9:.3g} GB/s a GPU\n{columns(lines)}"
        )


def project(
    config: ViTConfig | str,
    machine: Machine | str,
    batch: int = 256,
    *,
    gpus: int = 8,
    strategy: str = "ddp",
    gpus_per_node: int = 8,
    execution: str = "vitkern",
    precision: str | None = None,
) -> Projection:
    """A training step of `batch` images on each of `gpus` GPUs.

    Args:
        config, machine, execution, precision: as for `predict`. The config's `save` decides how
            much vitkern keeps for backward.
        gpus: in all; whole nodes if more than `gpus_per_node`.
        strategy: "ddp" (all-reduce of gradients) or "fsdp" (weights, gradients and optimizer
            sharded; weights gathered for forward and again for backward, gradients scattered).

    Raises:
        ValueError: as `predict`; an unknown strategy; a last node that would not be full.
    """
    one_of("strategy", strategy, STRATEGIES)
    positive("gpus", gpus)
    positive("gpus_per_node", gpus_per_node)
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ValueError(f"gpus must be a multiple of gpus_per_node={gpus_per_node}, got {gpus}")
    single = predict(config, machine, batch, True, execution, precision=precision)
    machine, config = single.machine, single.config
    if precision is None:
        precision = "bf16" if execution == "fused" else "bf16 autocast"
    p, count, share = PRECISIONS[precision], parameters(config), (gpus - 1) / gpus
    link = machine.node_link
    if gpus > gpus_per_node:  # rings that each leave the node by another card's adapter
        link = min(link, gpus_per_node * machine.network)
    sharded = strategy == "fsdp"
    gradients = 4 * count  # float32, also where the master weights are kept beside bfloat16 ones
    return Projection(
        single=single,
        gpus=gpus,
        strategy=strategy,
        link=link,
        gather=share * p.operand * count / link if sharded else 0.0,
        reduce=share * gradients * (1 if sharded else 2) / link,
        memory=_memory(single, precision, gpus if sharded else 1),
    )


def _memory(single: Prediction, precision: str, shards: int) -> dict[str, float]:
    """Bytes on one GPU, by kind."""
    config, batch, p = single.config, single.batch, PRECISIONS[precision]
    count = parameters(config)
    # What is kept grows with the batch, but for rounded copies of weights: two batches tell both.
    # What a compiler keeps depends on its partitioner, so eager's stands for it.
    eager = single.execution in ("eager", "compiler")
    wide = p.operand == 4 and not eager  # the bound in float32 keeps what it would keep in bfloat16
    kept_as = "bf16" if wide else precision
    one, two = (recording(config, n * batch, True, kept_as, eager).saved_bytes for n in (1, 2))
    activations = (two - one) * (2 if wide else 1)
    # Gathered weights of two blocks, one at work and the next one under way; or all, rounded.
    gathered = 2 / config.depth if shards > 1 else 1.0
    copies = gathered * p.operand * count if shards > 1 or p.weight != p.operand else 0.0
    return {
        "weights (float32)": 4 * count / shards,
        "gradients (float32)": 4 * count / shards,
        "AdamW's two moments": 8 * count / shards,
        "weights in the products' dtype": copies,
        "activations": float(activations),
        "largest kernel's tensors": float(max(w.bytes for w in single.works if w.op != "adamw")),
    }
