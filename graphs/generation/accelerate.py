"""`accelerate`: the ``generate()`` of a model of transformers on recordings; nothing else about the model changes."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from graphs.config import CaptureConfig
from graphs.dispatch.captured_module import CapturedModule, CapturedStep, capture
from graphs.eager_mode import forced_by
from graphs.errors import ChangingValue, ConfigError, HostSync
from graphs.generation.cache_trial import PASSING
from graphs.generation.caches.fixed_caches import (
    CACHES,
    grown_from,
    is_fixed,
)
from graphs.generation.caches.lending import Lending, Wanted
from graphs.generation.decode_step import STATE, DecodeStep, with_arguments
from graphs.generation.loop import Loop, Request
from graphs.generation.module_states import ModuleStates
from graphs.generation.prompts import Prompts
from graphs.generation.running import Generation, has_other_loop, held_by, own_method, sets_length
from graphs.report import CaptureReport, merged

Tensor = torch.Tensor
Model = TypeVar("Model", bound=torch.nn.Module)
_MOST = 16  # tokens of one call that is a decode step: candidates of assisted decoding are checked together
_PLAIN = 5  # arguments of generate() by position before those for other loops
_ELSEWHERE = frozenset(
    {"custom_generate", "synced_gpus", "assistant_model", "streamer", "tokenizer", "assistant_tokenizer", "trust_remote_code"}
)
"""Arguments of ``generate()`` that a custom loop is not given."""
_METHODS = {
    "forward": "forward",
    "generate": "generate",
    "get_compiled_call": "get_compiled_call",
    "_prepare_cache_for_generation": "prepare_cache",
}
"""Methods of a model, and what of `Accelerated` stands in front of them."""


def accelerate(model: Model, **capture_options: Any) -> Model:
    """Serve the decode steps of ``model.generate()`` by recordings. The same object is returned, and goes on being what it is.

    Greedy decoding and sampling run on a step that feeds itself, where nothing between two tokens needs the host. Prompts run
    eagerly, but for a few shapes that come again on a device. A decode step runs on a cache of fixed storage, which takes the
    place of the default one and is kept for the next call; a cache that the caller passes or names stays what it is, and its
    steps are recorded where its storage is fixed. A step whose cache grows runs eagerly, and is counted by that reason.
    `restore` undoes it, `accelerated_report` tells what was recorded and why not.

    Args:
        model: a model of transformers that can generate.
        capture_options: as of `graphs.capture`.

    Raises:
        ConfigError: the model cannot generate, or an option is not legal.
    """
    if not callable(getattr(model, "generate", None)) or not isinstance(model, torch.nn.Module):
        raise ConfigError("model", type(model).__name__, "a model with generate(), as those of transformers")
    restore(model)
    config = capture(model, **capture_options)._graphs_recordings.config
    return put_in_front(model, config)


def put_in_front(model: Model, config: CaptureConfig) -> Model:
    """`accelerate`, with settings that were resolved already."""
    vars(model)[STATE] = state = Accelerated(model, config, methods_in_front(model))
    vars(model).update(state.replacements())
    return model


def methods_in_front(model: torch.nn.Module) -> dict[str, Any]:
    """Of the methods that are exchanged, those that somebody put in front of the model's class already."""
    return {name: vars(model)[name] for name in _METHODS if name in vars(model)}


def restore(model: Model) -> Model:
    """Take back what `accelerate` did to a model; nothing, if it did nothing."""
    state = vars(model).pop(STATE, None)
    if state is not None:
        for name in _METHODS:
            vars(model).pop(name, None)
        vars(model).update(state.own)
    return model


def accelerated_report(model: torch.nn.Module) -> CaptureReport:
    """What was recorded of the decode steps of a model, and why others run eagerly.

    Raises:
        ConfigError: `accelerate` was not called for it.
    """
    state = vars(model).get(STATE)
    if state is None:
        raise ConfigError("model", type(model).__name__, "a model that graphs.accelerate was called for")
    report: CaptureReport = state.report()
    return report


