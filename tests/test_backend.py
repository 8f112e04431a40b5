"""``torch.compile(backend="graphs")``: called the ordinary way it gives what eager gives, replays, and says why not."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed
from graphs.dynamo.backend import backend_report, graphs_backend
from graphs.errors import MovedStaticTensor, Refusal
from graphs.ops.wo_a.routes import wo_a_routes
from graphs.recording.cpu_tape import TapeRecording
from graphs.recording.recorder import CannotPoint
from graphs.report import PieceReport

Tensor = torch.Tensor
older: set[int] = set()
ROOT = Path(__file__).resolve().parents[1]


class Step(nn.Module):
    """A layer and a buffer that the step writes; returns new tensors, an argument, a buffer, and views of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Any:
        self.cache.add_(x)
        y = self.layer(x) + self.cache
        return y.relu(), x, self.cache, x.t(), self.cache[1:]


class Broken(Step):
    """A graph break in the middle."""

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        torch._dynamo.graph_break()
        return y * 2 + self.cache


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    gc.collect()
    older.clear()
    older.update(piece.index for piece in backend_report().pieces)  # Dynamo keeps what ends in a graph break
    with torch.no_grad():
        yield
    torch.compiler.reset()


def compiled(model: Callable[..., Any], dynamic: bool | None = False, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=graphs_backend, dynamic=dynamic, options={"compiler": "aten", **options})


def pair(kind: type[Step] = Step, **options: Any) -> tuple[Step, Step, Callable[..., Any]]:
    """A model, a twin to run eagerly, and the model compiled."""
    model, twin = kind(), kind()
    twin.load_state_dict(model.state_dict())
    return model, twin, compiled(model, **options)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def pieces() -> tuple[PieceReport, ...]:
    return tuple(piece for piece in backend_report().pieces if piece.index not in older)


def reasons(piece: PieceReport) -> dict[str, int]:
    return {refusal.reason: refusal.count for refusal in piece.refusals}


def recorded_anew(piece: PieceReport) -> dict[str, int]:
    return {refusal.reason: refusal.recorded for refusal in piece.refusals}


@pytest.mark.parametrize("compiler", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_calls_give_what_eager_gives_and_state_advances_once_per_call(compiler: str) -> None:
    model, twin, step = pair(compiler=compiler)
    for _ in range(4):
        x = torch.randn(4, 8)
        same(step(x), twin(x.clone()))
        same(model.cache, twin.cache)
    (piece,) = pieces()
    assert (piece.compiler, piece.recordings, piece.replays, piece.compiled_calls) == (compiler, 1, 4, 0)


def test_outputs_are_the_callers_and_views_are_of_the_callers_tensors() -> None:
    model, _, step = pair()
    first = torch.randn(4, 8)
    kept = step(first)[0]
    before = kept.clone()
    x = torch.randn(4, 8)
    _, same_x, cache, transposed, rows = step(x)
    assert torch.equal(kept, before)
    assert same_x is x and cache is model.cache
    assert transposed.data_ptr() == x.data_ptr() and transposed.shape == (8, 4)
    assert rows.data_ptr() == model.cache[1:].data_ptr()


def test_borrowed_outputs_are_overwritten_by_the_next_call() -> None:
    step = compiled(lambda x: x * 2, outputs="borrowed")
    first = step(torch.ones(3))
    step(torch.full((3,), 5.0))
    same(first, torch.full((3,), 10.0))


@pytest.mark.parametrize("compiler", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "arrange",
    [lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(4, 8), lambda x: torch.cat([x, x], 1)[:, 2:10]],
    ids=["transposed", "expanded", "sliced"],
)
def test_strides_that_dynamo_guarded_are_kept(arrange: Callable[[Tensor], Tensor], compiler: str) -> None:
    _, twin, step = pair(compiler=compiler)
    for _ in range(3):
        x = arrange(torch.randn(4, 8))
        same(step(x), twin(x))
    assert pieces()[0].replays == 3


def test_a_graph_break_makes_two_pieces_and_is_named() -> None:
    _, twin, step = pair(Broken)
    for _ in range(3):
        x = torch.randn(4, 8)
        same(step(x), twin(x))
    first, second = pieces()
    assert (first.replays, second.replays) == (3, 3)
    line = next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "dynamo.graph_break" in text)
    assert (Path(first.file), first.line) == (Path(__file__), line)
    assert "graph_break" in first.ends and second.ends == ""
    assert f"{Path(__file__).name}:{line}" in str(backend_report())
    told = json.loads(backend_report().to_json())["pieces"]  # of every test before, which Dynamo still holds
    assert [piece["line"] for piece in told if piece["index"] == first.index] == [line]


