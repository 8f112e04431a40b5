"""Caches of fixed storage for models of which transformers makes none: which one a model needs is found by looking at its own."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from graphs.generation.caches.fixed_caches import CACHES


def own_cache(model: torch.nn.Module, theirs: Any, capacity: int, mask: Any = None) -> Any | None:
    """A cache of fixed storage in the place of one that grows; None where there is none.

    Args:
        model: a model of transformers.
        theirs: the cache that transformers made for ``generate()``, or None where it leaves that to the model.
        capacity: positions of the sequence.
        mask: of the prompt, ``[rows, tokens]``, 0 where it is padded.
    """
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return None  # what the layers share would be on the device of the first
    return _compressed(theirs, capacity) if theirs is not None else _linear(model, capacity, mask)


def ending_cache(static: Any, capacity: int) -> Any | None:
    """In the place of a static cache, one whose keys end where the sequence does; None where its layers are of other kinds."""
    from graphs.generation.caches.end_cache import EndCache

    layers = getattr(static, "layers", None) or []
    if not layers or any(type(layer).__name__ != "StaticLayer" for layer in layers):
        return None
    return EndCache(len(layers), capacity)


def cache_argument(model: torch.nn.Module) -> str:
    """What the model calls its cache."""
    known = inspect.signature(type(model).forward).parameters
    return next((name for name in CACHES if name in known), CACHES[0])


def _compressed(theirs: Any, capacity: int) -> Any | None:
    """For layers that compress, beside others that only have a sliding window."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    from graphs.generation.caches.compressed_cache import CompressedCache, LayerKind

    layers = getattr(theirs, "layers", [])
    compress = [hasattr(layer, "store_compression_weights") for layer in layers]
    known = zip(layers, compress, strict=True)
    if not any(compress) or not all(one or type(layer) is DynamicSlidingWindowLayer for layer, one in known):
        return None
    kinds = [
        LayerKind(layer.compress_rate, hasattr(layer, "update_overlap_state")) if one else LayerKind()
        for layer, one in zip(layers, compress, strict=True)
    ]
    seen_whole = {kind.rate for kind in kinds if kind.rate and not kind.chosen}
    windows = {layer.sliding_window for layer in layers}
    return CompressedCache(kinds, windows.pop(), capacity) if len(windows) == 1 and len(seen_whole) <= 1 else None


def _linear(model: torch.nn.Module, capacity: int, mask: Any) -> Any | None:
    """For a model that hands the states of linear attention to a cache class that its own file defines.

    Its own class tells the lengths of the first layer. Where that one has no keys, the model masks a padded prompt as if nothing
    had come before, and a cache that knows better would give other tokens.
    """
    from transformers.cache_utils import DynamicCache

    from graphs.generation.caches.linear_cache import fixed_linear_cache

    kinds = getattr(getattr(model, "config", None), "layer_types", None) or []
    modules = [vars(sys.modules[base.__module__]) for base in type(model).__mro__]
    found = [
        value
        for names in modules
        for value in names.values()
        if isinstance(value, type) and issubclass(value, DynamicCache) and hasattr(value, "set_linear_cache")
    ]
    if not found or "full_attention" not in kinds:
        return None
    if kinds[0] != "full_attention" and mask is not None and not bool((mask != 0).all()):
        return None
    return fixed_linear_cache(found[0])(kinds, capacity)
