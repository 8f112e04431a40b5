"""Run a step eagerly and captured on the same calls, and require the same outputs, arguments and state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree

import graphs
from graphs.dispatch.call_log import NotReplayed

Tensor = torch.Tensor
Between = Callable[[int, Any], None]


def parity(
    make: Callable[[], Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    between: Between | None = None,
    **settings: Any,
) -> graphs.CapturedModule[..., Any]:
    """Two models from ``make``, one captured, are called alike; every call must give the same and leave the same.

    Args:
        calls: positional arguments of each call; tensors are cloned for each of the two models, layout kept.
        between: called before each call with its index and the model, to change it from outside.

    Returns:
        The captured step, to look at its report.
    """
    expected = list(_run(make, calls, between, lambda model: model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        actual = list(_run(make, calls, between, lambda model: graphs.capture(model, **settings)))
    for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        for part in ("output", "arguments", "state"):
            assert_same(wanted[part], got[part], f"{part} of call {index}")
    return actual[-1]["step"]


def _run(
    make: Callable[[], Any], calls: Sequence[tuple[Any, ...]], between: Between | None, wrap: Callable[[Any], Any]
) -> Iterator[Any]:
    torch.manual_seed(0)
    model = make()
    step = wrap(model)
    torch.manual_seed(1)
    for index, call in enumerate(calls):
        if between is not None:
            between(index, model)
        arguments = copied(call)
        output = step(*arguments)
        yield {"output": copied(output), "arguments": copied(arguments), "state": copied(state_of(model)), "step": step}


def copied(value: Any) -> Any:
    """``value`` with its tensors cloned, each on its own."""
    return _pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def state_of(model: Any) -> dict[str, Any]:
    """Buffers, parameters and plain attributes of a module; empty for a function."""
    if not isinstance(model, torch.nn.Module):
        return {}
    plain = {n: v for n, v in vars(model).items() if isinstance(v, (int, float, Tensor)) and not n.startswith("_")}
    return {**model.state_dict(), **plain, "random": torch.get_rng_state()}


def assert_same(wanted: Any, got: Any, what: str) -> None:
    """Equal structure, types, dtypes and values (up to another summation order)."""
    a, b = _pytree.tree_flatten(wanted), _pytree.tree_flatten(got)
    assert a[1] == b[1], f"{what}: structure {b[1]}, expected {a[1]}"
    for x, y in zip(a[0], b[0], strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(y, x, equal_nan=True, msg=lambda text: f"{what}: {text}")
        else:
            assert type(x) is type(y) and (x == y or x != x), f"{what}: {y!r}, expected {x!r}"


def batches(*sizes: tuple[int, ...], seed: int = 0) -> list[tuple[Tensor]]:
    """One call per size, each with a new random tensor."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*size, generator=generator),) for size in sizes]