def test_a_branch_on_a_tensor_is_told_as_one() -> None:
    step = torch.compile(lambda x: x * 2 if x.sum() > 0 else x - 1, backend=graphs_backend, options={"compiler": "aten"})
    step(torch.ones(3))
    assert pieces()[0].ends.startswith("a branch on a tensor (")


def test_weights_that_move_are_used_by_the_recording() -> None:
    model, twin, step = pair()
    same(step(x := torch.randn(4, 8)), twin(x))
    model.layer.weight.data = model.layer.weight.data * 2  # the same Parameter, other memory
    twin.layer.weight.data.mul_(2)
    same(step(x := torch.randn(4, 8)), twin(x))
    model.layer.weight = nn.Parameter(model.layer.weight * 2)
    twin.layer.weight.data.mul_(2)
    same(step(x := torch.randn(4, 8)), twin(x))
    model.layer.weight.mul_(3)  # in place: nothing moves
    twin.layer.weight.mul_(3)
    same(step(x := torch.randn(4, 8)), twin(x))
    (piece,) = pieces()
    assert piece.refusals == () and (piece.recordings, piece.replays, piece.moved) == (1, 4, 2)


def test_what_is_written_and_moves_at_each_call_is_written_where_it_is() -> None:
    model, twin, step = pair()
    for _ in range(6):
        old, before = model.cache, model.cache.clone()
        model.cache = model.cache.clone()
        same(step(x := torch.randn(4, 8)), twin(x))
        same(model.cache, twin.cache)
        same(old, before)
    (piece,) = pieces()
    assert piece.compiled_calls == 0 and piece.refusals == () and (piece.recordings, piece.moved) == (1, 5)


def test_what_is_only_read_and_moves_at_each_call_is_read_where_it_is() -> None:
    model, twin, step = pair()
    for _ in range(8):
        model.layer.bias.data = torch.randn(8)
        twin.layer.bias.data = model.layer.bias.data.clone()
        same(step(x := torch.randn(4, 8)), twin(x))
    (piece,) = pieces()
    assert piece.compiled_calls == 0 and piece.refusals == () and (piece.recordings, piece.moved) == (1, 7)


def test_two_models_of_one_class_keep_apart() -> None:
    first, twin, step = pair()
    second, other, its_step = pair()
    for _ in range(4):
        for call, eager in ((step, twin), (its_step, other)):
            same(call(x := torch.randn(4, 8)), eager(x))
        same(first.cache, twin.cache)
        same(second.cache, other.cache)
    assert sum(piece.recordings for piece in pieces()) == 2 and sum(piece.moved for piece in pieces()) == 0
    assert sum(piece.replays for piece in pieces()) == 8 and all(piece.refusals == () for piece in pieces())


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_graph_whose_recording_refuses_to_be_pointed_gives_up_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: TapeRecording, recorded: object, storages: object) -> None:
        raise CannotPoint("the driver refused")

    monkeypatch.setattr(TapeRecording, "point", refuse)
    model, twin, step = pair()
    for _ in range(6):
        model.cache = model.cache.clone()
        same(step(x := torch.randn(4, 8)), twin(x))
        same(model.cache, twin.cache)
    (piece,) = pieces()
    assert piece.compiled_calls == 3 and reasons(piece) == {"moved-static-tensor": 3}
    assert recorded_anew(piece) == {"moved-static-tensor": 2}
    assert "the driver refused" in piece.refusals[0].detail


def test_a_written_argument_is_written_in_place() -> None:
    def write(x: Tensor, cache: Tensor) -> None:
        cache[0].copy_(x)

    step, cache = compiled(write), torch.zeros(2, 3)
    for value in (1.0, 2.0, 3.0):
        step(torch.full((3,), value), cache)
        same(cache[0], torch.full((3,), value))
    assert pieces()[0].replays == 3


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_gradients_run_the_compiled_function_and_are_counted() -> None:
    _, twin, step = pair()
    with torch.enable_grad():
        x = torch.randn(4, 8, requires_grad=True)
        step(x)[0].sum().backward()
        y = x.detach().clone().requires_grad_()
        twin(y)[0].sum().backward()
    same(x.grad, y.grad)
    (piece,) = pieces()
    assert (piece.recordings, piece.compiled_calls, reasons(piece)) == (0, 1, {"autograd": 1})


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_symbolic_sizes_are_recorded_per_value_up_to_a_limit() -> None:
    step = compiled(lambda x: (x * x.shape[0]).sum(0), dynamic=True, max_recordings=2)
    for rows in (2, 3, 2, 4, 3, 4):
        x = torch.randn(rows, 5)
        same(step(x), (x * rows).sum(0))
    (piece,) = pieces()
    assert (piece.recordings, piece.replays, reasons(piece)) == (2, 4, {"too-many-keys": 2})


