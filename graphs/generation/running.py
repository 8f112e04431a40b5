"""One call of ``generate()``: the caches it was lent, which calls are decode steps, what of the loop is not transformers'."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from graphs.generation.caches.call_kinds import Kind
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
        kind: of what the prompt is given.
        remedy: what would let it be lent a cache; empty where it may be.
        begins_anew: whether the last call, though not the first one, found no cache that an earlier one filled.
    """

    def __init__(self, stay_put: set[type[Any]], *, lends: bool = True) -> None:
        self.lends = lends
        self.lent: list[tuple[Any, Any]] = []
        self.theirs: dict[int, Any] = {}
        self.lent_again = 0
        self.kind: Kind = frozenset()
        self.remedy = ""
        self.begins_anew = False
        self._stay_put = stay_put
        self._begun: dict[int, tuple[Any, list[Any]]] = {}
        self._calls = 0
        self._returned: dict[str, Any] = {}

    def has_lent(self, cache: Any) -> bool:
        """Whether a cache was lent to the call."""
        return any(cache is one for _, one in self.lent)

    def returned(self, output: Any) -> Any:
        """The output of a call; what of it the next call is handed by the same name is the model's state."""
        if isinstance(output, dict):
            self._returned = {name: value for name, value in output.items() if isinstance(value, (list, tuple))}
        return output

    def handed_through(self, kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Lists that the model returned by the name of the argument that they are handed in by."""
        return tuple(name for name, value in kwargs.items() if isinstance(value, list) and value is self._returned.get(name))

    def seen(self, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None, bool]:
        """The cache and the tokens of a call, and whether an earlier call filled the cache: else this is the prompt's."""
        cache = named_cache(kwargs)[1]
        if cache is None:  # a model may call its state otherwise
            cache = next(
                (value for name, value in kwargs.items() if value is not None and value is self._returned.get(name)), None
            )
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


def sets_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a stopping criterion of the caller's stands for the largest length, which ``generate()`` makes a cache for."""
    criteria = kwargs.get("stopping_criteria") or (args[3] if len(args) > 3 else None) or ()
    return any(hasattr(one, "max_length") for one in criteria)


def own_method(kind: type[Any]) -> str | None:
    """A method of the loop's that a class of models does not have from transformers' base class.

    What a model prepares for a token may depend on all tokens before it, of which the step shows it the last one.
    """
    library = sys.modules.get("transformers.generation.utils")
    if library is None:
        return "generate"
    base = library.GenerationMixin
    known = ("generate", "prepare_inputs_for_generation", "_sample", "_prefill")
    names = (*known, "_update_model_kwargs_for_generation", "_has_unfinished_sequences")
    own = [name for name in names if getattr(kind, name, None) is not getattr(base, name, None)]
    own += [name for name in names if not is_written_by(getattr(base, name, None), ("transformers", "torch"))]
    own += ["__call__"] if kind.__call__ is not torch.nn.Module.__call__ else []
    return own[0] if own else None


def is_written_by(function: Any, packages: tuple[str, ...]) -> bool:
    """Whether the code of a function lies in one of these packages: a program may have put its own in place of a library's."""
    code = getattr(function, "__code__", None)
    if code is None:
        return True  # there is none, or it is one of C
    roots = [getattr(sys.modules.get(package), "__file__", None) for package in packages]
    return any(root is not None and code.co_filename.startswith(root.rpartition("/")[0] + "/") for root in roots)


def depends_on_cache(model: torch.nn.Module, generation_config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why a call would show which cache there is, in words; empty if it would not.

    Attentions are as wide as the cache, losses of routers are computed from its mask, and dropout draws for its positions.
    """
    settings = (getattr(model, "config", None), generation_config)
    for name in ("output_attentions", "output_router_logits"):
        if model_kwargs.get(name) or any(getattr(one, name, None) for one in settings):
            return f"leave {name} out: what it returns is as wide as the cache"
    drawing = next((module for module in modules_of(model) if module.training and _may_draw(module)), None)
    if drawing is None:
        return ""
    path = next((path for path, module in model.named_modules() if module is drawing), "") or type(model).__name__
    return f"call eval(): {path!r} is in training mode and may draw dropout"


def modules_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """As ``model.modules()``, in a fifth of the time: it is gone through at each call."""
    seen, pending = {model}, [model]
    while pending:
        module = pending.pop()
        yield module
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


_QUIET = tuple(f"torch.nn.modules.{name}" for name in ("container", "conv", "linear", "normalization", "sparse"))


def _may_draw(module: torch.nn.Module) -> bool:
    """Whether a module may do something else in training: all but what torch has without dropout."""
    kind = type(module)
    if kind.__module__ == "torch.nn.modules.dropout":
        return bool(getattr(module, "p", 1.0))
    return kind.__module__ not in _QUIET


_LOOPS = ("prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers", "constraints", "force_words_ids")


def has_other_loop(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for a loop that is given more than a custom one is, so that it is not begun twice."""
    settings = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    return any(kwargs.get(name) or any(getattr(one, name, None) for one in settings) for name in _LOOPS)


_FORM = (
    "_attn_implementation",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "sliding_window",
)


def layout_of(model: Any) -> tuple[Any, ...]:
    """What the form of a model's cache depends on: its configuration, its dtypes, and what stands in front of it."""
    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None)
    held = (parameter for module in modules_of(model) for parameter in module._parameters.values())
    dtypes = frozenset(parameter.dtype for parameter in held if parameter is not None)
    forward = vars(model).get("forward")
    front = type(model), type(model).forward, getattr(forward, "__func__", None)
    return *(getattr(text, name, None) for name in _FORM), None if kinds is None else tuple(kinds), dtypes, front