class Accelerated:
    """What `accelerate` keeps of one model, and makes anew for a copy of it.

    Args:
        model: of transformers.
        config: of the captured steps.
        own: methods that stood in front of the model's class already, as hooks of other libraries put them there.
    """

    def __init__(self, model: torch.nn.Module, config: CaptureConfig, own: dict[str, Any]) -> None:
        self._model, self._config, self.own = model, config, own
        self._stay_put: set[type[Any]] = set()  # classes of caches that steps were seen to leave where they are
        self.states = ModuleStates(model)
        self._lending = Lending(model, self.states)
        self.loop = Loop(model, config, self.states)
        self.prompts = Prompts(model, config)
        self._running: ContextVar[Generation | None] = ContextVar("graphs_generation", default=None)

    @functools.cached_property
    def step(self) -> CapturedStep[Any, Any]:
        """The captured step; made when it is first needed, for a model that is being copied is not there yet."""
        return CapturedModule(DecodeStep(self._model), self._config)

    def report(self) -> CaptureReport:
        """What was recorded of its steps, prompts and loops."""
        return merged([self.step.report(), *self.prompts.reports(), *(step.report() for step in self.loop.steps())])

    @property
    def _device(self) -> torch.device:
        device: Any = self._model.device
        return torch.device(device)

    def replacements(self) -> dict[str, _Replacement]:
        """What stands in front of the methods of the class, by name."""
        return {name: self.replacement(name) for name in _METHODS if hasattr(type(self._model), name)}

    def replacement(self, name: str) -> _Replacement:
        """What is called in place of a method."""
        original = self.own.get(name) or types.MethodType(getattr(type(self._model), name), self._model)
        return _Replacement(self, name, original)

    def forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""
        running = self._running.get()
        if running is None or self.step.mode == "eager":
            return original(*args, **kwargs)
        cache, tokens, begun = running.seen(kwargs)
        if running.begins_anew:
            detail = "there is no cache that a call before filled: each reads the whole sequence, or has state of another kind"
            self._refuse(detail, "pass use_cache=True, where the model has a cache")
        if cache is None or tokens is None or running.begins_anew:
            return running.returned(original(*args, **kwargs))
        if not begun:
            return self._prompt(original, running, cache, tokens, args, kwargs)
        if tokens.shape[1] > _MOST:
            return original(*args, **kwargs)
        if is_fixed(cache) or type(cache) in self._stay_put:
            self.states.begin()
            return running.returned(with_arguments(self.step(*args, **kwargs), kwargs, running.handed_through(kwargs)))
        detail = f"a {type(cache).__name__} grows with each token, so that no step is like another"
        remedy = "nothing, where the model has no cache of fixed storage; else pass none, or cache_implementation='static'"
        self._refuse(detail, running.remedy or remedy)
        return original(*args, **kwargs)

    def _prompt(
        self, original: Any, running: Generation, cache: Any, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call that fills a cache.

        Raises:
            _UnfitCache: it fails, of a kind that never ran on a cache that was lent, and not for want of memory.
        """
        if is_fixed(cache) and running.lent_again == id(cache) and self.prompts.wanted(tokens, cache):
            return self.prompts.replayed(tokens, cache, args, kwargs)
        try:
            result = running.returned(original(*args, **kwargs))
        except Exception as error:
            if isinstance(error, PASSING) or running.kind in self._lending.fitting or not running.has_lent(cache):
                raise
            raise _UnfitCache(error) from error
        if running.has_lent(cache):
            self._lending.fitting.add(running.kind)
        return result

    def _refuse(self, detail: str, remedy: str) -> None:
        """Count a step that runs eagerly, and warn about it once."""
        log = self.step._graphs_recordings.call_log
        with log.warning_after():
            log.refused(ChangingValue(detail, operator="cache", remedy=remedy))

    def generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's; caches that it lent come back unless they are handed out."""
        running = Generation(self._stay_put, lends=not sets_length(args, kwargs) and kwargs.get("custom_generate") is None)
        token = self._running.set(running)
        try:
            result = self._generated(original, args, kwargs, running)
        except _UnfitCache as unfit:
            if kwargs.get("streamer") is not None:  # which has the prompt already
                self._lending.unfit.add(running.kind)
                raise unfit.error from unfit.error.__cause__
            self._running.set(Generation(self._stay_put, lends=False))
            result = original(*args, **kwargs)  # with a cache of its own, or the same error
            self._lending.unfit.add(running.kind)
            return result
        finally:
            self._running.reset(token)
            self.states.end()
        for name in CACHES:
            theirs = running.theirs.get(id(getattr(result, name, None)))
            if theirs is not None:
                setattr(result, name, grown_from(getattr(result, name), theirs))
        handed_out = held_by(result)
        for key, cache in running.lent:
            if id(cache) not in handed_out:
                self._lending.caches.give(key, cache)
        return result

    def _generated(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any], running: Generation) -> Any:
        """What ``generate()`` returns; its loop is ours where nothing in the call is for another."""
        if len(args) > _PLAIN or not _ELSEWHERE.isdisjoint(name for name, value in kwargs.items() if value is not None):
            return original(*args, **kwargs)
        if self.step.mode == "eager" or forced_by() or has_other_loop(self._model, kwargs):
            return original(*args, **kwargs)
        own = self._replaced() or own_method(type(self._model))
        if own is not None:
            self._say_host_part(f"{own} of the model's own")
            return original(*args, **kwargs)
        try:
            return original(*args, **{**kwargs, "custom_generate": functools.partial(self._decoded, running)})
        except _OtherLoop:
            return original(*args, **kwargs)

    def _decoded(
        self,
        running: Generation,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """The loop of one ``generate()``: ours, or transformers'.

        Raises:
            _OtherLoop: it is one that is given more than a custom loop is.
        """
        loops = {"greedy_search": "_sample", "sample": "_sample", "beam_search": "_beam_search", "beam_sample": "_beam_search"}
        name = loops.get(generation_config.get_generation_mode(None).value)
        if name is None or not hasattr(type(model), name):
            raise _OtherLoop
        theirs = getattr(type(model), name)
        if name == "_sample":
            request = Request(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            handed_out = not running.has_lent(request.cache()[1]) or bool(generation_config.return_dict_in_generate)
            result = self.loop.run(request, theirs, handed_out=handed_out)
            if not isinstance(result, str):
                return result
            if result:
                self._say_host_part(result)
        return theirs(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    def _say_host_part(self, part: str) -> None:
        """Tell, once as a warning, why transformers' own loop runs."""
        why = HostSync(f"between two tokens the host is needed for: {part}", operator="generate")
        self.step._graphs_recordings.call_log.recorded_otherwise(why, "each step is replayed by itself")

    def _replaced(self) -> str | None:
        """A method that somebody put in front of the model's class since, and that the loop of transformers would call."""
        kind, mine = type(self._model), vars(self._model)
        names = [name for name, value in mine.items() if not isinstance(value, _Replacement) and callable(value)]
        methods = [name for name in names if callable(getattr(kind, name, None))]
        return methods[0] if methods else None

    def get_compiled_call(self, original: Any, compile_config: Any = None) -> Any:
        """What the loop calls for a token: the model itself, unless the caller says how to compile it."""
        return original(compile_config) if compile_config is not None else self._model.__call__

    def prepare_cache(
        self, original: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, length: int
    ) -> Any:
        """Make a cache of fixed storage, or lend one that is there, where the caller asks for none of his own."""
        running = self._running.get()
        wanted = Wanted(original, generation_config, model_kwargs, mode, batch_size, length)
        if running is None or not running.lends or not self._lending.lend(running, wanted):
            return original(generation_config, model_kwargs, mode, batch_size, length)
        return None

    def __graphs_walk__(self) -> Any:
        """What belongs to the model's state: a first call must not put back what is noted here of caches and loops in use."""
        return self.own

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerated:
        twin = type(self)(copy.deepcopy(self._model, memo), self._config, copy.deepcopy(self.own, memo))
        return memo.setdefault(id(self), twin)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model, self._config, self.own)


class _Replacement:
    """A method of an accelerated model; it looks like the one that it stands for."""

    def __init__(self, state: Accelerated, name: str, original: Any) -> None:
        functools.update_wrapper(self, original)
        self.__signature__ = inspect.signature(original)
        self.__func__ = getattr(original, "__func__", original)
        self.__wrapped__ = getattr(self.__func__, "__wrapped__", self.__func__)
        self._state, self._name, self._original = state, name, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._state._model
        original = self._state.own.get(self._name) or types.MethodType(getattr(type(model), self._name), model)  # as it is by now
        return getattr(self._state, _METHODS[self._name])(original, *args, **kwargs)

    def __graphs_walk__(self) -> Any:
        """The method that it stands for."""
        return self._original

    def __deepcopy__(self, memo: dict[int, Any]) -> _Replacement:
        return copy.deepcopy(self._state, memo).replacement(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Accelerated.replacement, (self._state, self._name)


class _OtherLoop(Exception):
    """A loop of transformers that a custom one cannot stand for."""


class _UnfitCache(Exception):
    """A prompt fails with a cache that was lent.

    Attributes:
        error: what it raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
