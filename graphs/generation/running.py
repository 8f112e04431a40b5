"""One call of ``generate()`` while it runs: which caches it was lent, and which of its calls are decode steps."""

from __future__ import annotations

from typing import Any

import torch

from graphs.generation.caches.fixed_caches import is_filled, is_fixed, named_cache, places_of

Tensor = torch.Tensor
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")


class Generation:
    """One call of ``generate()``.

    Attributes:
        lends: whether the length that a cache needs is known beforehand.
        lent: caches of fixed storage that it was given, with what they are kept by.
        theirs: by the identity of a lent cache, the one that transformers would hand out in its place, empty.
        lent_again: the identity of one that an earlier call has used.
        begins_anew: whether the last call, though not the first one, found no cache that an earlier one filled.
    """

    def __init__(self, stay_put: set[type[Any]], *, lends: bool = True) -> None:
        self.lends = lends
        self.lent: list[tuple[Any, Any]] = []
        self.theirs: dict[int, Any] = {}
        self.lent_again = 0
        self.begins_anew = False
        self._stay_put = stay_put
        self._begun: dict[int, tuple[Any, list[Any]]] = {}
        self._calls = 0

    def seen(self, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None, bool]:
        """The cache and the tokens of a call, and whether an earlier call filled the cache: else this is the prompt's."""
        cache = named_cache(kwargs)[1]
        tokens = next((kwargs[name] for name in reversed(_TOKENS) if kwargs.get(name) is not None), None)
        first, self._calls = self._calls == 0, self._calls + 1
        if tokens is None:
            self.begins_anew = False
            return cache, None, False
        begun = cache is None or self._is_known(cache) or (not first and type(cache) in self._stay_put)
        self.begins_anew = begun and not first and (cache is None or not is_filled(cache))
        return cache, tokens, begun

    def _is_known(self, cache: Any) -> bool:
        """Whether a call had this cache before; the second time, one of unknown class is looked at."""
        known = self._begun.get(id(cache))
        if known is None or known[1]:
            places = [] if is_fixed(cache) else places_of(cache)
            if known is not None and places == known[1]:
                self._stay_put.add(type(cache))
            self._begun[id(cache)] = cache, places if known is None else []
        return known is not None


def held_by(result: Any, depth: int = 4) -> set[int]:
    """The identities of what is handed out: the result, its attributes, and what containers in it hold."""
    found = {id(result)}
    if not depth or isinstance(result, Tensor):
        return found
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    for part in (*parts, *getattr(result, "__dict__", {}).values()):
        found |= held_by(part, depth - 1)
    return found
