"""capture(): buckets, padding, splitting, falling back, on a recording backend; and on a GPU."""

import contextlib
import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.error_budget import assert_within_budget
from vitkern import CapturedModel, ViT, capture, fold
from vitkern.capture import CudaGraphs, Graph
from vitkern.fold import FoldedViT


class Recorder:
    """A backend that runs the model again where a graph would be replayed, on the same buffers."""

    def __init__(self, fail_at: int = 0) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []
        self.resets = 0
        self.fail_at = fail_at
        self.inside = False
        self.turns = 0

    def problem(self, device: torch.device) -> str | None:
        return None

    def capturing(self) -> bool:
        return self.inside

    def reset(self, device: torch.device) -> None:
        self.resets += 1

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        output = run().clone()
        if len(output) == self.fail_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured.append(len(output))

        def replay() -> None:
            assert self.turns == 1, "the buffers are in nobody's turn"
            self.replayed.append(len(output))
            output.copy_(run())

        return replay, output

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield
        self.turns -= 1


def vit(**arguments: Any) -> ViT:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return ViT(**{**small, "num_classes": 7, "init_values": 0.1, **arguments}).eval()


def images(batch: int, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 16, 16, generator=generator).to(device)


def record(
    model: nn.Module,
    batch_sizes: Iterable[int] | None = (2, 4),
    example: Tensor | None = None,
    **options: Any,
) -> tuple[CapturedModel, Recorder]:
    backend = Recorder(options.pop("fail_at", 0))
    example = images(4) if example is None else example
    return CapturedModel(
        model, example, batch_sizes=batch_sizes, backend=backend, **options
    ), backend


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])]
)
def test_powers_of_two_up_to_the_example_largest_first(batch: int, sizes: list[int]) -> None:
    captured, backend = record(vit(), None, images(batch))
    assert list(captured.batch_sizes) == sizes
    assert backend.captured == sizes[::-1]


def test_batch_sizes_of_ones_own() -> None:
    captured, backend = record(vit(), [8, 3, 3], images(1))
    assert captured.batch_sizes == (3, 8)
    assert backend.captured == [8, 3]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("batch", "graphs"),
    [(1, [2]), (2, [2]), (3, [4]), (4, [4]), (5, [4, 2]), (7, [4, 4]), (10, [4, 4, 2])],
)
def test_pads_to_the_next_graph_and_splits_over_the_largest(
    batch: int, graphs: list[int], fold: bool
) -> None:
    model = vit()
    captured, backend = record(model, fold=fold)
    x = images(batch, seed=1)
    close(captured(x), model(x))
    assert backend.replayed == graphs
    assert (captured.served is model) is not fold
    for size in set(graphs):
        assert f"graph of batch {size}: {graphs.count(size)} x" in captured.explain()


def test_rows_left_over_from_an_earlier_call_change_nothing() -> None:
    model = vit()
    captured, _ = record(model)
    captured(torch.full_like(images(4), torch.nan))
    close(captured(images(3, seed=1)), model(images(3, seed=1)))


def test_results_are_ones_own_unless_a_view_is_asked_for() -> None:
    model = vit()
    captured, _ = record(model)
    first = captured(images(3, seed=1))
    view = captured(images(3, seed=2), copy=False)
    close(view, model(images(3, seed=2)))
    captured(images(4, seed=3))
    close(first, model(images(3, seed=1)))
    close(view, model(images(4, seed=3))[:3])
    split = captured(images(6, seed=4), copy=False)
    captured(images(4, seed=5))
    close(split, model(images(6, seed=4)))
    assert not any(t.requires_grad for t in (first, view, split))


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 16, 16, 3)], ids=["NCHW", "NHWC"])
def test_bytes(shape: tuple[int, ...]) -> None:
    model = vit()
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    captured, backend = record(model, example=pixels)
    close(captured(pixels[:3]), model(pixels[:3]))
    assert backend.replayed == [4]
    assert "uint8 [B, " in repr(captured)


