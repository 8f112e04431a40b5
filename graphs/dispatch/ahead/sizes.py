"""From one example to a call of each size, with all that is wrong about them found before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graphs.config import CaptureConfig
from graphs.contract.arguments import Call, Leaves, replace_tensors
from graphs.contract.batch import Dims, declared_dims, grown
from graphs.contract.buckets import batch_size
from graphs.contract.eligibility import SMALL, carries_objects, device_of, inadmissible
from graphs.contract.settings import active_mode
from graphs.dispatch.key_recorder import KeyRecorder
from graphs.errors import AutogradInput, ConfigError, MixedDevices, Refusal
from graphs.state.python_state import PythonState

Example = Any
"""The arguments of one call: a tuple, a dict of keyword arguments, a pair of both, or a function from a size to one of these."""
_FORMS = "a tuple of arguments, a dict of keyword arguments, a pair of both, or a function of the size that returns one of these"


class Sized(NamedTuple):
    """A call of one size.

    Attributes:
        dims: the batch dimension of each tensor leaf; None for all where it is not known.
    """

    size: int
    call: Call
    leaves: Leaves
    dims: Dims


def as_sizes(sizes: Iterable[int] | None, config: CaptureConfig) -> tuple[int, ...]:
    """The sizes to record, the largest first; default: all buckets.

    Raises:
        ConfigError: they are no positive integers, no buckets where there are buckets, or more than may be kept.
    """
    if sizes is None and config.buckets is None:
        raise ConfigError("sizes", None, "positive integers, as there are no buckets= (with batch_dims=) to record")
    try:
        given = tuple(config.buckets or () if sizes is None else sizes)
    except TypeError:
        given = ()
    if not given or any(type(size) is not int or size < 1 for size in given):
        raise ConfigError("sizes", sizes, "a non-empty sequence of positive integers")
    strangers = sorted({*given} - {*(config.buckets or given)})
    if strangers:
        raise ConfigError("sizes", strangers, f"some of the buckets, {', '.join(map(str, config.buckets or ()))}")
    if len({*given}) > config.max_recordings:
        raise ConfigError("max_recordings", config.max_recordings, f"at least {len({*given})}, one for each size")
    return tuple(sorted({*given}, reverse=True))


def arguments_of(example: Example, name: str = "example") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call.

    A pair of a tuple and a dict is both; a step of two arguments that are a tuple and a dict is given ``((a, b), {})``.

    Raises:
        ConfigError: it has another form.
    """
    if isinstance(example, Call):
        return example.args, example.kwargs
    if _is_named(example):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        pair = len(example) == 2 and isinstance(example[0], tuple) and _is_named(example[1])
        return (example[0], dict(example[1])) if pair else (tuple(example), {})
    raise ConfigError(name, type(example).__name__, _FORMS)


def _is_named(value: Any) -> bool:
    return type(value) is dict and all(isinstance(key, str) for key in value)


def calls_of(example: Example, sizes: Sequence[int], keys: KeyRecorder) -> list[Sized]:
    """A call of each size, in the order of ``sizes``: nothing of the step has run.

    Rows are cut off, or the last one is repeated; or the example is a function that is called for each size.

    Raises:
        ConfigError: the batch dimension is not known, or the example has no size along it or another than it was asked for.
        Refusal: a call that cannot be recorded.
    """
    if callable(example):
        made = [keys.flattened(*arguments_of(example(size), f"example({size})")) for size in sizes]
        calls = [Sized(size, call, leaves, (None,) * len(call.tensors)) for size, (call, leaves) in zip(sizes, made, strict=True)]
        calls = _of_their_sizes(calls, keys)
    else:
        calls = _resized(arguments_of(example), sizes, keys)
    for sized in calls:
        refusal = _against(sized, keys)
        if refusal is not None:
            raise refusal
    return calls


