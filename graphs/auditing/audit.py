"""`audit`: what keeps a step from being recorded, line by line, and what the passes do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphs.auditing.diagnose import diagnose
from graphs.auditing.finding import Finding
from graphs.auditing.observe import observe
from graphs.auditing.report import Audit
from graphs.contract.arguments import flatten_call, named_leaves
from graphs.contract.eligibility import device_of, host_arguments, inadmissible, parameter_names
from graphs.contract.settings import ambient_of
from graphs.eager_mode import forced_eager
from graphs.errors import MixedDevices, UnsupportedArgument
from graphs.first_call.host_arguments import on_device
from graphs.rehearsal.step import Step

__all__ = ["Audit", "Finding", "audit"]


def audit(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Audit:
    """Run a step of ``model`` and list what a recording could not hold, with the line and the remedy.

    Found are host syncs, host constants, data-dependent shapes and branches, unsupported operators, and every value that
    differs between consecutive steps with the same arguments: numbers, shapes, addresses and Python attributes. The step
    runs two or three times in a row, watched, then a few times for the cost of each line and the lines where attributes
    are set. Tensors, Python state and random generators are put back; what it prints or writes to files cannot be.

    It needs no GPU, and finds on a CPU what it would find on one, except what depends on where tensors are: operators that
    mix devices, ``to`` of a device object, and checks that a backend makes on its own.

    Args:
        model: an ``nn.Module``, any callable, or a captured module.
        args, kwargs: the arguments of one step.

    Raises:
        Refusal: a tensor argument is not dense or not on a CPU or GPU, or the current stream is being recorded.
        Exception: what the first step raises; a later step that raises is a finding.
    """
    step = step_of(model, args, kwargs)
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()  # a weight cast in the first step only would look like a change
    torch.set_autocast_cache_enabled(False)
    try:
        with forced_eager("first call"):
            return diagnose(observe(step))
    finally:
        torch.set_autocast_cache_enabled(cached)


def step_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    """A step as `capture` would see it, at the exact sizes of this call.

    Raises:
        Refusal: a tensor argument is not dense or not on a CPU or GPU, or the current stream is being recorded.
    """
    walk = getattr(type(model), "__graphs_walk__", None)
    model = walk(model) if walk is not None else model  # a captured module stands for its model
    try:
        call = flatten_call(args, kwargs, ambient_of(model))
    except (RuntimeError, NotImplementedError) as error:  # a tensor without strides: sparse, nested, mkldnn
        raise UnsupportedArgument(f"{error}".splitlines()[0], operator="arguments") from error
    host = host_arguments(call)
    refusal = inadmissible(call, model, host)
    if refusal is not None and not isinstance(refusal, MixedDevices):
        raise refusal
    leaves = named_leaves(call, parameter_names(model))
    step = Step(
        model=model,
        call=call,
        args=args,
        kwargs=kwargs,
        names=leaves.tensors,
        opaque_names=leaves.opaques,
        static=(),
        padding={},
        device=device_of(call, model),
        host=host,
    )
    return on_device(step) if host else step