def test_the_buffer_has_the_layout_of_the_example() -> None:
    seen: list[bool] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.mean((2, 3))

    record(Look().eval(), example=images(4).contiguous(memory_format=torch.channels_last))
    record(Look().eval(), example=images(4).expand(4, -1, -1, -1))
    assert seen == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (images(2).double(), "images of another dtype"),
        (images(2)[:, :, :8], "images of another shape"),
        (images(2).to("meta"), "images on another device"),
        (images(2).requires_grad_(), "images that require a gradient"),
        (images(0), "no images"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_fits_no_graph_goes_to_the_model(x: Tensor, reason: str) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((1, 2, 3))

    captured, backend = record(Sum().eval())
    out = captured(x)
    assert (out.shape, out.dtype, out.device) == (x.shape[:1], x.dtype, x.device)
    assert out.requires_grad == x.requires_grad
    assert not backend.replayed
    assert captured.explain().splitlines()[1:] == [f"direct: {reason}: 1 x"]
    with torch.no_grad():
        captured(images(2).requires_grad_())
    assert backend.replayed == [2]


def test_what_the_model_says_of_a_wrong_image_is_heard() -> None:
    captured, _ = record(vit())
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 16, 16\], got \[2, 3, 16, 8\]"):
        captured(images(2)[..., :8])


def test_training_mode_and_foreign_captures_go_to_the_model() -> None:
    model = vit(drop_rate=0.5)
    captured, backend = record(model)
    model.train()
    assert captured(images(2)).requires_grad
    model.eval()
    backend.inside = True
    assert torch.equal(captured(images(2)), model(images(2)))
    assert not backend.replayed
    assert "direct: the model is in training mode: 1 x" in captured.explain()
    assert "direct: inside another capture: 1 x" in captured.explain()


def test_autocast_is_captured() -> None:
    model = vit()
    x = images(3, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured, backend = record(model)
        assert torch.equal(captured(x), fold(model, head=True)(x))
    dtypes = {m.weight.dtype for m in captured.served.modules() if isinstance(m, nn.Linear)}
    assert dtypes == {torch.bfloat16}  # cast once, not in each replay
    assert backend.replayed == [4]
    assert "autocast to bfloat16" in repr(captured)
    assert torch.equal(captured(x), model(x))
    assert "direct: another autocast: 1 x" in captured.explain()
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(captured(x), model(x))
    assert len(backend.replayed) == 1


def test_autocast_leaves_no_cast_weights_behind() -> None:
    model = vit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured, _ = record(model, fold=False)
        with torch.no_grad():
            model.head.weight.mul_(2)
        close(captured(images(2)), model(images(2)))


@pytest.mark.parametrize("fold", [True, False])
def test_weights_changed_in_place_count_from_the_next_call(fold: bool) -> None:
    model = vit()
    captured, backend = record(model, fold=fold)
    before = captured(images(2))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    close(captured(images(2)), model(images(2)))
    assert not torch.equal(captured(images(2)), before)
    assert backend.resets == 1 + fold
    assert backend.replayed == [2, 2, 2]


def replace_parameter(model: Any) -> None:
    model.blocks[1].mlp.fc2.weight = nn.Parameter(torch.randn(32, 128))


def replace_module(model: Any) -> None:
    model.head = nn.Linear(32, 5)


def add_parameter(model: Any) -> None:
    model.blocks[1].attn.qkv.bias = nn.Parameter(torch.randn(96))


def assign_state_dict(model: Any) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def swap_data(model: Any) -> None:
    model.head.weight.data = torch.randn(7, 32)


def move(model: Any) -> None:
    model.double().float()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    "change",
    [replace_parameter, add_parameter, replace_module, assign_state_dict, swap_data, move],
)
def test_replaced_weights_are_captured_anew(change: Callable[[Any], None], fold: bool) -> None:
    model = vit(qkv_bias=False)
    captured, backend = record(model, fold=fold)
    change(model)
    for _ in range(2):
        close(captured(images(2)), model(images(2)))
    assert backend.resets == 2
    assert backend.captured == [4, 2, 4, 2]


def test_refresh_sees_what_a_call_cannot() -> None:
    model = vit()
    captured, _ = record(model)
    model.head.weight.data.mul_(2)
    captured.refresh()
    close(captured(images(2)), model(images(2)))


