"""The parity tool: what it finds, what it changes and puts back, and what it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.errors import ConfigError, FactoryError
from graphs.parity import twins
from graphs.parity.data import LAYOUTS, MIXED, TWICE, arguments, layouts_of, new_values
from graphs.parity.toggles import KINDS, toggles
from graphs.parity.walk import reached

Tensor = torch.Tensor
BY = 2.0


def weighed(x: Tensor, by: float = 1.5, *, plus: float = 0.5) -> Tensor:
    return x * by + plus


class Model(nn.Module):
    """Reads a value of each kind."""

    gain = 1.25

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale, self.flag = nn.Linear(4, 4), 1.5, True
        self.table, self.items = {"s": 0.5}, [1.0, 2.0]
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.total.add_(x.sum(0))
        z = weighed(self.lin(x)) * self.scale * self.table["s"] * sum(self.items) * self.gain * BY
        return z + y if self.flag else z - y


def factory() -> Any:
    return Model().eval(), (torch.randn(3, 4), torch.randn(3, 4))


def plain() -> Any:
    return lambda x: x * 2, (torch.randn(3, 4),)


class Wrapped:
    """A captured step that is none: ``call`` decides what comes of a call."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self.model, self.call_with, self.count = model, call, 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.call_with(self.model, self.count, *args)

    def report(self) -> graphs.CaptureReport:
        return graphs.CaptureReport("cpu", "graph", 1, self.count, 0, (), ())

    def invalidate(self) -> None: ...


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Make ``capture`` give something that is wrong on purpose."""
    return lambda call: monkeypatch.setattr(twins, "capture", lambda model, **settings: Wrapped(model, call))


def test_a_step_that_is_served_rightly_is_ok() -> None:
    report = graphs.parity(plain, 8, ["no_grad", "inference_mode"])
    assert report.ok and report.first is None
    assert {row.context for row in report.rows} == {"no_grad", "inference_mode"}
    new_data = report.rows[0]
    assert (new_data.variation, new_data.calls, new_data.replays, new_data.differences) == ("new data", 8, 8, 0)
    assert str(report).startswith(f"{sum(row.calls for row in report.rows)} calls of plain on cpu captured and eager, ")
    assert json.loads(report.to_json())["ok"] is True


def _without_state(model: Any, count: int, *args: Any) -> Any:
    before = model.total.clone()
    out = model(*args)
    model.total.copy_(before)
    return out


def _raising(model: Any, count: int, *args: Any) -> Any:
    raise ValueError("of a recording")


def _drawing(model: Any, count: int, *args: Any) -> Any:
    torch.rand(1)
    return model(*args)


def _counting(model: Any, count: int, *args: Any) -> Any:
    model.scale = model.scale + 1
    out = model(*args)
    return out


@pytest.mark.parametrize(
    ("call", "what", "detail"),
    [
        (lambda model, count, *args: model(*args) * 1.01, "output", "differs from eager in"),
        (lambda model, count, *args: (model(*args),), "output", "has the structure"),
        (lambda model, count, *args: model(*args).double(), "output", "dtype torch.float64"),
        (
            lambda model, count, x, y: model(x, y.mul_(1)) if count < 3 else model(x, y).add_(y.mul_(2), alpha=0),
            "argument",
            "differs",
        ),
        (_without_state, "model.total", "differs from eager"),
        (_raising, "exception", "raises ValueError (of a recording), eager nothing"),
        (_drawing, "random state of torch", "differs"),
        (_counting, "output", "differs"),
    ],
)
def test_what_differs_is_found(pretended: Any, call: Any, what: str, detail: str) -> None:
    pretended(call)
    report = graphs.parity(factory, 8, ["no_grad"], changes=0)
    assert not report.ok and report.first is not None
    assert report.first.what.startswith(what) and detail in report.first.detail
    assert "DIFFER" in str(report).splitlines()[0] + str(report).splitlines()[1]


def test_the_line_that_made_an_output_is_named(pretended: Any) -> None:
    pretended(lambda model, count, *args: model(*args) + 1)
    first = graphs.parity(factory, 8, ["no_grad"], changes=0).first
    assert first is not None and first.file == __file__ and first.source == "return z + y if self.flag else z - y"


@pytest.mark.parametrize(
    ("kind", "frozen", "toggled", "source"),
    [
        ("attributes", lambda model: setattr(model, "scale", 1.5), "model.scale = 2.5", "self.scale"),
        ("entries of lists and dicts", lambda model: model.table.update(s=0.5), "model.table['s'] = 1.0", "self.table"),
        ("hooks", lambda model: model.lin._forward_hooks.clear(), "model.lin.register_forward_hook(...)", "self.lin"),
        ("methods", lambda model: vars(model.lin).pop("forward", None), "model.lin.forward = another", "self.lin"),
        ("training flag", lambda model: setattr(model.lin, "training", False), "model.lin.training = True", "self.lin"),
        ("defaults", lambda model: setattr(weighed, "__defaults__", (1.5,)), "default 0 of weighed = 2.5", "weighed("),
        ("globals and closures", lambda model: setattr(sys.modules[__name__], "BY", 2.0), "BY = 3.25", "* BY"),
    ],
)
def test_a_value_that_is_not_looked_at_is_found_at_the_next_call(
    pretended: Any, kind: str, frozen: Callable[[Any], object], toggled: str, source: str
) -> None:
    def call(model: Any, count: int, *args: Any) -> Any:
        frozen(model)
        return model(*args)

    pretended(call)
    report = graphs.parity(factory, 8, ["no_grad"])
    assert report.first is not None and report.first.variation == kind
    assert report.first.toggled == toggled and source in report.first.source
    wrong = [row.variation for row in report.rows if row.differences]
    assert wrong == [kind]
    assert all(row.tried == row.found for row in report.rows)


def test_a_report_holds_at_80_columns(pretended: Any) -> None:
    pretended(lambda model, count, *args: model(*args) + 1)
    text = str(graphs.parity(factory, 8, ["no_grad", "autocast+inference_mode"], changes=2))
    assert max(map(len, text.splitlines())) <= 80
    assert "autocast+inference_mode" in text and "First difference: no_grad, new data, call 0: output" in text
    assert "2/5" in text, "two of five attributes were tried, and the table says so"


def test_everything_that_is_changed_is_put_back() -> None:
    made = factory()[0]
    before = _leaves(made)
    for kind in KINDS:
        found = toggles(reached({"model": made}), kind)
        assert found, kind
        for one in found:
            undo = one.apply()
            changed = _leaves(made) != before or kind in ("hooks", "methods", "defaults")
            undo()
            assert changed, one.name
            assert _leaves(made) == before, one.name
    assert (weighed.__defaults__, weighed.__kwdefaults__, BY, Model.gain) == ((1.5,), {"plus": 0.5}, 2.0, 1.25)
    assert not made.lin._forward_hooks and "forward" not in vars(made) and "forward" in vars(Model)


def _leaves(model: Any) -> Any:
    return [
        (cell.path, cell.value.flatten().tolist() if isinstance(cell.value, Tensor) else cell.value, id(cell.value))
        if isinstance(cell.value, Tensor)
        else (cell.path, cell.value)
        for cell in reached({"model": model}).cells
    ]


def test_a_change_is_put_back_when_a_call_ends_the_run(pretended: Any) -> None:
    def call(model: Any, count: int, *args: Any) -> Any:
        if weighed.__defaults__ != (1.5,):
            raise KeyboardInterrupt
        return model(*args)

    pretended(call)
    with pytest.raises(KeyboardInterrupt):
        graphs.parity(factory, 8, ["no_grad"])
    assert weighed.__defaults__ == (1.5,)


def test_both_twins_raise_alike(pretended: Any) -> None:
    pretended(lambda model, count, *args: model(*args))

    def strict() -> Any:
        model = Model().eval()
        model.kind = "known"  # type: ignore[assignment]
        forward = model.forward

        def step(x: Tensor, y: Tensor) -> Tensor:
            return {"known": forward}[model.kind](x, y)  # type: ignore[index]

        return step, (torch.randn(3, 4), torch.randn(3, 4))

    report = graphs.parity(strict, 8, ["no_grad"])
    attributes = next(row for row in report.rows if row.variation == "attributes")
    assert attributes.differences == 0 and attributes.tried > 3


class Hostile:
    """Raises whatever is asked of it, but for an attribute."""

    def __init__(self) -> None:
        self.factor = 2.0

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = None  # type: ignore[assignment]

    @property
    def secret(self) -> float:
        raise RuntimeError("read")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __len__(self) -> int:
        raise RuntimeError("measured")


def test_looking_runs_no_code_of_the_users() -> None:
    found = reached({"model": [Hostile(), {"inner": (Hostile(),)}]})
    assert [cell.path for cell in found.cells] == ["model[0].factor", "model[1]['inner'][0].factor"]


def test_new_values_are_like_the_example() -> None:
    draws = torch.Generator().manual_seed(0)
    whole = new_values(torch.tensor([[3, 9], [4, 5]]), draws)
    assert whole.dtype is torch.int64 and 3 <= int(whole.min()) <= int(whole.max()) <= 9
    wide = new_values(torch.randn(50, 50) * 100, draws)
    assert 90 < float(wide.std()) < 110
    assert {bool(new_values(torch.tensor(True), draws)) for _ in range(20)} == {True, False}
    assert new_values(torch.randn(2, 3).bfloat16(), draws).dtype is torch.bfloat16
    assert new_values(torch.empty(0, 3), draws).shape == (0, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_where_values_lie_only(layout: str) -> None:
    example = ((torch.randn(3, 4), torch.tensor(2), None), {"held": [torch.randn(4)]})
    (x, number, nothing), named = arguments(example, 3, layout)
    (plain, _, _), _ = arguments(example, 3, "contiguous")
    assert x.shape == (3, 4) and int(number) == 2 and nothing is None and named["held"][0].shape == (4,)
    assert torch.equal(x, plain) or (layout == "expanded" and torch.equal(x[2], plain[0]))


def test_layouts_in_turn_and_one_tensor_for_two_arguments() -> None:
    example = ((torch.randn(3, 4), torch.randn(3, 4)), {})
    assert MIXED in layouts_of(example) and TWICE in layouts_of(example)
    assert {arguments(example, seed, MIXED)[0][0].stride() for seed in range(len(LAYOUTS))} >= {(4, 1), (1, 3), (8, 1), (0, 1)}
    (first, second), _ = arguments(example, 0, TWICE)
    assert first is second
    assert list(layouts_of(((torch.tensor(1.0), 3), {}))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": ["no_grad", "train"]}, r"contexts = 'train' is not legal.*'grad', 'no_grad', 'inference_mode', 'autocast'"),
        ({"contexts": ["autocast+never"]}, "autocast\\+never"),
        ({"calls": 3}, "at least 8"),
        ({"changes": -1}, "0 or more"),
        ({"mode": "fast"}, "mode = 'fast'"),
    ],
)
def test_a_setting_that_is_not_legal_raises(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphs.parity(plain, **change)


SHARED = Model()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (SHARED, (torch.ones(3, 4), torch.ones(3, 4))), "return the same tensors"),
        (lambda: (lambda x: x.missing, (torch.ones(2),)), "the step itself raises AttributeError"),
        (lambda: (3, ()), "cannot be called"),
        (lambda: None, "it returned a NoneType"),
    ],
)
def test_a_factory_that_is_of_no_use_raises(make: Any, message: str) -> None:
    with pytest.raises(FactoryError, match=message):
        graphs.parity(make, 8, ["no_grad"])


def test_random_states_are_left_as_they_were(pretended: Any) -> None:
    pretended(_drawing)
    before = torch.get_rng_state()
    graphs.parity(plain, 8, ["no_grad"])
    assert torch.equal(torch.get_rng_state(), before)


SOURCE = """
import torch
def right(): return (lambda x: x * 2), (torch.randn(3, 4),)
def raising(): return (lambda x: x.missing), (torch.randn(3, 4),)
"""


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pretended: Any
) -> None:
    pytest.importorskip("typer", reason="typer is not installed")
    from graphs.__main__ import main

    (tmp_path / "parity_steps.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*options: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as done:
            main(["parity", *options, "--calls", "8", "--contexts", "no_grad"])
        told = capsys.readouterr()
        return done.value.code, (told.out + told.err).replace("\n", " ") if "--json" not in options else told.out

    pretended(lambda model, count, *args: model(*args))
    code, text = run("parity_steps:right")
    assert code == 0 and text.startswith("36 calls of parity_steps:right") and "all the same." in text
    assert json.loads(run("parity_steps:right", "--json")[1])["name"] == "parity_steps:right"
    pretended(lambda model, count, *args: model(*args) + 1)
    assert run("parity_steps:right")[0] == 1
    for spec, message in (
        ("parity_steps:raising", "raises AttributeError"),
        ("parity_steps:none", "not in it"),
        ("no_such", "form"),
    ):
        code, text = run(spec)
        assert code == 2 and message in text and "Traceback" not in text
    with pytest.raises(SystemExit) as done:
        main(["parity", "parity_steps:right", "--contexts", "train"])
    assert done.value.code == 2 and "'inference_mode'" in capsys.readouterr().err
