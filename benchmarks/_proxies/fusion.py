"""Cost of a module as torch.compile would run it: its graphs, and a rule that makes kernels."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._models import AUTOCAST, Precision
from .count import Cost, as_on_cuda, distinct_bytes, extent, is_free, is_view, name_of, tensors_in

OPAQUE, POINTWISE, ROWS, COLUMNS = "opaque", "pointwise", "rows", "columns"
REDUCTIONS = frozenset({"sum", "mean", "var", "var_mean", "amax", "amin", "prod", "any", "all"})
# Elementwise, though PyTorch has no such tag on them.
COPIES = frozenset({"cat", "copy", "full", "full_like", "scalar_tensor", "iota", "_to_copy"})


def resolve(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of: a graph's input, or a result of an operator's."""
    while node.op == "call_function" and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if not is_view((source if node.target is operator.getitem else node).target):
            break
        node = source
    return node


def producer(tensor: fx.Node) -> fx.Node:
    """The operator that makes a tensor; of an input, itself."""
    return tensor.all_input_nodes[0] if tensor.target is operator.getitem else tensor


def results(op: fx.Node) -> list[fx.Node]:
    """The tensors that an operator makes, as far as somebody asks for them."""
    return [u for u in op.users if u.target is operator.getitem] or [op]


def kind_of(op: fx.Node) -> str:
    """What `Fusion` takes an operator for."""
    target = op.target
    assert isinstance(target, torch._ops.OpOverload)
    if torch.Tag.pointwise in target.tags or name_of(target) in COPIES:
        return POINTWISE
    if name_of(target) not in REDUCTIONS:
        return OPAQUE
    rank = op.all_input_nodes[0].meta["val"].dim()
    dims: Any = op.args[1] if len(op.args) > 1 else None
    reduced = {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
    kept = rank - len(reduced)
    return ROWS if kept and reduced == set(range(kept, rank)) else COLUMNS


Kernel = set[fx.Node]


class Fusion:
    """Which kernels a compiler would make of an FX graph, by a simple rule.

    1. Products, attention, convolutions, and whatever else is neither pointwise nor a reduction,
       are kernels of their own.
    2. Pointwise operators and reductions over rows (the last dimensions) that are connected make
       one kernel, unless that would make a cycle.
    3. A reduction over anything else (a bias gradient's, over tokens) makes what it sums again
       from tensors that lie in memory. Two share a kernel if one reads nothing that the other
       doesn't; pointwise operators on the results are in it. It is two launches, parts and total,
       as in Inductor; the parts' bytes are not counted.
    4. A kernel reads each tensor from outside once, and writes those that are wanted outside.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.outputs = {resolve(n) for n in graph.output_node().all_input_nodes}
        self.kind: dict[fx.Node, str] = {}
        self.reads: dict[fx.Node, list[fx.Node]] = {}  # views, as the operator sees them
        for n in graph.nodes:
            if isinstance(n.target, torch._ops.OpOverload) and not is_free(n.target):
                self.kind[n], self.reads[n] = kind_of(n), list(n.all_input_nodes)
        self.users = self._users()
        for n in self.kind:
            if self.kind[n] == COLUMNS:
                self.reads[n] = list(self._from_memory(n))
        apart = {n for n in self.kind if self._only_for_columns(n)}
        self.kernel: dict[fx.Node, Kernel] = {n: {n} for n in self.kind if n not in apart}
        for n in self.kernel:
            for source in self._sources(n):
                if self._may_join(n, source):
                    self._merge(source, n)
        self._share_columns()
        self.kernels = list({id(k): k for k in self.kernel.values()}.values())

    def _users(self) -> dict[fx.Node, list[fx.Node]]:
        """By tensor, the operators that read it."""
        users: dict[fx.Node, list[fx.Node]] = {}
        for n, reads in self.reads.items():
            for read in reads:
                users.setdefault(resolve(read), []).append(n)
        return users

    def _from_memory(self, n: fx.Node) -> Iterator[fx.Node]:
        """What a reduction over columns reads, back to tensors that lie in memory anyway."""
        for read in self.reads[n]:
            tensor = resolve(read)
            users = self.users[tensor]
            if (
                self.kind.get(producer(tensor)) != POINTWISE
                or tensor in self.outputs
                or any(self.kind[u] == OPAQUE for u in users)
            ):
                yield read
            else:
                yield from self._from_memory(tensor)

    def _only_for_columns(self, n: fx.Node) -> bool:
        """Whether nothing but reductions over columns, which make it again, reads `n`."""
        if self.kind[n] != POINTWISE or n in self.outputs:
            return False
        users = self.users.get(n, [])
        if any(self.kind[u] == OPAQUE for u in users):
            return False
        return all(self.kind[u] == COLUMNS or self._only_for_columns(u) for u in users)

    def _sources(self, n: fx.Node) -> list[fx.Node]:
        """Operators whose results `n` reads."""
        return [s for s in (producer(resolve(r)) for r in self.reads[n]) if s in self.kernel]

    def _may_join(self, n: fx.Node, source: fx.Node) -> bool:
        ours, theirs = self.kernel[n], self.kernel[source]
        if ours is theirs or OPAQUE in (self.kind[n], self.kind[source]) or self.kind[n] == COLUMNS:
            return False
        summed = any(self.kind[m] == COLUMNS for m in theirs)
        if summed and (self.kind[n] != POINTWISE or elements(n) > elements(source)):
            return False
        if len(ours) > 1 and summed != any(self.kind[m] == COLUMNS for m in ours):
            return False
        return not self._makes_cycle(ours | theirs)

    def _makes_cycle(self, members: Kernel) -> bool:
        """Whether a kernel of these would need, from another, what that needs from it."""
        seen: Kernel = set()
        waiting = [s for m in members for s in self._sources(m) if s not in members]
        while waiting:
            n = waiting.pop()
            if n in members:
                return True
            if n not in seen:
                kernel = self.kernel[n]
                seen |= kernel
                waiting += [s for m in kernel for s in self._sources(m) if s not in kernel]
        return False

    def _merge(self, a: fx.Node, b: fx.Node) -> None:
        ours, theirs = self.kernel[a], self.kernel[b]
        ours |= theirs
        self.kernel.update(dict.fromkeys(theirs, ours))

    def _share_columns(self) -> None:
        """One kernel for sums over the same columns, if one reads nothing but what another does."""
        sums = [n for n in self.kernel if self.kind[n] == COLUMNS]
        for i, a in enumerate(sums):
            for b in sums[:i]:
                ours, theirs = self.kernel[a], self.kernel[b]
                reads, others = ({resolve(r) for r in self.reads[n]} for n in (a, b))
                alike = elements(a) == elements(b) and (reads <= others or others <= reads)
                if ours is not theirs and alike and not self._makes_cycle(ours | theirs):
                    self._merge(a, b)

    def add_to(self, total: Cost, weights: set[fx.Node]) -> None:
        """Add the cost of all kernels; `weights` are those inputs that are parameters."""
        outside: list[dict[fx.Node, list[fx.Node]]] = []  # by kernel, tensors, and views of them
        for kernel in self.kernels:
            tensors: dict[fx.Node, list[fx.Node]] = {}
            for n in kernel:
                for read in self.reads[n]:
                    if producer(resolve(read)) not in kernel:
                        tensors.setdefault(resolve(read), []).append(read)
            outside.append(tensors)
        wanted = self.outputs.union(*outside)
        for kernel, tensors in zip(self.kernels, outside, strict=True):
            kinds, moved = {self.kind[n] for n in kernel}, 0
            for tensor, views in tensors.items():
                # An operator may see a part of a tensor; several may see the same part.
                parts = {extent(v.meta["val"]): nbytes(v) for v in views}
                moved += min(nbytes(tensor), sum(parts.values()))
            made = [t for n in kernel for t in results(n)]
            moved += sum(nbytes(t) for t in made if kinds == {OPAQUE} or t in wanted)
            total.bytes += moved
            total.declared_bytes += moved
            total.launches += 2 if COLUMNS in kinds else 1
            total.weight_casts += kinds == {POINTWISE} and tensors.keys() <= weights


def nbytes(tensor: fx.Node) -> int:
    """Bytes of the distinct elements of a node's value."""
    value = tensor.meta["val"]
    return distinct_bytes(value) if isinstance(value, Tensor) else 0


def elements(op: fx.Node) -> int:
    """Of an operator's largest result."""
    return max((t.numel() for t in tensors_in(op.meta.get("val"))), default=0)


def depends_on(node: fx.Node, on: fx.Node) -> bool:
    """Whether a node's value would be another if `on`'s were."""
    seen, waiting = set(), [node]
    while waiting:
        n = waiting.pop()
        if n is on:
            return True
        if n not in seen:
            seen.add(n)
            waiting += n.all_input_nodes
    return False


def compiled(module: nn.Module, x: Tensor, step: str, precision: Precision = AUTOCAST) -> Cost:
    """As `dispatched`, of what a compiler would make of ``module(x)``: a prediction."""
    # Imported here: they bring Inductor, which takes seconds.
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[fx.Graph] = []
    train = step == "train"
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        with as_on_cuda(precision):
            swap = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(module, swap, (x,))

    def run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return make_boxed_func(gm.forward)

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm.graph)
        return run(gm, example_inputs)

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        halves = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)
        graphs.append(halves[1].graph)  # its compiler may not be called before there is a gradient
        return halves

    decompositions = select_decomp_table()
    function = aot_function(call, keep, run, partition, decompositions)
    with torch.set_grad_enabled(train):
        function(x.detach().requires_grad_(train), *module.parameters())
    total = Cost()
    forward = graphs[-1]
    inputs = forward.find_nodes(op="placeholder")
    parameters = {n.name for n in inputs[1:]}
    for graph in graphs:
        weights = [n for n in graph.find_nodes(op="placeholder") if n.name in parameters]
        Fusion(graph).add_to(total, set(weights))
    if train:
        passed_on: Any = forward.output_node().args[0]  # the result, then what is kept
        kept = {resolve(n) for n in passed_on[1:] if isinstance(n, fx.Node)}
        total.saved_bytes = sum(nbytes(t) for t in kept if depends_on(t, inputs[0]))
    return total
