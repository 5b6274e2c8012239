"""Compile every kernel for cards that aren't here, and judge what the compiler made of it.

The launches come from the ops themselves, run on tensors without memory: nothing about a kernel's
arguments or configs is written down a second time. Triton specialises on dtypes, on arguments that
are None or 1, and on divisibility by 16; those rules, from Triton's own code, are applied here.

What is covered: every kernel of the "vit" samples in bfloat16 and float32 (with and without TF32),
at every alignment they have; and, of the "tiny" samples and of float16, every launch config that
has not been seen by then. float16 and bfloat16 differ in the names of a few instructions only.
"""

import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vitkern.kernels._launch import Launch, cdiv
from vitkern.kernels._op import Op, dtype_name

from ._cases import Case, cases, columns, kernel_name, launches, save

Row = dict[str, Any]


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has for the blocks that are on it at a time; all have 65,536 registers.

    The numbers are those of the table "Technical Specifications per Compute Capability" in the CUDA
    C++ Programming Guide; how they are handed out, those of cuda_occupancy.h in the CUDA Toolkit.
    """

    shared_bytes: int
    warps: int
    blocks: int

    @property
    def shared_limit(self) -> int:
        """Shared memory that one block may use: 1 KiB of each block's is the system's."""
        return self.shared_bytes - 1024

    def resident(self, warps: int, registers: int, shared_bytes: int) -> int:
        """How many blocks of so many warps fit, with these registers a thread and shared bytes.

        A warp gets its registers, in units of 256, from one of four quarters, so what is over in
        one can't be joined with what is over in another. Shared memory comes in units of 128 bytes.
        """
        in_a_quarter = 65_536 // 4 // (256 * cdiv(32 * registers, 256))
        of_shared = self.shared_bytes // (128 * cdiv(shared_bytes + 1024, 128))
        return min(self.blocks, self.warps // warps, 4 * in_a_quarter // warps, of_shared)


MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10, 64, 32),
    86: Multiprocessor(100 << 10, 48, 16),
    89: Multiprocessor(100 << 10, 48, 24),
    90: Multiprocessor(228 << 10, 64, 32),
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile, and the first case that launches it."""

    op: str
    size: str
    sample: str
    dtype: str
    arch: int
    launch: Launch
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]

    @property
    def key(self) -> str:
        """Equal for launches that Triton would compile once."""
        return f"{self.config_key} {self.signature} {sorted(self.attrs.items())}"

    @property
    def config_key(self) -> str:
        """Equal for launches that differ in dtypes and alignment only."""
        named = [v for k, v in sorted(self.constexprs.items()) if self._declared_constexpr(k)]
        absent = [k for k, v in sorted(self.constexprs.items()) if v is None]
        values = str(named).replace("fp16", "bf16")
        launch = self.launch
        name, options = launch.kernel.fn.__qualname__, (launch.num_warps, launch.num_stages)
        return f"{name} {self.arch} {values} {absent} {options}"

    def _declared_constexpr(self, path: tuple[int, ...]) -> bool:
        return self.launch.kernel.params[path[0]].is_constexpr

    @property
    def blocks(self) -> str:
        """Sizes of the tile."""
        constexprs = self.launch.constexprs.items()
        named = [f"{k}={v}" for k, v in constexprs if k.startswith(("BLOCK", "ROWS"))]
        return " ".join(named).replace("BLOCK_", "")

    @property
    def config(self) -> str:
        """All that is chosen at compile time."""
        named = [f"{k}={v}" for k, v in self.launch.constexprs.items()]
        return " ".join(
            [*named, f"warps={self.launch.num_warps}", f"stages={self.launch.num_stages}"]
        )


@cache
def _backend(arch: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", arch, 32))


@cache
def _binder(kernel: Any, arch: int) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, _backend(arch))


def _options(launch: Launch) -> dict[str, Any]:
    return {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,  # as `Launch.run` sets it
        "debug": False,
    }


