"""What a step returns without having made it: tensors and objects of the model, and tensors that nobody saw being made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphs.contract.outputs.template import map_output, tensor_refusal
from graphs.errors import AutogradInput, Refusal, UnsupportedOutput
from graphs.objects.keys import objects_on
from graphs.objects.raw_access import of_type
from graphs.observation.operations import EagerTrace
from graphs.state.python_state import Link, PythonState
from graphs.state.storage import storage_id

Tensor = torch.Tensor


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors with memory of their own in an output."""
    found: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if of_type(value, Tensor) and value.layout == torch.strided and value.numel():
            found.append(value)
        return value

    map_output(output, leaf)
    return found


def unreturnable(output: Any, given: Callable[[Any], bool]) -> Refusal | None:
    """The refusal for an output that no replay can make; None where there is nothing of the kind.

    Args:
        given: whether a part was not made by the step: an argument, or an object that hangs on the model.
    """
    found: list[Refusal] = []

    def leaf(value: Any) -> Any:
        if of_type(value, Tensor) and not given(value):
            refusal = tensor_refusal(value) or _hanging(value)
            found.extend([refusal] if refusal is not None else [])
        return value

    try:
        map_output(output, leaf, given=given)
    except UnsupportedOutput as refusal:
        return refusal
    except Exception as error:  # of a class of the user's
        detail = f"the output cannot be put together from its parts: {type(error).__name__}: {error}"
        return UnsupportedOutput(detail, operator="output")
    return found[0] if found else None


def _hanging(tensor: Tensor) -> Refusal | None:
    if tensor.grad_fn is not None:
        return AutogradInput("an output requires a gradient: the step turned gradients on", operator="output")
    objects = objects_on(tensor)
    if objects:
        detail = f"{objects[0]} is set on an output tensor, a {type(tensor.__dict__[objects[0]]).__name__}"
        return UnsupportedOutput(detail, operator=f"output.{objects[0]}", remedy="return it beside the tensor")
    return None


def adopt_returned(trace: EagerTrace, output: Any, python: PythonState) -> None:
    """Count tensors that the step returns without reading them (a weight, a cache) among those it reads in place."""
    owned = {storage_id(owner.value): owner.value for owner in python.owners if owner.value.layout == torch.strided}
    for tensor in tensors_of(output):
        storage = storage_id(tensor)
        if storage in owned and storage not in trace.origins:
            trace.externals.setdefault(storage, owned[storage])
            trace.origins[storage] = ("external", storage)


def unobserved(trace: EagerTrace, output: Any) -> UnsupportedOutput | None:
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
        Link(cell.form.format(key), cell.container, key, value, parent=None)
        for cell in python.cells
        if cell.container is not None and isinstance(cell.content, dict)
        for key, value in cell.content.items()
        if id(value) in wanted
    ]
