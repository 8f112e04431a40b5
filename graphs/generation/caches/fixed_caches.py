"""Caches of fixed storage for ``generate()``, kept from one call to the next.

The default cache of transformers grows with each token, so that no decode step repeats. Where the caller asks for no cache of his
own, one of fixed storage takes its place: it is as long as the whole sequence may become, in steps of `STEP` positions, and
emptied and used again by the next call of the same batch, length and dtype. What is attended to is the same: positions that were
not written are masked.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensor = torch.Tensor
CACHES = ("cache", "past_key_values")  # what the argument is called, from transformers 5.24 on and before
STEP = 64
"""Positions by which lengths of caches differ, so that prompts of other lengths find one that is there."""
_LONGEST = "_previous_max_cache_length"  # of the model's attributes
_KEPT = 8  # caches that nobody uses
_logger = logging.getLogger("graphs")


class FixedCaches:
    """The caches of one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[Any, Any]] = []

    def take(self, key: Any) -> Any | None:
        """A cache that nobody uses, emptied; None where there is none."""
        with self._lock:
            index = next((index for index, (known, _) in enumerate(self._free) if known == key), None)
            if index is None:
                return None
            cache = self._free.pop(index)[1]
        cache.reset()
        return cache

    def give(self, key: Any, cache: Any) -> None:
        """Take a cache back."""
        with self._lock:
            self._free = [*self._free[1 - _KEPT :], (key, cache)]


def named_cache(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """The cache among the arguments of a call, and what it is called; empty where there is none."""
    return next(((name, arguments[name]) for name in CACHES if arguments.get(name) is not None), ("", None))


def is_fixed(cache: Any) -> bool:
    """Whether each step finds the cache where the last one left it."""
    return cache is not None and bool(getattr(cache, "is_compileable", False)) and type(cache).__name__ != "DynamicCache"


def places_of(held: Any, depth: int = 5) -> list[Any]:
    """Where the tensors of a cache lie, with their shapes: a cache of unknown class is fixed if a step leaves them there."""
    if isinstance(held, Tensor):
        return [(held.data_ptr(), held.shape, held.stride())]
    parts = held if isinstance(held, (list, tuple)) else held.values() if isinstance(held, dict) else _attributes(held)
    return [place for part in parts for place in places_of(part, depth - 1)] if depth else []


def _attributes(held: Any) -> Any:
    return () if isinstance(held, type) else getattr(held, "__dict__", {}).values()


def is_filled(cache: Any) -> bool:
    """Whether a call has written to the cache; a model may be handed one that it does not use."""
    layers = layers_of(cache)
    return not layers or any(getattr(layer, "is_initialized", True) for layer in layers)


def capacity(length: int) -> int:
    """Positions of the cache for sequences of ``length``: the next multiple of `STEP`."""
    return -(-length // STEP) * STEP


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives states on a device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def can_grow_from(cache: Any, theirs: Any) -> bool:
    """Whether what a fixed cache holds can be handed out as one that grows: keys and values by position, and nothing else."""
    pairs = getattr(cache, "layers", []), getattr(theirs, "layers", None) or []
    kinds = {type(layer).__name__ for layer in pairs[0]}
    grown = {type(layer).__name__ for layer in pairs[1]} or {"DynamicLayer"}
    return kinds == {"StaticLayer"} and grown == {"DynamicLayer"} and type(theirs).__name__ == "DynamicCache"


def grown_from(cache: Any, theirs: Any) -> Any:
    """``theirs``, which was empty, with what was written to a fixed cache."""
    length = int(cache.get_seq_length())
    for index, layer in enumerate(cache.layers):
        theirs.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
    return theirs


def reorder_in_place(cache: Any) -> None:
    """Have beams reordered within the storage of a cache."""
    if getattr(cache, "reorders_in_place", False):
        return
    for layer in layers_of(cache):
        layer.reorder_cache = functools.partial(_reorder, layer)


def layers_of(cache: Any) -> list[Any]:
    """The layers of a cache; of a pair, those of both."""
    pair = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for one in (pair if pair[0] is not None else [cache]) for layer in getattr(one, "layers", [])]


def _reorder(layer: Any, beams: Tensor) -> None:
    """As the layer does it; what it put into new tensors is copied to where the old ones are."""
    places = [(held, key, value) for held in _holders(layer) for key, value in held.items() if isinstance(value, Tensor)]
    type(layer).reorder_cache(layer, beams)
    for held, key, value in places:
        if held[key] is not value:
            value.copy_(held[key])
            held[key] = value


def _holders(layer: Any) -> list[dict[Any, Any]]:
    """The attributes of a layer, and those of them that hold several states by number."""
    attributes = vars(layer)
    return [attributes, *(value for value in attributes.values() if isinstance(value, dict))]


def made_fixed(make: Callable[[Any], None], config: Any, length: int, model: torch.nn.Module) -> bool:
    """Whether ``make``, given a generation config that asks for one, made a cache of fixed storage; a model may have none.

    A model notes how long such a cache was, and makes none that is shorter any more: the note is put aside, and left as it was.
    """
    changed = copy.copy(config)
    changed.cache_implementation, changed.max_cache_len = "static", capacity(length)
    noted = vars(model).pop(_LONGEST, None)
    try:
        make(changed)
    except (KeyError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        _logger.info("graphs: no cache of fixed storage: %s: %s", type(error).__name__, error)
        return False
    finally:
        vars(model).pop(_LONGEST, None)
        if noted is not None:
            vars(model)[_LONGEST] = noted
    return True
