"""The loop of greedy decoding and sampling, on recordings of a step that feeds itself.

transformers' own loop makes the prompt's call and chooses the first token; from there on a `TokenStep` is called as often as
tokens are wanted. The host is needed neither between two tokens nor to see the end (`LateStop`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphs.config import CaptureConfig
from graphs.dispatch.captured_module import CapturedModule, CapturedStep
from graphs.generation.caches.fixed_caches import CACHES, autocast_of, capacity, is_fixed, named_cache
from graphs.generation.late_stop import LateStop
from graphs.generation.module_states import ModuleStates
from graphs.generation.processors import Prepared, is_theirs, prepare, value_key
from graphs.generation.running import is_written_by
from graphs.generation.token_step import Begin, Choice, Names, Sequences, TokenStep
from graphs.report import CaptureReport

Tensor = torch.Tensor
_TYPES = ("token_type_ids", "mm_token_type_ids")  # arguments that grow with the tokens
_TOLD = ""  # a reason that each step tells by itself
_SETTINGS = 4  # for one form of sequences that are recorded when they first come
_REMEMBERED = 1024
_TRIES = 3  # of one key, before it is decoded step by step
_OF_ALL_MODULES = ("_global_forward_hooks", "_global_forward_pre_hooks")
_STOPS = ("MaxLengthCriteria", "EosTokenCriteria")


@dataclass(frozen=True)
class Request:
    """One call of ``generate()`` that is decoded greedily or sampled, as transformers hands it to its loop."""

    tokens: Tensor
    processors: Any
    criteria: Any
    config: Any
    arguments: dict[str, Any]

    def cache(self) -> tuple[str, Any]:
        """The cache, and what it is called; empty where there is none."""
        return named_cache(self.arguments)

    def ends(self) -> Tensor | None:
        """The ids that end a row."""
        stops = [one for one in self.criteria if type(one).__name__ == "EosTokenCriteria"]
        return stops[0].eos_token_id.to(self.tokens.device, copy=True) if stops else None

    def grown(self, tokens: Tensor) -> dict[str, Any]:
        """The arguments of the model once ``tokens`` follow, as transformers' loop leaves them."""
        grown, more = dict(self.arguments), tokens.shape[1] - self.tokens.shape[1]
        for name, value in self.arguments.items():
            if name in _TYPES and value is not None:
                added = value[:, -1:].expand(-1, more) if name == _TYPES[0] else value.new_zeros(value.shape[0], more)
                grown[name] = torch.cat([value, added], -1)
        names = self.names
        if (mask := grown.get(names.mask)) is not None:
            grown[names.mask] = torch.cat([mask, mask.new_ones(mask.shape[0], more)], -1)
        if (positions := grown.get(names.positions)) is not None:
            next_ones = positions[..., -1:] + torch.arange(1, more + 1, dtype=positions.dtype, device=positions.device)
            grown[names.positions] = torch.cat([positions, next_ones], -1)
        return grown

    @property
    def names(self) -> Names:
        """What the model's arguments are called."""
        pair = "decoder_" if "encoder_outputs" in self.arguments else ""
        return Names(self.cache()[0], f"{pair}attention_mask", f"{pair}position_ids")

    def others(self) -> dict[str, Any]:
        """The arguments that every step is given."""
        apart = {*CACHES, self.names.mask, self.names.positions, "inputs_embeds"}
        others = {name: value for name, value in self.arguments.items() if name not in apart and value is not None}
        for name in _TYPES:
            if name in others:
                others[name] = others[name][:, -1:] if name == _TYPES[0] else torch.zeros_like(others[name][:, -1:])
        return others


@dataclass(frozen=True, eq=False)
class _Kept:
    """A captured step with the storage that it runs on."""

    key: Any
    step: CapturedStep[Any, Any]
    body: TokenStep

    @property
    def is_replayed(self) -> bool:
        """Whether the step was ever replayed."""
        return bool(self.step._graphs_recordings.replays)


