"""One call of a model, as it is made where nothing stands in front of it."""

from __future__ import annotations

from typing import Any

import torch

STATE = "_graphs_accelerated"
"""The attribute of an accelerated model that keeps what stands in front of it."""


def call(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``model.forward`` was before the model was accelerated: a hook of another library, or the method of its class."""
    state = vars(model).get(STATE)
    own = state.own.get("forward") if state is not None else None
    return own(*args, **kwargs) if own is not None else type(model).forward(model, *args, **kwargs)


class DecodeStep(torch.nn.Module):
    """One call of a model, without what `accelerate` puts in front."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return call(self.model, *args, **kwargs)
