"""Two equal steps from one factory: one captured, one eager, with random states of their own."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree

from graphs.dispatch.call_log import NotReplayed
from graphs.dispatch.captured_module import capture
from graphs.errors import ConfigError, FactoryError
from graphs.factory import checked
from graphs.parity.data import Arguments
from graphs.parity.walk import Reached, reached

Tensor = torch.Tensor
Factory = Callable[[], Any]
CONTEXTS = ("grad", "no_grad", "inference_mode", "autocast")


@dataclass
class Called:
    """What one call of a twin gave.

    Attributes:
        output: copied; None where it raised.
        raised: the exception.
        leaves: arguments, state, Python attributes and random state after the call, copied, by path.
    """

    output: Any
    raised: Exception | None
    leaves: dict[str, Any] = field(default_factory=dict)


class Twin:
    """A step with its state.

    Attributes:
        model: what the factory made; example: its arguments.
        step: the captured model, or the model.
    """

    def __init__(self, factory: Factory, name: str, seed: int, *, captured: bool, settings: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        self.model, args, kwargs = checked(factory(), name)
        self.example: Arguments = (args, kwargs)
        self.step: Any = capture(self.model, **settings) if captured else self.model
        self._random = random_states()

    def reached(self) -> Reached:
        """Everything that hangs on the model and its opaque arguments."""
        return reached({"model": self.model, **_opaque(self.example)})

    def call(self, context: str, device: torch.device, arguments: Arguments) -> Called:
        """One call, with the random states that the last one of this twin left."""
        args, kwargs = arguments
        set_random_states(self._random)
        output, raised = None, None
        with entered(context, device), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotReplayed)
            try:
                output = self.step(*args, **kwargs)
            except Exception as error:  # compared with what the other twin raises
                raised = error
        self._random = random_states()
        return Called(_copied(output), raised, self._leaves(arguments))

    def _leaves(self, arguments: Arguments) -> dict[str, Any]:
        """Copies of tensors, and plain values, by path."""
        found = {cell.path: _copied(cell.value) for cell in self.reached().cells}
        for path, leaf in _pytree.tree_flatten_with_path(arguments)[0]:
            if isinstance(leaf, Tensor):
                found[f"argument {_pytree.keystr(path)}"] = _copied(leaf)
        found.update({f"random state of {name}": state for name, state in self._random.items()})
        return found


def made_alike(factory: Factory, name: str, seed: int, settings: dict[str, Any]) -> tuple[Twin, Twin]:
    """The captured twin and the eager one.

    Raises:
        FactoryError: both calls gave the same object or tensors, so that one twin would change the other.
    """
    captured = Twin(factory, name, seed, captured=True, settings=settings)
    eager = Twin(factory, name, seed, captured=False, settings={})
    remedy = "make the model, its caches and arguments inside the factory, so that a second call makes new ones"
    shared = _storages(captured) & _storages(eager)
    if shared:
        raise FactoryError(name, "two calls of it return the same tensors", remedy)
    if captured.model is eager.model and isinstance(eager.model, torch.nn.Module):
        raise FactoryError(name, "two calls of it return the same module", remedy)
    return captured, eager


def _storages(twin: Twin) -> set[int]:
    """Addresses of what a call may write: the model's own tensors and the arguments, not what a global holds."""
    model = {cell.value for cell in twin.reached().cells if cell.kind == "tensor" and isinstance(cell.value, Tensor)}
    given = [leaf for leaf in _pytree.tree_leaves(twin.example) if isinstance(leaf, Tensor)]
    tensors = [one for one in (*model, *given) if one.layout == torch.strided and one.numel()]
    return {one.untyped_storage().data_ptr() for one in tensors}


def _opaque(example: Arguments) -> dict[str, Any]:
    """Arguments that are neither tensors nor plain values, by name: caches, configurations."""
    leaves = _pytree.tree_flatten_with_path(example)[0]
    plain = (Tensor, bool, int, float, str, type(None))
    return {f"argument {_pytree.keystr(path)}": leaf for path, leaf in leaves if not isinstance(leaf, plain)}


def _copied(value: Any) -> Any:
    return _pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def random_states() -> dict[str, Any]:
    """States of the generators that everyone shares: of torch, of the current GPU, of Python and NumPy."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state(legacy=True)
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["random"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])


def context_parts(context: str) -> list[str]:
    """The names that a context is put together from.

    Raises:
        ConfigError: one of them is not in `CONTEXTS`.
    """
    parts = context.split("+") if isinstance(context, str) else [context]
    if not all(part in CONTEXTS for part in parts):
        legal = f"one of {', '.join(map(repr, CONTEXTS))}, or several joined by '+', such as 'autocast+no_grad'"
        raise ConfigError("contexts", context, legal)
    return parts


def entered(context: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context managers of a context's name, entered in order."""
    made: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "grad": nullcontext,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast(device.type, torch.bfloat16),
    }
    stack = ExitStack()
    for part in context_parts(context):
        stack.enter_context(made[part]())
    return stack
