"""Whether a model computes the same with a cache of fixed storage: tried before the first one of a length is lent.

Most models mask what was not written yet. Some take the length of the keys for that of the sequence (for a local mask, a bias of
positions, keys that are joined to others), and fail or are silently wrong. So a few tokens are decoded with the cache that grows
and with a fixed one, whose unwritten positions hold large numbers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types as types_of_python
from collections.abc import Callable, Iterator
from typing import Any

import torch

from graphs.generation.caches.fixed_caches import layers_of
from graphs.generation.decode_step import forwarded
from graphs.generation.module_states import ModuleStates
from graphs.observation.eager_trace import trace_eager
from graphs.observation.operations import EagerTrace
from graphs.rehearsal.rehearsal import Runs, States
from graphs.state.python_state import PythonState
from graphs.state.tensor_state import RandomState

Tensor = torch.Tensor
_TOKENS = (5, 1, 1)  # of the calls: a prompt, two steps
_UNWRITTEN = 30.0  # far from what a model writes, and no overflow in float16
_TOLERANCE = 3e-3  # of float32, relative; products in TF32 differ by 5e-4, a key too few by 1e-2
PASSING = (MemoryError, torch.OutOfMemoryError)
"""What a model may raise once, and not the next time."""
_logger = logging.getLogger("graphs")


def agrees(
    model: Any,
    make: Callable[[bool], dict[str, Any]],
    model_kwargs: dict[str, Any],
    states: ModuleStates,
) -> bool | None:
    """Whether a fixed cache gives the logits of one that grows; no where a model cannot be asked with tokens alone.

    What the runs change of tensors, of Python's and of random generators is undone, and hooks of modules do not run. None where
    the weights give numbers that say nothing, or there was no room.

    Args:
        make: makes an empty cache of the model, of fixed storage or not, by the name of its argument.
        model_kwargs: what ``generate`` passes on; of it, types of tokens and the first row of an encoder's output are used.
        states: told what the last step of the trial assigned to modules.
    """
    device, dtype = model.device, model.dtype
    asking = _Asking(model, model_kwargs)

    def tried() -> bool | None:
        try:
            return compared()
        except PASSING as error:
            _logger.info("graphs: trial of a cache: %s: %s", type(error).__name__, error)
            return None

    def compared() -> bool | None:
        wanted = asking.logits(make(False))
        if not wanted:
            asking.positions = True
            wanted = asking.logits(make(False))
        if not all(bool(torch.isfinite(logits).any()) for logits in wanted):
            return None
        fixed = make(True)
        asking.logits(fixed)  # makes its storage
        for cache in fixed.values():
            _overwrite(emptied(cache))
        got = asking.logits(fixed, states)
        tolerance = max(_TOLERANCE, torch.finfo(dtype).eps ** 0.5)
        return len(wanted) == len(got) == len(_TOKENS) and all(_close(*pair, tolerance) for pair in zip(got, wanted, strict=True))

    trace = EagerTrace()
    start = States(trace.written, RandomState(device), PythonState([("model", model)]))
    with _without_hooks(model):
        same = Runs(start, trace, is_there=True).run(lambda: trace_eager(tried, [], into=trace)[0])
    if not same:
        _logger.info("graphs: %s computes something else with a cache of fixed storage", type(model).__name__)
    return same


class _Asking:
    """Asks a model for logits of a few tokens.

    Attributes:
        positions: whether it is told where they stand, which most models count by the cache.
    """

    def __init__(self, model: Any, model_kwargs: dict[str, Any]) -> None:
        self._model = model
        self._types = {name: value[:1, -1:] for name, value in model_kwargs.items() if name in typed(model_kwargs)}
        self._encoded = model_kwargs.get("encoder_outputs")
        self.positions = False

    def _call(self, tokens: Tensor, begin: int, cache: dict[str, Any]) -> Tensor:
        given: dict[str, Any] = {"input_ids": tokens}
        if self._encoded is not None:
            given = {"decoder_input_ids": tokens, "encoder_outputs": _first_row(self._encoded)}
        given |= {name: kind.expand(tokens.shape) for name, kind in self._types.items()}
        if self.positions:
            given["position_ids"] = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)[None]
        forward = types_of_python.MethodType(type(self._model).forward, self._model)
        logits: Tensor = forwarded(forward, (), {**given, **cache, "use_cache": True}).logits[:, -1]
        return logits.float()

    def logits(self, cache: dict[str, Any], states: ModuleStates | None = None) -> list[Tensor]:
        """The logits of each call, up to the first one that fails."""
        found: list[Tensor] = []
        for turn, tokens in enumerate(_TOKENS):
            before = states.held() if states is not None and found else {}
            given = torch.arange(3, 3 + tokens, device=self._model.device)[None] + turn
            try:
                found.append(self._call(given, sum(_TOKENS[:turn]), cache))
            except PASSING:
                raise
            except Exception as error:  # whatever else a model says is a no
                _logger.info("graphs: trial of a cache: %s: %s", type(error).__name__, error)
                break
            if states is not None:
                states.note(before)
        return found


@contextlib.contextmanager
def _without_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Put hooks of modules aside: what they do besides can not be undone, and they are not what is tried."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    held = [(module, name, vars(module)[name]) for module in model.modules() for name in names if vars(module).get(name)]
    for module, name, hooks in held:
        vars(module)[name] = type(hooks)()
    try:
        yield
    finally:
        for module, name, hooks in held:
            vars(module)[name] = hooks


def _first_row(encoded: Any) -> Any:
    """An encoder's output for the first row, of the same class."""
    if isinstance(encoded, dict):
        name, states = next(iter(encoded.items()))
        return type(encoded)(**{name: states[:1]})
    return (encoded[0][:1],)


def typed(model_kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Names of arguments that tell the type of each token, which masks may be made by."""
    return tuple(name for name, value in model_kwargs.items() if name.endswith("token_type_ids") and value is not None)


def emptied(cache: Any) -> Any:
    """The cache, which looks like a new one and has its storage; some models read a prompt in both directions where it is new."""
    cache.reset()
    for layer in layers_of(cache):
        if getattr(layer, "is_initialized", False) and hasattr(layer, "lazy_initialization"):
            layer.is_initialized = False
            layer.lazy_initialization = functools.partial(_use_again, layer)
    return cache


def _use_again(layer: Any, *states: Any, **options: Any) -> None:
    """In the place of ``lazy_initialization``: the storage is there, unless it is of another form than what comes now."""
    del layer.lazy_initialization
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    if all(isinstance(one, Tensor) and _goes_in(new, one) for new, one in zip(states, held, strict=False)):
        layer.is_initialized = True
    else:
        layer.lazy_initialization(*states, **options)


def _goes_in(new: Tensor, held: Tensor) -> bool:
    """Whether keys ``[rows, heads, tokens, width]`` may be written where others are held."""
    return (new.dtype, new.device, new.shape[:-2], new.shape[-1]) == (held.dtype, held.device, held.shape[:-2], held.shape[-1])


def _overwrite(cache: Any) -> None:
    """Fill the keys and values of an empty cache."""
    for layer in layers_of(cache):
        for name in ("keys", "values"):
            if isinstance(getattr(layer, name, None), Tensor):
                getattr(layer, name).fill_(_UNWRITTEN)


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((got - wanted).norm() <= tolerance * wanted.norm())