def _resized(given: tuple[tuple[Any, ...], dict[str, Any]], sizes: Sequence[int], keys: KeyRecorder) -> list[Sized]:
    call, leaves = keys.flattened(*given)
    dims = _known_dims(call, leaves, keys)
    rows = batch_size([tuple(tensor.shape) for tensor in call.tensors], dims)
    if not rows:
        raise ConfigError("example", f"a batch of {rows or 'no'} rows", "one or more rows along batch_dims, in some argument")
    calls = []
    for size in sizes:
        args, kwargs = replace_tensors(given, iter(grown(call.tensors, dims, size)))
        calls.append(Sized(size, *keys.flattened(args, kwargs), dims))
    return calls


def _known_dims(call: Call, leaves: Leaves, keys: KeyRecorder) -> Dims:
    """The batch dimension of each tensor leaf, declared, or inferred from earlier calls.

    Raises:
        ConfigError: it is neither.
    """
    config, step = keys.config, keys.step(call, leaves)
    if config.buckets is not None:
        plan = keys.batch.plan(call, step.names, config.buckets, config.batch_dims, clamp=True)
        if plan.rows is not None or config.batch_dims is None:
            return plan.dims if plan.rows is not None else _unknown(config)
    return declared_dims(call, step.names, config.batch_dims) if config.batch_dims is not None else _unknown(config)


def _unknown(config: CaptureConfig) -> Dims:
    legal = "the batch dimension of each argument that has rows, as {'input_ids': 0}, unless example is a function of the size"
    raise ConfigError("batch_dims", config.batch_dims, legal)


def _of_their_sizes(calls: list[Sized], keys: KeyRecorder) -> list[Sized]:
    """Calls that a function made, with their batch dimensions where these are known.

    Raises:
        ConfigError: one has not the size that was asked for, or the function gave one call for two sizes.
    """
    declared: Mapping[str, int] | None = keys.config.batch_dims
    known = []
    seen: dict[tuple[Any, ...], int] = {}
    for sized in calls:
        size, call, leaves, dims = sized
        keys.step(call, leaves)  # the settings name its arguments
        if declared is not None:
            dims = declared_dims(call, leaves.tensors, declared)
            rows = batch_size([tuple(tensor.shape) for tensor in call.tensors], dims)
            if rows != size:
                raise ConfigError(
                    f"example({size})", f"a batch of {rows or 'no'} rows", f"a call with {size} rows along batch_dims"
                )
        elif keys.config.buckets is not None:
            _unknown(keys.config)
        other = seen.setdefault(call.signature, size)
        if other != size:
            raise ConfigError(
                f"example({size})", f"a call like example({other})", "a call of its own size, other than the others"
            )
        known.append(sized._replace(dims=dims))
    return known


def _against(sized: Sized, keys: KeyRecorder) -> Refusal | None:
    """Why a call cannot be recorded, as far as that can be said before anything runs."""
    call, leaves = sized.call, sized.leaves
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
        return AutogradInput("a tensor argument requires a gradient", operator="arguments")
    step = keys.step(call, leaves)
    inside = active_mode() or inadmissible(call, step.model, step.host) or carries_objects(call)
    if inside is not None:
        return inside
    device = device_of(call, step.model)
    for link in PythonState(zip(leaves.opaques, call.opaques, strict=True), generators=False, tensors=False).owners:
        other: torch.device = link.value.device
        if other.type != device.type and (other.type != "cpu" or link.value.nbytes > SMALL):
            detail = f"{link.path} is on {other}, and the step runs on {device}"
            return MixedDevices(detail, operator=link.path, remedy=f"make it on {device}: nothing has been recorded")
    return None


def largest_that_fits(sizes: Sequence[int], needed: Callable[[int], int], limit: int) -> str:
    """What a budget would do for, as text."""
    fitting = next((size for size in sorted(sizes, reverse=True) if needed(size) <= limit), None)
    return f"size {fitting} would fit" if fitting is not None else "no size fits"
