"""One call of a model, as it is made where nothing stands in front of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from graphs.generation.caches.fixed_caches import named_cache

STATE = "_graphs_accelerated"
"""The attribute of an accelerated model that keeps what stands in front of it."""


def call(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``model.forward`` was before the model was accelerated: a hook of another library, or the method of its class.

    For one token of each row it is called in the way that the model's cache wants.
    """
    state = vars(model).get(STATE)
    own = state.own.get("forward") if state is not None else None
    forward = own if own is not None else functools.partial(type(model).forward, model)  # no new method: Dynamo makes none
    if state is not None and not state.states.is_empty:
        with state.states.steady():
            return forwarded(forward, args, kwargs)
    return forwarded(forward, args, kwargs)


def forwarded(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives that is made in the way that the cache wants."""
    decode_step = getattr(named_cache(kwargs)[1], "decode_step", None)
    if decode_step is None:  # nothing in between for a compiler to look at
        return forward(*args, **kwargs)
    given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    tokens = next((one.shape[1] for one in given if one is not None), 0)
    with decode_step(tokens, kwargs) as wanted:
        return forward(*args, **wanted)


class DecodeStep(torch.nn.Module):
    """One call of a model, without what `accelerate` puts in front."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, but for what was handed in; see `with_arguments`."""
        output = call(self.model, *args, **kwargs)
        apart = _handed_through(output, kwargs)
        return type(output)(**{name: value for name, value in output.items() if name not in apart}) if apart else output


def with_arguments(output: Any, kwargs: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The output of a `DecodeStep` with the lists that the model hands through, which a recording is not to make anew."""
    return type(output)(**{**output, **{name: kwargs[name] for name in names}}) if names else output


def _handed_through(output: Any, kwargs: dict[str, Any]) -> list[str]:
    """The names by which an output holds a list that is an argument of the same name."""
    if not isinstance(output, dict):
        return []
    return [name for name, value in kwargs.items() if isinstance(value, list) and output.get(name) is value]
