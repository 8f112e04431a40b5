"""What a step returns without having made it: tensors and objects of the model, and tensors that nobody saw being made."""

from __future__ import annotations

from typing import Any

import torch

from graphs.contract.operators import storage_id
from graphs.contract.outputs import map_output
from graphs.contract.python_state import Link, PythonState
from graphs.errors import UnsupportedOutput
from graphs.watch import Trace

Tensor = torch.Tensor


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors with memory of their own in an output."""
    found: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
            found.append(value)
        return value

    map_output(output, leaf)
    return found


def adopt_returned(trace: Trace, output: Any, python: PythonState) -> None:
    """Count tensors that the step returns without reading them (a weight, a cache) among those it reads in place."""
    owned = {storage_id(owner.value): owner.value for owner in python.owners if owner.value.layout == torch.strided}
    for tensor in tensors_of(output):
        storage = storage_id(tensor)
        if storage in owned and storage not in trace.origins:
            trace.externals.setdefault(storage, owned[storage])
            trace.origins[storage] = ("external", storage)


def unobserved(trace: Trace, output: Any) -> UnsupportedOutput | None:
    """The refusal for an output tensor that no operator of the step made, as far as it was watched; None where there is none.

    Another thread made it, or code below the dispatcher: a replay would hand out the one that it made while recording.
    """
    for tensor in tensors_of(output):
        if storage_id(tensor) not in trace.origins:
            detail = f"no operator that this thread ran made an output tensor{tuple(tensor.shape)}"
            remedy = "compute it in the thread that calls the step, or register what makes it as an operator of torch.library"
            return UnsupportedOutput(detail, operator="output", remedy=remedy)
    return None


def links_to(objects: list[Any], python: PythonState) -> list[Link]:
    """Where objects hang that are handed out as they are: they have to be the same at every call."""
    wanted = {id(value) for value in objects}
    return [
        Link(place.form.format(key), place.container, key, value, registered=False, parent=None)
        for place in python._places
        if place.container is not None and isinstance(place.content, dict)
        for key, value in place.content.items()
        if id(value) in wanted
    ]
