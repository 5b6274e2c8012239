"""Cards: what their datasheets say, what is achievable of it, and what joins them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

COMPUTE, COPY, LINK = 0.81, 0.9, 0.8  # achievable over datasheet, where nothing was measured


class Rates(NamedTuple):
    """FLOP/s of dense matrix products; None where unknown. float16 goes as fast as bfloat16."""

    bfloat16: float | None = None
    tf32: float | None = None
    float32: float | None = None

    def times(self, factor: float) -> "Rates":
        """All of them times `factor`."""
        return Rates(*(None if rate is None else rate * factor for rate in self))


@dataclass(frozen=True)
class Machine:
    """A card: by datasheet, what is achievable of it, and what joins it to others.

    device: the name that PyTorch gives the card. Rates in FLOP/s, dense; bytes_per_s of device
    memory, read plus written; memory in bytes. Links: bytes/s that one GPU sends, while it receives
    as many, within a node and to other nodes.
    """

    name: str
    device: str
    peak: Rates
    peak_bytes_per_s: float
    flops_per_s: Rates
    bytes_per_s: float
    memory: float
    node_link: float
    network: float

    @classmethod
    def measured(
        cls,
        name: str,
        flops_per_s: Mapping[str, float] | float,
        bytes_per_s: float,
        like: str | None = None,
    ) -> "Machine":
        """A card whose ceilings were measured.

        Args:
            name: of your own, or the card's as PyTorch gives it: datasheet, memory and links are
                then taken from MACHINES, if the card is there.
            flops_per_s: by dtype ("bfloat16", "tf32", "float32"), or that of bfloat16 alone.
            bytes_per_s: of a large copy, read plus written.
            like: the name in MACHINES of the card whose datasheet, memory and links to take.
                Without any, peaks are the measured ones, memory and links unlimited.

        Raises:
            ValueError: an unknown `like`, an unknown dtype, or a rate that is not positive.
        """
        rates = flops_per_s if isinstance(flops_per_s, Mapping) else {"bfloat16": flops_per_s}
        if unknown := set(rates) - {*Rates._fields, "float16"}:
            expected = ", ".join(Rates._fields)
            raise ValueError(f"flops_per_s names {', '.join(sorted(unknown))}; expected {expected}")
        for value in (*rates.values(), bytes_per_s):
            if not value > 0:
                raise ValueError(f"flops_per_s and bytes_per_s must be positive, got {value!r}")
        known = {name: rate for name, rate in rates.items() if name != "float16"}
        if "float16" in rates:
            known.setdefault("bfloat16", rates["float16"])
        own = Rates(**known)
        base = next((m for m in MACHINES.values() if name in (m.name, m.device)), None)
        base = base if like is None else card(like)
        if base is None:
            inf = float("inf")
            return cls(name, name, own, bytes_per_s, own, bytes_per_s, inf, inf, inf)
        return replace(base, name=name, flops_per_s=own, bytes_per_s=bytes_per_s)

    def rate(self, dtype: str, peak: bool = False) -> float:
        """Achievable FLOP/s (or the datasheet's) of products in "bfloat16", "tf32" or "float32".

        Raises:
            ValueError: the machine has none for this dtype.
        """
        rate: float | None = getattr(self.peak if peak else self.flops_per_s, dtype)
        if rate is None:
            raise ValueError(f"machine {self.name} has no rate of {dtype} products")
        return rate


def _datasheet(
    name: str,
    device: str,
    peak: Rates,
    bandwidth: float,
    memory: float,
    node_link: float,
    network: float,
    measured: tuple[float, float] | None = None,
) -> Machine:
    """`bandwidth` in TB/s, `memory` in GB, links in GB/s; `measured` are TFLOP/s bf16 and TB/s."""
    peak, tera = peak.times(1e12), 1e12
    assert peak.bfloat16 is not None
    flops, copy = measured or (COMPUTE * peak.bfloat16 / tera, COPY * bandwidth)
    rates = peak.times(flops * tera / peak.bfloat16)
    links = (LINK * node_link * 1e9, LINK * network * 1e9)
    return Machine(
        name, device, peak, bandwidth * tera, rates, copy * tera, memory * 1e9, *links
    )  # fmt: skip


# Peaks are NVIDIA's datasheets', without sparsity (they print twice that): "H100 Tensor Core GPU",
# "A100 Tensor Core GPU" (80 GB), "H200 Tensor Core GPU", "DGX B200" (an eighth of it), "A10 Tensor
# Core GPU", "L4 Tensor Core GPU", and the white paper "Ada GPU Architecture" (float32
# accumulation). Node links, one direction: half of NVLink's 900, 600, 900 and 1,800 GB/s; of PCIe
# 4.0 x16, 32 GB/s. Network, a GPU: the adapter of 400 Gb/s (A100: 200) that it has to itself in DGX
# H100, A100, H200 and B200; for the others, an assumption: 100 Gb/s for a host of eight.
MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        _datasheet("H100", "NVIDIA H100 80GB HBM3", Rates(989.4, 494.7, 66.9), 3.35, 80, 450, 50,
                   measured=(800, 3.0)),
        _datasheet("A100", "NVIDIA A100-SXM4-80GB", Rates(312, 156, 19.5), 2.039, 80, 300, 25,
                   measured=(271, 1.8)),
        _datasheet("H200", "NVIDIA H200", Rates(989.4, 494.7, 66.9), 4.8, 141, 450, 50),
        _datasheet("B200", "NVIDIA B200", Rates(2250, 1125, 75), 8.0, 180, 900, 50),
        _datasheet("A10", "NVIDIA A10", Rates(125, 62.5, 31.2), 0.6, 24, 32, 1.5625),
        _datasheet("L4", "NVIDIA L4", Rates(121, 60.5, 30.3), 0.3, 24, 32, 1.5625),
        _datasheet("RTX 4090", "NVIDIA GeForce RTX 4090", Rates(165.2, 82.6, 82.6), 1.008, 24, 32,
                   1.5625),
    )
}  # fmt: skip


def card(name: str) -> Machine:
    """The card of this name in MACHINES (case and spaces don't matter), or of PyTorch's name.

    Raises:
        ValueError: an unknown name; the text lists the known ones.
    """
    for m in MACHINES.values():
        if _plain(name) in (_plain(m.name), _plain(m.device)):
            return m
    raise ValueError(f"unknown GPU {name!r}; expected one of {', '.join(MACHINES)}")


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "")