def make_job(case: Case, launch: Launch, arch: int) -> Job:
    """`launch` as Triton's JIT would specialise it for a card of `arch` (Triton 3.4 and later)."""
    from triton._utils import find_paths_if, get_iterable_path

    backend = _backend(arch)
    bound, specialised, _ = _binder(launch.kernel, arch)(
        *launch.args, **launch.constexprs, **_options(launch)
    )
    kinds = [kind for kind, _ in specialised]
    hints = ["" if kind == "constexpr" else hint for kind, hint in specialised]
    values = list(bound.values())
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    hinted = find_paths_if(hints, lambda _, hint: isinstance(hint, str))
    return Job(
        op=case.op.name,
        size=case.size,
        sample=case.sample.label,
        dtype=dtype_name(case.dtype),
        arch=arch,
        launch=launch,
        signature=dict(zip([p.name for p in launch.kernel.params], kinds, strict=True)),
        constexprs={path: get_iterable_path(values, path) for path in constants},
        attrs={path: backend.parse_attr(get_iterable_path(hints, path)) for path in hinted},
    )


def collect(
    ops: Iterable[Op],
    archs: Sequence[int],
    sizes: Sequence[str] = ("vit", "tiny"),
    everything: bool = False,
) -> tuple[list[Job], list[str]]:
    """(jobs to compile, cases whose launcher failed)."""
    ops = list(ops)
    exact: dict[str, Job] = {}
    failed: list[str] = []
    precision = torch.get_float32_matmul_precision()
    try:
        for arch, case in itertools.product(archs, cases(ops, sizes)):
            for setting in ("highest", "high") if case.dtype == torch.float32 else (precision,):
                torch.set_float32_matmul_precision(setting)
                try:
                    found = launches(case, divmod(arch, 10))
                except Exception as error:
                    failed.append(f"{case} sm_{arch}: the launcher failed: {error!r}")
                    continue
                for job in (make_job(case, launch, arch) for launch in found):
                    exact.setdefault(job.key, job)
    finally:
        torch.set_float32_matmul_precision(precision)
    if everything:
        return list(exact.values()), failed
    # dicts keep order, and cases come "vit" first, bfloat16 first.
    chosen: list[Job] = []
    configs: set[str] = set()
    for job in exact.values():
        if (job.size == "vit" and job.dtype != "float16") or job.config_key not in configs:
            chosen.append(job)
            configs.add(job.config_key)
    return chosen, failed


def find_dots(ttir: str) -> list[Row]:
    """The matrix products in Triton's IR: tile, operand type, precision."""
    dots = []
    for line in ttir.splitlines():
        found = re.search(r"tt\.dot .*: tensor<([\dx]+)x(\w+)> \* tensor<([\dx]+)x\w+>", line)
        if not found:
            continue
        precision = re.search(r"inputPrecision = (\w+)", line)
        m, k = map(int, found[1].split("x")[-2:])
        n = int(found[3].split("x")[-1])
        dots.append(
            {
                "m": m,
                "n": n,
                "k": k,
                "operand": found[2],
                "precision": precision[1] if precision else "ieee",
            }
        )
    return dots


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else name


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _disassembly(cubin: str) -> Counter[str]:
    """How often each instruction occurs, by its name up to the first dot."""
    sass = _run(_tool("nvdisasm"), "-c", cubin)
    return Counter(
        re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9]+)", sass, re.M)
    )


