"""State that a model's modules are given anew in each step, ``self.state = new``: kept in storage that stays, which steps write.

A recording reads and writes memory, and the attribute of a module is none: a replay would leave it where it was. So a step that
is recorded puts what it assigned into the tensor that was there before, which is the attribute again. Which attributes these are
is seen in the trial of a cache (`graphs.generation.cache_trial`): those of which a step of one token makes a tensor of the same
form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

Tensor = torch.Tensor


class ModuleStates:
    """The attributes of one model's modules that its steps assign.

    Args:
        model: of transformers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._names: tuple[tuple[str, str], ...] = ()
        self._kept: dict[Any, Tensor] = {}

    def note(self, before: dict[tuple[str, str], Tensor]) -> None:
        """Note what a step has assigned since ``before`` was `held`."""
        after = held(self._model)
        names = [name for name, old in before.items() if name in after and after[name] is not old and _alike(old, after[name])]
        self._names = tuple(dict.fromkeys((*self._names, *names)))

    def held(self) -> dict[tuple[str, str], Tensor]:
        """Tensors that modules hold beside parameters, by the path of the module and the name."""
        return held(self._model)

    def begin(self) -> None:
        """Before the first step behind a prompt: move what the prompt left to the storage that stays."""
        for path, name, module, current in self._current():
            key = path, name, tuple(current.shape), current.dtype, current.device, current.is_inference()
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = torch.empty_like(current, memory_format=torch.contiguous_format)
            if kept is not current:
                kept.copy_(current)
                setattr(module, name, kept)

    def end(self) -> None:
        """Behind a generation: leave the modules with tensors of their own, which later ones do not write."""
        kept = {id(tensor) for tensor in self._kept.values()}
        for _, name, module, current in self._current():
            if id(current) in kept:
                setattr(module, name, current.clone())

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Around one call of the model: what it assigns goes to where it was before."""
        before = self._current()
        yield
        for _, name, module, old in before:
            new = getattr(module, name)
            if new is not old and _alike(old, new):
                old.copy_(new)
                setattr(module, name, old)

    def _current(self) -> list[tuple[str, str, torch.nn.Module, Tensor]]:
        found = []
        modules = dict(self._model.named_modules()) if self._names else {}
        for path, name in self._names:
            module = modules.get(path)  # a program may have taken it out since
            value = getattr(module, name, None)
            if module is not None and isinstance(value, Tensor):
                found.append((path, name, module, value))
        return found

    @property
    def is_empty(self) -> bool:
        """Whether there are none, as in most models."""
        return not self._names


def held(model: torch.nn.Module) -> dict[tuple[str, str], Tensor]:
    """Tensors that modules hold beside parameters, by the path of the module and the name."""
    found: dict[tuple[str, str], Tensor] = {}
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, Tensor):
                found[path, name] = value
    return found


def _alike(old: Any, new: Any) -> bool:
    """Whether a tensor may stand where another one was."""
    return isinstance(new, Tensor) and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