def test_a_failed_capture_warns_once_and_runs_the_model() -> None:
    model = vit()
    with pytest.warns(RuntimeWarning, match="without graphs: capture failed: RuntimeError: oper"):
        captured, backend = record(model, fail_at=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(captured(images(4)), model(images(4)))
    assert not backend.replayed
    assert "no graphs: capture failed" in repr(captured)
    assert "not permitted when stream is capturing: 2 x" in captured.explain()
    backend.fail_at = 0
    captured.refresh()
    close(captured(images(4)), model(images(4)))
    assert backend.replayed == [4]


def test_on_a_cpu_the_model_is_called() -> None:
    model = vit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = capture(model, images(4))
    assert captured.served is model  # no second copy of the weights for nothing
    for batch in (1, 3, 9):
        assert torch.equal(captured(images(batch)), model(images(batch)))
    assert "no graphs: the example is on cpu, not on a GPU" in repr(captured)
    assert captured.explain().endswith("direct: the example is on cpu, not on a GPU: 3 x")


def test_inference_mode_inside_and_outside() -> None:
    model = vit()
    with torch.inference_mode():
        captured, backend = record(model)
        inside = captured(images(2, seed=1))
    outside = captured(images(2, seed=1))
    assert not inside.is_inference()
    assert torch.equal(inside, outside)
    with torch.inference_mode():
        assert torch.equal(captured(images(2, seed=1)), outside)
        model = vit()  # of tensors that don't count their changes
        close(record(model)[0](images(2)), model(images(2)))
    assert backend.replayed == [2, 2, 2]


def test_threads_take_turns() -> None:
    model = vit()
    captured, backend = record(model)
    inputs = [images(1 + i % 6, seed=i) for i in range(40)]
    outputs: list[Tensor] = [torch.empty(0)] * len(inputs)

    def work(first: int) -> None:
        for i in range(first, len(inputs), 4):
            outputs[i] = captured(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, out in zip(inputs, outputs, strict=True):
        close(out, model(x))
    assert len(backend.replayed) == sum(-(-len(x) // 4) for x in inputs)


def test_any_module_of_one_output() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).eval()
    captured, _ = record(model)
    assert captured.served is model
    close(captured(images(3)), model(images(3)))


@pytest.mark.parametrize(
    "kind",
    [
        {"rel_pos": "mlp", "shared_rel_pos": True, "pos_embed": "none"},
        {"rel_pos": "bias"},
        {"block_fn": "diff_parallel_scaling"},
        {"distilled": True},
        {"embed_layer": ("resnetv2", ()), "patch_size": 2},
    ],
    ids=str,
)
def test_other_kinds_of_networks(kind: dict[str, Any]) -> None:
    model = vit(**kind)
    captured, _ = record(model)
    assert type(captured.served) is FoldedViT
    close(captured(images(3)), model(images(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    close(captured(images(3)), model(images(3)))


def test_a_subclass_is_folded_unless_it_computes_something_else() -> None:
    class Other(ViT):
        """The name alone."""

    model = vit()
    model.__class__ = Other
    assert type(record(model)[0].served) is FoldedViT
    folded = fold(model)
    assert record(folded)[0].served is folded
    Other.pool = lambda self, x, pool_type=None: x[:, 1]  # type: ignore[method-assign]
    captured, _ = record(model)
    assert captured.served is model
    close(captured(images(3)), model(images(3)))


def test_the_model_keeps_no_trace() -> None:
    model = vit()
    captured, _ = record(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images(2)), model(images(2)))
    assert model.head.weight.requires_grad
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="CapturedModel can't be copied or pickled"):
            attempt(captured)


def test_errors_name_the_argument() -> None:
    model = vit()
    with pytest.raises(ValueError, match=r"model must be in evaluation mode"):
        capture(vit().train(), images(1))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        capture(lambda x: x, images(1))
    with pytest.raises(TypeError, match="example must be a tensor of images, got list"):
        capture(model, [1])
    for example in (images(0), torch.ones(4)):
        with pytest.raises(ValueError, match=r"example must be \[B, \.\.\.\] with B > 0, got \["):
            capture(model, example)
    for wrong in ([], [0], [-1, 2]):
        with pytest.raises(ValueError, match="batch_sizes must be one or more positive integers"):
            capture(model, images(1), batch_sizes=wrong)
    for kind in (2.5, ["2"], 4):
        with pytest.raises(TypeError, match="batch_sizes must be one or more positive integers"):
            capture(model, images(1), batch_sizes=kind)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 16, 16\], got \[4, 3, 8, 8\]"):
        record(model, example=images(4)[..., :8, :8])


@pytest.mark.parametrize("result", [lambda x: (x, x), lambda x: x.sum(), lambda x: x[:1]])
def test_one_output_with_the_batch_first(result: Callable[[Tensor], Any]) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return result(x)

    with pytest.raises(TypeError, match=r"model must return one tensor \[B, \.\.\.\]"):
        record(Odd().eval())


def test_cuda_is_asked_for_the_right_things_in_the_right_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    signature = inspect.signature(torch.cuda.graph.__init__)

    class Named:
        """A stream, event, graph or pool that writes down what is done with it."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, method: str) -> Callable[..., None]:
            return lambda *args: log.append(" ".join([self.name, method, *(a.name for a in args)]))

    @contextlib.contextmanager
    def inside(what: Any) -> Iterator[None]:
        log.append(f"enter {getattr(what, 'name', what)}")
        yield
        log.append(f"leave {getattr(what, 'name', what)}")

    def graph(*args: Any, **options: Any) -> Any:
        given = signature.bind(None, *args, **options).arguments
        names = [given[name].name for name in ("cuda_graph", "pool", "stream")]
        return inside(" ".join([*names, given["capture_error_mode"]]))

    def synchronize() -> None:
        log.append("synchronize")

    for name, fake in {
        "device": inside,
        "stream": inside,
        "graph": graph,
        "synchronize": synchronize,
        "graph_pool_handle": lambda: Named("pool"),
        "Stream": lambda: Named("side"),
        "Event": lambda: Named("event"),
        "CUDAGraph": lambda: Named("graph"),
        "current_stream": lambda: Named("current"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def run() -> Tensor:
        log.append("run")
        return torch.ones(1)

    backend, device = CudaGraphs(), torch.device("cuda", 1)
    assert backend.problem(device) is None
    backend.reset(device)
    replay, output = backend.capture(run)
    with backend.turn():
        replay()
    assert output.item() == 1
    around = ["enter cuda:1", "leave cuda:1"]
    assert log == [
        *(around[0], "synchronize", around[1]),
        *(around[0], "side wait_stream current", "enter side", "run", "run", "leave side"),
        *("enter graph pool side thread_local", "run", "leave graph pool side thread_local"),
        *("current wait_stream side", around[1]),
        *(around[0], "event wait", "graph replay", "event record", around[1]),
    ]


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_graphs_are_as_right_as_the_model(dtype: torch.dtype, fold: bool) -> None:
    model = vit().to("cuda", dtype)
    captured = capture(model, images(8, device="cuda").to(dtype), fold=fold)
    assert captured.problem is None
    for batch in (1, 3, 8, 19):
        x = images(batch, seed=batch, device="cuda").to(dtype)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            assert_within_budget(["logits"], [captured(x)], [model(x)], [exact])
    assert "direct" not in captured.explain()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 16, 16, 3)], ids=["NCHW", "NHWC"])
def test_graphs_of_bytes_under_autocast(shape: tuple[int, ...]) -> None:
    model = vit().cuda()
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(pixels)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            captured = capture(model, pixels)
            actual, eager = captured(pixels), model(pixels)
    assert_within_budget(["logits"], [actual], [eager], [exact])
    assert "direct" not in captured.explain()


@pytest.mark.gpu
@pytest.mark.parametrize("fold", [True, False])
def test_graphs_see_new_weights(fold: bool) -> None:
    model = vit().cuda()
    x = images(4, device="cuda")
    captured = capture(model, x, fold=fold)
    captured(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(captured(x), model(x), rtol=1e-3, atol=1e-3)
        model.head = nn.Linear(32, 7, device="cuda")
        torch.testing.assert_close(captured(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_graphs_on_two_streams_take_turns() -> None:
    model = vit().cuda()
    inputs = [images(4, seed=i, device="cuda") for i in range(20)]
    captured = capture(model, inputs[0])
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            outputs.append(captured(x))
    torch.cuda.synchronize()
    for x, out in zip(inputs, outputs, strict=True):
        assert torch.equal(out, captured(x))
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.gpu
def test_inside_another_capture_the_model_is_captured() -> None:
    model = vit().cuda()
    x = images(4, device="cuda")
    captured = capture(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = captured(x)
    graph.replay()
    torch.testing.assert_close(out, captured(x), rtol=1e-3, atol=1e-3)
    assert "direct: inside another capture: 1 x" in captured.explain()


@pytest.mark.gpu
def test_a_model_that_synchronises_runs_without_graphs() -> None:
    class Sync(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    x = images(4, device="cuda")
    with pytest.warns(RuntimeWarning, match="without graphs: capture failed"):
        captured = capture(Sync().eval(), x)
    assert torch.equal(captured(x), Sync()(x))
    assert capture(vit().cuda(), x).problem is None  # the failure left nothing behind