def compile_job(job: Job) -> Row:
    """Compile one kernel and describe the result; "error" instead where it doesn't compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row: Row = {
        "op": job.op,
        "kernel": kernel_name(job.launch),
        "arch": job.arch,
        "sample": job.sample,
        "dtype": job.dtype,
        "config": job.config,
        "blocks": job.blocks,
        "num_warps": job.launch.num_warps,
        "num_stages": job.launch.num_stages,
    }
    try:
        compiled = triton.compile(
            ASTSource(job.launch.kernel, job.signature, job.constexprs, job.attrs),
            target=GPUTarget("cuda", job.arch, 32),
            options=_backend(job.arch).parse_options(_options(job.launch)).__dict__,
        )
        dots = find_dots(compiled.asm["ttir"])
        descriptors = "tt.descriptor_load" in compiled.asm["ttir"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = _run(_tool("cuobjdump"), "-res-usage", cubin.name)
            numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
            # Without a stack there is no local memory, without a product no tensor core: the
            # disassembler, half of the time that all this takes, has nothing to tell then.
            counts = Counter[str]()
            if numbers["STACK"] or numbers["LOCAL"] or dots or descriptors:
                counts = _disassembly(cubin.name)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {str(error).strip()[-500:]}"}
    loads, stores = counts["LDL"], counts["STL"]
    warps, shared = job.launch.num_warps, int(compiled.metadata.shared)
    processor = MULTIPROCESSORS[job.arch]
    resident = processor.resident(warps, numbers["REG"], shared)
    return {
        **row,
        "registers": numbers["REG"],
        # A stack frame that no instruction reads or writes is padding, not a spill.
        "spill_bytes": numbers["STACK"] + numbers["LOCAL"] if loads + stores else 0,
        "stack_bytes": numbers["STACK"],
        "local_loads": loads,
        "local_stores": stores,
        "shared_bytes": shared,
        "blocks_per_sm": resident,
        "occupancy_percent": 100 * resident * warps // processor.warps,
        "tensor_core": {k: v for k, v in sorted(counts.items()) if k in ("HMMA", "HGMMA")},
        "dots": [dict(d) for d in {tuple(d.items()): None for d in dots}],
        # Of kernels that load by tensor descriptors: the instructions that do.
        **({"tma_loads": counts["UTMALDG"]} if descriptors else {}),
    }


def judge(row: Row) -> list[str]:
    """What is wrong with one compiled kernel; empty where nothing is.

    A matrix product must run on tensor cores, unless its operands are float32 in IEEE precision,
    which those can't do. From sm_90 on, a tile of 64 rows or more and a whole warp group must use
    the warp-group instruction (HGMMA); a smaller tile legitimately runs on HMMA. Loads by tensor
    descriptors must use the instruction made for them.
    """
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    problems = []
    arch = row["arch"]
    if row["spill_bytes"]:
        problems.append(
            f"spills {row['spill_bytes']} bytes a thread "
            f"({row['local_stores']} stores, {row['local_loads']} loads)"
        )
    limit = MULTIPROCESSORS[arch].shared_limit
    if row["shared_bytes"] > limit:
        problems.append(f"shared memory {row['shared_bytes']:,} bytes, sm_{arch} has {limit:,}")
    products = [d for d in row["dots"] if (d["operand"], d["precision"]) != ("f32", "ieee")]
    if products and not row["tensor_core"]:
        problems.append("a matrix product without tensor-core instructions")
    elif arch >= 90 and row["num_warps"] >= 4 and "HGMMA" not in row["tensor_core"]:
        big = [d for d in products if d["m"] >= 64]
        if big:
            problems.append(f"tile of {big[0]['m']} rows without HGMMA: {row['tensor_core']}")
    if row.get("tma_loads") == 0:
        problems.append("loads by tensor descriptors without UTMALDG")
    return problems


_jobs: list[Job] = []


def _compile_nth(n: int) -> Row:
    return compile_job(_jobs[n])


def compile_all(jobs: list[Job], processes: int) -> list[Row]:
    """Rows of all jobs, in order, with a progress line on stderr."""
    global _jobs
    _jobs = jobs
    rows: dict[int, Row] = {}
    start = time.perf_counter()
    # Forked, since a job holds functions that can't be pickled; the parent has compiled nothing
    # yet, so there are no compiler threads to lose.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for n, row in enumerate(pool.imap(_compile_nth, range(len(jobs))), 1):
            rows[n - 1] = row
            elapsed = time.perf_counter() - start
            end = "\n" if n == len(jobs) or not sys.stderr.isatty() else "\r"
            if sys.stderr.isatty() or n % 25 == 0 or n == len(jobs):
                print(f"compiled {n}/{len(jobs)} in {elapsed:.0f} s", end=end, file=sys.stderr)
    return [rows[n] for n in range(len(jobs))]


def table(rows: list[Row], verbose: bool) -> str:
    """One line a kernel and architecture, with its extremes; one a compilation if `verbose`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for n, row in enumerate(rows):
        groups.setdefault((row["kernel"], row["arch"], n if verbose else 0), []).append(row)
    head = (
        "kernel", "arch", "n", "registers", "spill", "shared", "blocks/SM", "tensor core", "config",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for (name, arch, _), group in sorted(groups.items()):
        done = [row for row in group if "error" not in row]
        cores = sorted({k for row in done for k in row["tensor_core"]})
        configs = {f"{row['dtype']} {row['config']}" for row in group}
        counts = [f"{k} {_span([row['tensor_core'].get(k, 0) for row in done])}" for k in cores]
        lines.append(
            (
                name,
                f"sm_{arch}",
                str(len(group)),
                _span([row["registers"] for row in done]),
                _span([row["spill_bytes"] for row in done]),
                _span([row["shared_bytes"] for row in done]),
                f"{_span([row['blocks_per_sm'] for row in done])} "
                f"({_span([row['occupancy_percent'] for row in done])}%)",
                " ".join(counts) or "-",
                configs.pop() if len(configs) == 1 else f"{len(configs)} configs",
            )
        )
    return columns(lines)


def _span(values: list[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def markdown(rows: list[Row], triton_version: str, command: str) -> str:
    """A page with a table a kernel, one line a compilation."""
    parts = [
        "# What the compiler makes of each kernel\n",
        f"Triton {triton_version}, `{command}`.\n",
        "No GPU took part: this is what the compiler says, not a measurement. Spills and shared "
        "memory are in bytes, a thread and a block. Blocks per multiprocessor (SM) and occupancy, "
        "the share of its warps that they fill, follow from registers, shared memory and warps. "
        "What several samples share is compiled once, and stands under the first of them. "
        "The last column counts tensor-core instructions in the code, not their executions.\n",
    ]
    head = (
        "op", "sample", "dtype", "sm", "blocks", "warps", "stages", "registers", "spill", "shared",
        "blocks/SM", "occupancy", "tensor cores",
    )  # fmt: skip
    kernels: dict[str, list[Row]] = {}
    for row in sorted(rows, key=_order):
        kernels.setdefault(row["kernel"], []).append(row)
    for kernel, compilations in kernels.items():
        lines = [head, *map(_cells, compilations)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        table = [
            " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        parts.append(f"## {kernel}\n\n" + "\n".join(f"| {line} |" for line in table) + "\n")
    return "\n".join(parts)


def _order(row: Row) -> tuple[Any, ...]:
    """By kernel, op, sample (N=197 before N=1370), dtype and card."""
    sample = [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", row["sample"])]
    return row["kernel"], row["op"], sample, row["dtype"], row["arch"], row["config"]


def _cells(row: Row) -> tuple[str, ...]:
    config = (row["blocks"] or "-", str(row["num_warps"]), str(row["num_stages"]))
    if "error" in row:
        start = (row["op"], row["sample"], row["dtype"], str(row["arch"]), *config)
        return (*start, *("-",) * 5, "does not compile")
    # float32 is compiled once for each of torch's two ways to multiply it.
    precision = {f" {d['precision']}" for d in row["dots"] if d["operand"] == "f32"}
    return (
        row["op"],
        row["sample"],
        row["dtype"] + "".join(sorted(precision)),
        str(row["arch"]),
        *config,
        str(row["registers"]),
        str(row["spill_bytes"]),
        f"{row['shared_bytes']:,}",
        str(row["blocks_per_sm"]),
        f"{row['occupancy_percent']} %",
        " ".join(f"{n} {name}" for name, n in row["tensor_core"].items()) or "-",
    )


def main(
    archs: Sequence[int],
    ops: list[Op],
    json_path: Path | None = None,
    processes: int = 2,
    sizes: Sequence[str] = ("vit", "tiny"),
    everything: bool = False,
    verbose: bool = False,
    markdown_path: Path | None = None,
    command: str = "",
) -> int:
    """Compile, print, write the files asked for; 1 where a kernel fails the judge."""
    import triton

    for arch in archs:
        if arch not in MULTIPROCESSORS:
            known = ", ".join(map(str, MULTIPROCESSORS))
            raise ValueError(f"--arch: {arch} is not known; expected some of {known}")
    jobs, offenders = collect(ops, archs, sizes, everything)
    rows = compile_all(jobs, processes)
    print(table(rows, verbose))
    for row in rows:
        row["problems"] = judge(row)
        where = f"{row['kernel']} sm_{row['arch']} {row['dtype']} ({row['config']})"
        offenders += [f"{where}, from {row['op']} [{row['sample']}]: {p}" for p in row["problems"]]
    if json_path is not None:
        report = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        save(json_path, json.dumps(report, indent=1) + "\n")
    if markdown_path is not None:
        save(markdown_path, markdown(rows, triton.__version__, command))
    kernels = len({row["kernel"] for row in rows})
    print(f"\n{len(rows)} compilations of {kernels} kernels, {len(offenders)} problems")
    for offender in offenders:
        print(f"  FAIL {offender}")
    return 1 if offenders else 0
