"""Which cache a call of ``generate()`` is lent: one of fixed storage, if the model computes the same with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from graphs.generation.cache_trial import agrees, typed
from graphs.generation.caches.call_kinds import Kind, given_beside_tokens, kind_of
from graphs.generation.caches.fixed_caches import (
    CACHES,
    FixedCaches,
    autocast_of,
    can_grow_from,
    capacity,
    is_fixed,
    made_fixed,
    named_cache,
    reorder_in_place,
)
from graphs.generation.caches.own_caches import cache_argument, ending_cache, own_cache
from graphs.generation.module_states import ModuleStates
from graphs.generation.running import Generation, depends_on_cache, layout_of


class Wanted(NamedTuple):
    """What a model's ``_prepare_cache_for_generation``, which is ``original``, is called with."""

    original: Any
    generation_config: Any
    model_kwargs: dict[str, Any]
    mode: Any
    batch_size: int
    length: int


class _Key(NamedTuple):
    """What a cache is kept by: positions, types of tokens, the form of the model's caches, and all else that it depends on."""

    size: int
    types: tuple[str, ...]
    layout: tuple[Any, ...]
    form: tuple[Any, ...]


class Lending:
    """The caches of one model, and what is known of how it computes with them.

    Args:
        model: of transformers.
        states: what a trial sees its modules being assigned is noted there.

    Attributes:
        caches: those that nobody uses.
        fitting: kinds of prompts that ran on a cache that was lent.
        unfit: those that fail there.
    """

    def __init__(self, model: torch.nn.Module, states: ModuleStates) -> None:
        self._model, self._states = model, states
        self._agrees: dict[Any, bool] = {}  # whether fixed caches of a length may take the place of the model's own
        self._names: dict[_Key, str] = {}  # of the argument that a cache is, where that hangs on nothing else
        self.caches = FixedCaches()
        self.fitting: set[Kind] = set()
        self.unfit: set[Kind] = set()

    def lend(self, running: Generation, wanted: Wanted) -> bool:
        """Put a cache of fixed storage among the arguments of the model, where the caller asks for none of his own."""
        if not self._may_choose(running, wanted):
            return False
        make, key = functools.partial(self._made, wanted), self._key(wanted)
        known = self.caches.take(key)
        named = known is not None and key in self._names
        name, cache = (self._names[key], known) if named else self._fixed_cache(make, wanted.model_kwargs, key) or ("", None)
        handed_out = wanted.generation_config.return_dict_in_generate
        theirs = make(False).get(name) if handed_out and name else None
        if cache is None or (handed_out and not can_grow_from(cache, theirs)):
            if known is not None:
                self.caches.give(key, known)
            return False
        cache = cache if known is None else known
        running.lent_again = id(cache) if known is not None and getattr(cache, "records_prompts", True) else 0
        if theirs is not None:
            running.theirs[id(cache)] = theirs
        reorder_in_place(cache)
        wanted.model_kwargs[name] = cache
        running.lent.append((key, cache))
        return True

    def _made(self, wanted: Wanted, fixed: bool) -> dict[str, Any]:
        """An empty cache by the name of its argument; nothing where the model has none such."""
        kwargs = {name: value for name, value in wanted.model_kwargs.items() if name not in CACHES}

        def make(config: Any) -> None:
            wanted.original(config, kwargs, wanted.mode, wanted.batch_size, wanted.length)

        if not fixed:
            make(wanted.generation_config)
        elif not made_fixed(make, wanted.generation_config, wanted.length, self._model):
            return {}
        return {name: kwargs[name] for name in CACHES if kwargs.get(name) is not None}

    def _may_choose(self, running: Generation, wanted: Wanted) -> bool:
        """Whether the caller leaves it to the model which cache there is."""
        generation_config, model_kwargs = wanted.generation_config, wanted.model_kwargs
        running.kind = kind_of(model_kwargs)
        running.remedy = depends_on_cache(self._model, generation_config, model_kwargs)
        own = named_cache(model_kwargs)[1] is not None
        chosen = generation_config.cache_implementation not in (None, "static") or generation_config.use_cache is False
        assisted = generation_config.is_assistant or "assisted" in str(wanted.mode).lower()
        return not (own or chosen or assisted or running.remedy or running.kind in self.unfit)

    def _key(self, wanted: Wanted) -> _Key:
        """What a cache is kept by."""
        generation_config, model_kwargs, model = wanted.generation_config, wanted.model_kwargs, self._model
        device = torch.device(model.device)  # type: ignore[call-overload]
        rows = wanted.batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        encoded = model_kwargs.get("encoder_outputs")
        encoded_length = None if encoded is None else encoded[0].shape[1]
        inference = torch.is_inference_mode_enabled()  # whose tensors cannot be written outside of it
        given = encoded_length, given_beside_tokens(model_kwargs)
        form = rows, given, model.dtype, device, inference, autocast_of(device)
        return _Key(capacity(wanted.length), typed(model_kwargs), layout_of(model), form)

    def _fixed_cache(
        self, make: Callable[[bool], dict[str, Any]], model_kwargs: dict[str, Any], key: _Key
    ) -> tuple[str, Any] | None:
        """An empty cache of fixed storage with the name of its argument: as transformers makes it, or one of this project."""
        made = make(True)
        if any(map(is_fixed, made.values())):
            name, cache = made.popitem()
            if self._may_lend("", make, model_kwargs, key):
                self._names[key] = name
                return name, cache

            def ending(fixed: bool) -> dict[str, Any]:
                return {name: ending_cache(cache, key.size)} if fixed else make(False)

            other = ending_cache(cache, key.size)
            if other is None or not self._may_lend("end", ending, model_kwargs, key):
                return None
            self._names[key] = name
            return name, other
        name, cache = next(iter(make(False).items()), (cache_argument(self._model), None))
        cache = own_cache(self._model, cache, key.size, model_kwargs.get("attention_mask"))
        return None if cache is None else (name, cache)

    def _may_lend(self, kind: str, make: Callable[[bool], dict[str, Any]], model_kwargs: dict[str, Any], key: _Key) -> bool:
        """Whether the model computes the same with a fixed cache of that many positions; tried once for each kind of mask."""
        tried = kind, key.size, key.types, key.layout
        if tried not in self._agrees:
            found = agrees(self._model, make, model_kwargs, self._states)
            if found is None:
                return False
            self._agrees[tried] = found
        return self._agrees[tried]