def test_strict_raises_the_reason() -> None:
    step = compiled(lambda x: x * 2, strict=True)
    with torch.enable_grad(), pytest.raises(Refusal, match="autograd"):
        step(torch.ones(3, requires_grad=True))


def test_host_values_that_dynamo_keeps_in_the_graph_are_refused_at_their_line() -> None:
    def nonzero(x: Tensor) -> Tensor:
        return x.nonzero()  # here

    step = compiled(nonzero)
    x = torch.tensor([0.0, 1.0, 2.0])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), pytest.warns(NotReplayed, match="data-dependent"):
        same(step(x), x.nonzero())
    (refusal,) = pieces()[0].refusals
    assert Path(refusal.file) == Path(__file__) and "nonzero" in refusal.operator
    assert Path(__file__).read_text().splitlines()[refusal.line - 1].endswith("# here")


def test_constants_of_the_step_are_hoisted_and_reported() -> None:
    step = compiled(lambda x: x + torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(2):
        same(step(torch.ones(3)), torch.tensor([2.0, 3.0, 4.0]))
    (piece,) = pieces()
    assert piece.replays == 2 and "hoist_constants" in "".join(piece.rewrites)


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize("compiler", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_conditional_takes_both_ways(compiler: str) -> None:
    def choose(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos() - 1, (x,))

    step = compiled(choose, compiler=compiler)
    for sign in (1.0, 1.0, -1.0, 1.0, -1.0):
        x = torch.full((3,), sign)
        same(step(x), x.sin() + 1 if sign > 0 else x.cos() - 1)


def test_random_numbers_go_on() -> None:
    step = compiled(lambda x: x + torch.rand(3))
    torch.manual_seed(5)
    found = [step(torch.zeros(3)) for _ in range(3)]
    torch.manual_seed(5)
    same(found, [torch.rand(3) for _ in range(3)])
    assert pieces()[0].replays == 3


def test_eager_blocks_run_the_compiled_function() -> None:
    step = compiled(lambda x: x * 2)
    step(torch.ones(3))
    with graphs.eager():
        same(step(torch.ones(3)), torch.full((3,), 2.0))
    assert (pieces()[0].replays, pieces()[0].compiled_calls) == (1, 1)


def test_a_captured_step_may_hold_compiled_pieces() -> None:
    _, twin, step = pair()
    captured = graphs.capture(step)
    for _ in range(3):
        same(captured(x := torch.randn(4, 8)), twin(x))
    assert captured.report().replays == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kompiler": "aten"}, "'kompiler' is not legal; it must be one of 'compiler', 'outputs', 'verify', 'strict'"),
        ({"compiler": "llvm"}, "'llvm' is not legal; it must be one of 'inductor', 'aten'"),
        ({"max_recordings": 0}, "a positive integer"),
        ({"verify": "always"}, "'capture', 'off'"),
        ({"routes": 3}, "a table for passes.routing"),
    ],
)
def test_bad_options_name_the_legal_ones(options: dict[str, Any], message: str) -> None:
    step = torch.compile(lambda x: x * 2, backend=graphs_backend, options=options)
    with pytest.raises(Exception, match=re.escape(message)):
        step(torch.ones(3))


def test_a_mode_that_asks_inductor_for_more_is_refused() -> None:
    with pytest.raises(Exception, match="left out or 'reduce-overhead'"):
        torch.compile(lambda x: x * 2, backend=graphs_backend, mode="max-autotune")(torch.ones(3))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_mode_that_records_is_what_the_backend_does(mode: str) -> None:
    step = torch.compile(lambda x: x * 2, backend=graphs_backend, mode=mode)
    assert [step(torch.full((3,), value)).tolist() for value in (1.0, 2.0)] == [[2.0] * 3, [4.0] * 3]