class Loop:
    """Runs the loops of one model.

    Args:
        model: of transformers.
        config: of the captured steps, which have no tensor arguments.
        states: of the model's modules.
    """

    def __init__(self, model: Any, config: CaptureConfig, states: ModuleStates) -> None:
        self._model, self._states = model, states
        self._config = dataclasses.replace(config, buckets=None, batch_dims=None, static=(), padding={}, outputs="owned")
        self._lock = threading.Lock()
        self._free: list[_Kept] = []
        self._running: list[_Kept] = []
        self._unfit: dict[Any, str] = {}
        self._given_up: Counter[Any] = Counter()  # by key, steps that were dropped for others, or not recorded for once
        self._met: set[Any] = set()

    def steps(self) -> list[CapturedStep[Any, Any]]:
        """The captured steps that there are."""
        return [kept.step for kept in (*self._free, *self._running)]

    def run(self, request: Request, sample: Callable[..., Any], *, handed_out: bool) -> Any | str:
        """What ``sample``, transformers' loop, returns; or what it is that needs the host between two tokens, and nothing ran.

        Args:
            handed_out: the caller can see the cache afterwards.
        """
        prepared = self._prepared(request)
        if isinstance(prepared, str):
            return prepared
        choice, form = _choice(request, prepared), _begin(request, request.tokens, prepared).form
        modes = torch.is_inference_mode_enabled(), autocast_of(request.tokens.device)
        key = form, prepared.key, choice.sampled, value_key([choice.ends, choice.padding]), request.names, modes
        if key in self._unfit:
            return self._unfit[key]
        if self._is_passing(key):
            return "settings that this is the first call with, or more kinds of generations in turn than max_recordings"
        first = _until(request.criteria, request.tokens.shape[1] + 1)
        result = _sampled(sample, self._model, request, request.tokens, first, request.arguments)
        tokens = getattr(result, "sequences", result)
        begin = _begin(request, tokens, prepared)
        kept = self._taken(key, begin, choice, request.names)
        try:
            more = self._decoded(kept, request, begin, sample, exact=handed_out)
        finally:
            self._given_back(kept)
        if result is tokens:
            return more
        result.sequences = more
        return result

    def _prepared(self, request: Request) -> Prepared | str:
        config, criteria, model = request.config, request.criteria, self._model
        cache = request.cache()[1]
        if not is_fixed(cache):
            return "no cache" if not request.config.use_cache else _TOLD
        if all(getattr(cache, "is_linear", ()) or [False]):
            return "a cache of recurrent states alone"  # whose length does not tell transformers' loop what it has seen
        if config.return_dict_in_generate:
            for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
                if getattr(config, name):
                    return name
        if request.arguments.get("inputs_embeds") is not None:
            return "inputs_embeds"
        if (replaced := _replaced_choice(request)) is not None:
            return replaced
        kinds = [type(stop).__name__ for stop in criteria]
        foreign = [name for name, stop in zip(kinds, criteria, strict=True) if name not in _STOPS or not is_theirs(stop)]
        if foreign or len(set(kinds)) != len(kinds) or "MaxLengthCriteria" not in kinds:
            return [*foreign, "stopping criteria"][0]
        if request.tokens.ndim != 2 or criteria.max_length - request.tokens.shape[1] < 2:
            return _TOLD  # there is no step
        if model._forward_hooks or model._forward_pre_hooks:
            return "a forward hook of the model"
        if any(vars(torch.nn.modules.module)[name] for name in _OF_ALL_MODULES):
            return "a forward hook of all modules"
        return prepare(request.processors)

    def _is_passing(self, key: Any) -> bool:
        """Whether a step for them would be dropped again before it pays.

        That is so for settings that are new where others came before, as those that differ at each call, and for more kinds of
        generations in turn than there may be recordings.
        """
        with self._lock:
            held = [kept.key for kept in (*self._free, *self._running)]
            if key not in held and self._given_up[key] >= _TRIES:
                return True
            others = [one for one in held if one[0] == key[0]]
            if key in others or len(others) < _SETTINGS or key in self._met:
                return False
            self._met = {*self._met, key} if len(self._met) < _REMEMBERED else {key}
            return True

    def _taken(self, key: Any, begin: Begin, choice: Choice, names: Names) -> _Kept:
        with self._lock:
            kept = next((kept for kept in self._free if kept.key == key), None)
            if kept is not None:
                self._free.remove(kept)
                self._running.append(kept)
                return kept
        body = TokenStep(self._model, Sequences(begin), choice, names)
        kept = _Kept(key, CapturedModule(body, self._config), body)
        with self._lock:
            self._running.append(kept)
        return kept

    def _given_back(self, kept: _Kept) -> None:
        with self._lock:
            self._running.remove(kept)
            if kept.key not in self._unfit:
                self._free.append(kept)
            for dropped in self._free[: -self._config.max_recordings]:
                self._given_up[dropped.key] += 1
            self._free = self._free[-self._config.max_recordings :]

    def _decoded(self, kept: _Kept, request: Request, begin: Begin, sample: Callable[..., Any], *, exact: bool) -> Tensor:
        """All tokens of all rows, ``[rows, length]``, from the first one on."""
        sequences, ends, cache, tokens = kept.body.sequences, kept.body.choice.ends, request.cache()[1], begin.tokens
        sequences.begin(begin, ends)
        if ends is not None and not bool(sequences.going):
            return tokens
        others, known = request.others(), kept.is_replayed
        self._states.begin()
        if not known and not self._prepares_alike(kept, request, tokens, others):
            self._unfit[kept.key] = "inputs that the model prepares from all tokens"
            return self._continued(request, tokens, sequences.unfinished == 0, sample)
        stop = LateStop(sequences.going, exact=exact) if ends is not None else None
        last, random = request.criteria.max_length, Draws(tokens.device)
        with getattr(self._model, "_optimize_model_for_decode", contextlib.nullcontext)():
            for length in range(tokens.shape[1] + 1, last + 1):
                random.step()
                kept.step(cache, **others)
                if stop is not None and stop.launched():
                    break
                if not known and not kept.is_replayed:
                    self._note_not_replayed(kept)
                    return self._continued(request, sequences.tokens[:, :length].clone(), sequences.unfinished == 0, sample)
                known = True
        used = last if stop is None else int(sequences.length)
        random.undo(used - tokens.shape[1])
        return sequences.tokens[:, :used].clone(memory_format=torch.contiguous_format)

    def _note_not_replayed(self, kept: _Kept) -> None:
        """A step was not recorded: for good, or since a mode or a want of memory stood in the way for once."""
        with self._lock:
            self._given_up[kept.key] += 1
            if kept.step._graphs_recordings.refuses or self._given_up[kept.key] >= _TRIES:
                self._unfit[kept.key] = _why_not(kept.step.report())

    def _prepares_alike(self, kept: _Kept, request: Request, tokens: Tensor, others: dict[str, Any]) -> bool:
        """Whether the model prepares the same inputs from the storage of fixed size as from what transformers' loop holds."""
        wanted = self._model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **request.grown(tokens))
        return _alike(wanted, kept.body.inputs(request.cache()[1], others))

    def _continued(self, request: Request, tokens: Tensor, ended: Tensor, sample: Callable[..., Any]) -> Tensor:
        """All tokens of all rows; those behind ``tokens`` by transformers' loop, which takes every row for one that goes on."""
        criteria, length = _until(request.criteria, request.criteria.max_length), tokens.shape[1]
        if length >= criteria.max_length or bool(ended.all()):
            return tokens
        criteria.append(_Ended(ended))
        config = copy.copy(request.config)
        config._mask_length = length
        changed = dataclasses.replace(request, config=config)
        arguments = self._without_prompts(tokens, request.grown(tokens))
        result = _sampled(sample, self._model, changed, tokens, criteria, arguments)
        more: Tensor = getattr(result, "sequences", result)
        if config._pad_token_tensor is not None:
            more[:, length] = torch.where(ended, config._pad_token_tensor.to(more.device), more[:, length])
        return more

    def _without_prompts(self, tokens: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments but for those that the model reads with a prompt alone, such as images."""
        prepare = self._model.prepare_inputs_for_generation
        begun, later = (prepare(tokens, next_sequence_length=1, is_first_iteration=first, **arguments) for first in (True, False))
        only = {name for name in arguments if begun.get(name) is not None and later.get(name) is None}
        return {name: value for name, value in arguments.items() if name not in only}


class Draws:
    """Takes back what a generator of a device gave to steps that were launched too many."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
        self._offsets: list[int] = []

    def step(self) -> None:
        """A step is launched next."""
        if self._generator is not None:
            self._offsets.append(self._generator.get_offset())

    def undo(self, used: int) -> None:
        """Leave the generator as behind the first ``used`` steps."""
        if self._generator is not None and used < len(self._offsets):
            self._generator.set_offset(self._offsets[used])


class _Ended:
    """A stopping criterion of rows that have ended."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self._rows


def _replaced_choice(request: Request) -> str | None:
    """A function by which transformers chooses tokens that a program has put its own in the place of."""
    functions = {"torch.multinomial": torch.multinomial, "torch.argmax": torch.argmax, "softmax": torch.nn.functional.softmax}
    functions |= {type(part).__name__: type(part).__call__ for part in (request.processors, request.criteria)}
    return next((name for name, found in functions.items() if not is_written_by(found, ("transformers", "torch"))), None)


def _why_not(report: CaptureReport) -> str:
    """Why a step was not recorded, in words."""
    told = [f"{refusal.reason} [{refusal.operator}] {refusal.detail}" for refusal in report.refusals if not refusal.recorded]
    return f"a step that is not recorded: {told[0]}" if told else "a step that is not recorded"


def _choice(request: Request, prepared: Prepared) -> Choice:
    ends, padding = request.ends(), request.config._pad_token_tensor
    if padding is not None:
        padding = padding.to(request.tokens.device)
    return Choice(prepared.functions, bool(request.config.do_sample), ends, padding)


def _begin(request: Request, tokens: Tensor, prepared: Prepared) -> Begin:
    last, arguments, names = request.criteria.max_length, request.arguments, request.names
    grown = request.grown(tokens)
    return Begin(tokens, capacity(last), grown.get(names.mask), arguments.get(names.positions), prepared.limits)


def _sampled(
    sample: Callable[..., Any], model: Any, request: Request, tokens: Tensor, criteria: Any, arguments: dict[str, Any]
) -> Any:
    config, processors = request.config, request.processors
    return sample(model, tokens, logits_processor=processors, stopping_criteria=criteria, generation_config=config, **arguments)


def _until(criteria: Any, length: int) -> Any:
    """The same criteria with another largest length."""
    changed = type(criteria)()
    for one in criteria:
        if type(one).__name__ == "MaxLengthCriteria":
            one = copy.copy(one)
            one.max_length = length
        changed.append(one)
    return changed


def _alike(one: Any, other: Any) -> bool:
    """Whether two prepared arguments are the same to a model."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride() and torch.equal(one, other)
        )
    if type(one) is dict and type(other) is dict:
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    return one is other or (type(one) is type(other) and isinstance(one, (bool, int, float, str)) and bool(one == other))


def _strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
