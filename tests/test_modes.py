"""Graph and eager mode: the argument, the environment, toggling, and eager blocks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import graphs
from graphs.environment import wo_a_path
from graphs.errors import ConfigError

X = torch.ones(3)


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def counts(step: graphs.CapturedModule[..., Any]) -> tuple[int, int]:
    report = step.report()
    return report.replays, report.eager_calls


def test_graph_is_the_default() -> None:
    assert graphs.capture(double).mode == "graph"


def test_the_environment_beats_the_default_and_the_argument_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHS_MODE", "eager")
    assert graphs.capture(double).mode == "eager"
    assert graphs.capture(double, mode="graph").mode == "graph"


def test_the_environment_is_read_once() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHS_MODE", "eager")
        step = graphs.capture(double)
    step(X)
    assert step.mode == "eager" and counts(step) == (0, 1)


def test_eager_mode_records_nothing() -> None:
    step = graphs.capture(double, mode="eager")
    for _ in range(3):
        assert step(X).tolist() == [2, 2, 2]
    assert counts(step) == (0, 3) and step.report().recordings == 0


def test_toggling_keeps_the_recordings() -> None:
    step = graphs.capture(double)
    step(X)
    step.mode = "eager"
    step(X)
    step.mode = "graph"
    step(X)
    assert counts(step) == (2, 1) and step.report().recordings == 1


def test_an_illegal_mode_is_refused_and_changes_nothing() -> None:
    step = graphs.capture(double)
    with pytest.raises(ConfigError, match="'graph', 'eager'"):
        step.mode = "fast"
    assert step.mode == "graph"


def test_an_eager_block_holds_for_every_step_in_it_and_ends_with_it() -> None:
    first, second = graphs.capture(double), graphs.capture(double)
    with graphs.eager():
        with graphs.eager():
            first(X)
        second(X)
    first(X)
    assert counts(first) == (1, 1) and counts(second) == (0, 1)
    assert first.mode == "graph"


def test_an_eager_block_ends_with_an_error_in_it() -> None:
    step = graphs.capture(double)
    with pytest.raises(ZeroDivisionError), graphs.eager():
        _ = 1 / 0
    step(X)
    assert counts(step) == (1, 0)


def test_an_eager_block_is_of_its_thread() -> None:
    step = graphs.capture(double)
    with graphs.eager():
        thread = threading.Thread(target=step, args=(X,), daemon=True)
        thread.start()
        thread.join(timeout=60)
    assert not thread.is_alive() and counts(step) == (1, 0)


def test_an_eager_call_is_differentiable() -> None:
    x = torch.ones(3, requires_grad=True)
    step = graphs.capture(double)
    with graphs.eager():
        step(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("variable", "value", "legal"),
    [
        ("GRAPHS_MODE", "fast", "'graph', 'eager'"),
        ("GRAPHS_MODE", "", "'graph', 'eager'"),
        ("GRAPHS_MODE", "Graph", "'graph', 'eager'"),
        ("GRAPHS_VERIFY", "yes", "'capture', 'always', 'off'"),
        ("GRAPHS_STRICT", "maybe", "'1', 'true', 'yes', 'on', '0', 'false', 'no', 'off'"),
        ("GRAPHS_BUCKETS", "1,x", "positive integers separated by commas"),
        ("GRAPHS_BUCKETS", "1,2,", "positive integers separated by commas"),
        ("GRAPHS_BUCKETS", "0", "positive integers separated by commas"),
        ("GRAPHS_BUCKETS", "-4,8", "positive integers separated by commas"),
        ("GRAPHS_BUCKETS", "1.5", "positive integers separated by commas"),
        ("GRAPHS_BUCKETS", "1 2", "positive integers separated by commas"),
        ("GRAPHS_MAX_RECORDINGS", "0", "a positive integer"),
        ("GRAPHS_MAX_RECORDINGS", "-1", "a positive integer"),
        ("GRAPHS_MAX_RECORDINGS", "many", "a positive integer"),
        ("GRAPHS_MAX_RECORDINGS", "", "a positive integer"),
    ],
)
def test_a_malformed_variable_is_named_with_its_value_and_the_legal_ones(
    variable: str, value: str, legal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as raised:
        graphs.capture(double)
    assert str(raised.value).startswith(f"{variable} = {value!r} is not legal") and legal in str(raised.value)


def test_a_malformed_path_of_the_projection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHS_WO_A", "blocks")
    with pytest.raises(ConfigError, match=r"GRAPHS_WO_A = 'blocks'.*'gloop'"):
        wo_a_path()


def test_variables_do_what_the_arguments_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUCKETS": "8, 2,2", "STRICT": "On", "MAX_RECORDINGS": "1", "VERIFY": "always"}.items():
        monkeypatch.setenv(f"GRAPHS_{name}", value)
    step = graphs.capture(double, batch_dims={"x": 0})
    step(torch.ones(2, 3))
    assert [key.rows for key in step.report().keys] == [2]
    with pytest.warns(UserWarning, match="max_recordings=1"):
        step(torch.ones(5, 3))
    assert [key.rows for key in step.report().keys] == [8]
    with pytest.raises(graphs.Refusal, match="above-largest-bucket"):
        step(torch.ones(9, 3))


def test_an_empty_list_of_buckets_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHS_BUCKETS", "")
    step = graphs.capture(double, batch_dims={"x": 0})
    step(torch.ones(3, 3))
    assert step.report().keys[0].rows is None


@pytest.mark.parametrize("model", [None, 3, torch.ones(2)])
def test_what_cannot_be_called_cannot_be_captured(model: Any) -> None:
    with pytest.raises(ConfigError, match="model"):
        graphs.capture(model)