def test_a_package_used_from_its_sources_is_found_by_name(tmp_path: Path) -> None:
    script = tmp_path / "sources.py"
    script.write_text(
        "import importlib.metadata, torch\n"
        "found = importlib.metadata.entry_points\n"
        "importlib.metadata.entry_points = lambda **which: [e for e in found(**which) if e.dist.name != 'stepgraphs']\n"
        "from graphs.dynamo import registered\n"
        "import graphs\n"
        "importlib.metadata.entry_points = found\n"
        "assert [f for f in __import__('sys').meta_path if isinstance(f, registered.Finder)]\n"
        "assert torch.compile(lambda x: x + 1, backend='graphs', mode='reduce-overhead')(torch.ones(2)).tolist() == [2.0, 2.0]\n"
        "assert len(graphs.backend_report().pieces) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


def test_the_entry_point_leads_to_the_backend() -> None:
    declared = re.search(
        r'\[project.entry-points.torch_dynamo_backends\]\ngraphs = "(.*)"', (ROOT / "pyproject.toml").read_text()
    )
    assert declared is not None
    point = importlib.metadata.EntryPoint("graphs", declared[1], "torch_dynamo_backends")
    assert point.load() is graphs_backend


def test_an_installed_project_is_found_by_name() -> None:
    if not importlib.metadata.entry_points(group="torch_dynamo_backends").select(name="graphs"):
        pytest.skip("stepgraphs is not installed, so torch cannot find its entry point: pip install --editable .")
    step = torch.compile(lambda x: x * 2, backend="graphs", options={"compiler": "aten"})
    same(step(torch.ones(3)), torch.full((3,), 2.0))
    assert pieces()[0].replays == 1


OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, c: x + c,
    "mul": lambda x, c: x * c.sum(0),
    "matmul": lambda x, c: x @ c,
    "transpose": lambda x, c: x.t(),
    "write": lambda x, c: c.add_(x) * 1,
    "write row": lambda x, c: (c[1].copy_(x[0]), x)[1],
    "softmax": lambda x, c: x.softmax(-1),
    "view": lambda x, c: x.reshape(-1, 2).sum(1).expand(4, -1)[:, :4],
    "constant": lambda x, c: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
}


@settings(max_examples=15, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(OPERATORS)), min_size=1, max_size=5), moving=st.booleans())
def test_random_programs_agree_with_eager(names: list[str], moving: bool) -> None:
    def program(x: Tensor, cache: Tensor) -> Tensor:
        for name in names:
            x = OPERATORS[name](x, cache).tanh()
        return x

    torch.compiler.reset()
    step, cache, twin = compiled(program), torch.rand(4, 4), torch.zeros(4, 4)
    twin.copy_(cache)
    for _ in range(4):
        cache = cache.clone() if moving else cache
        x = torch.rand(4, 4)
        same(step(x, cache), program(x.clone(), twin))
        same(cache, twin)


class Grouped(nn.Module):
    """A projection of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, o: Tensor) -> Tensor:
        return torch.einsum("sgd,grd->sgr", o, self.weight)


def test_grouped_projections_are_routed_by_the_name_of_their_weight() -> None:
    model = Grouped()
    step = compiled(model, routes=wo_a_routes("einsum", only="weight"))
    for _ in range(3):
        same(step(o := torch.randn(3, 2, 4)), model(o))
    (piece,) = pieces()
    assert piece.replays == 3 and "wo_a_einsum" in "".join(piece.rewrites)
    model.weight.mul_(2)
    with pytest.raises(MovedStaticTensor, match=r"prepared for a routed projection.*\n.*torch.compiler.reset"):
        step(torch.randn(3, 2, 4))


def test_a_route_for_another_weight_changes_nothing() -> None:
    model = Grouped()
    step = compiled(model, routes=wo_a_routes("einsum", only="other.weight"))
    same(step(o := torch.randn(3, 2, 4)), model(o))
    assert pieces()[0].rewrites == ()


def _apart() -> tuple[Tensor, Tensor]:
    return torch.arange(1.0, 5.0), torch.arange(2.0, 6.0)


def _overlapping() -> tuple[Tensor, Tensor]:
    memory = torch.arange(1.0, 12.0)
    return memory[:4], memory[2:6]


def _interleaved() -> tuple[Tensor, Tensor]:
    memory = torch.arange(1.0, 9.0).view(4, 2)
    return memory[:, 0], memory[:, 1]


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize("order", ["aoa", "oao", "ioi", "aio"])
@pytest.mark.parametrize("compiler", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_inputs_that_begin_or_cease_to_overlap(compiler: str, order: str) -> None:
    def written(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return x + y

    compiled = torch.compile(written, backend="graphs", options={"compiler": compiler})
    makers = {"a": _apart, "o": _overlapping, "i": _interleaved}
    with torch.no_grad():
        for kind in order:
            given, wanted = makers[kind](), makers[kind]()
            assert torch.equal(compiled(*given), written(*wanted))
            assert all(map(torch.equal, given, wanted))
