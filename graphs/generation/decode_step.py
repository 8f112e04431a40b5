"""One call of a model, as it is made where nothing stands in front of it."""

from __future__ import annotations

import types
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
    forward = own if own is not None else types.MethodType(type(model).forward, model)
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
        """As the model's."""
        return call(self.model, *args, **kwargs)
