"""Which line of a step a difference is about."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from graphs.errors import Site
from graphs.parity.data import Arguments
from graphs.parity.twins import entered, random_states, set_random_states
from graphs.parity.walk import Reached
from passes.core.modes.patched_functions import as_torch_made
from passes.core.source_location import user_site

Tensor = torch.Tensor


class _Lines(TorchFunctionMode):
    """Remembers the user's line that made each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[str, int]] = {}
        self.last = ("", 0)
        self.kept: list[Tensor] = []  # so that no identity is used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = as_torch_made(func, sys._getframe(1))(*args, **(kwargs or {}))
        site = user_site()
        if site[0]:
            self.last = site
            for leaf in _pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.made[id(leaf)] = self.last
                    self.kept.append(leaf)
        return result


def output_line(model: Any, what: str, context: str, device: torch.device, given: Arguments) -> Site:
    """The line of the step that made an output, found by running it eagerly once more; else where the step begins.

    Args:
        what: ``output[0]``: the key path of a leaf among the outputs.
    """
    states = random_states()
    lines = _Lines()
    try:
        with entered(context, device), lines:
            output = model(*given[0], **given[1])
    except Exception:  # the difference is that it raises: the last line it reached says where
        return Site.at(lines.last) if lines.last[0] else _beginning(model)
    finally:
        set_random_states(states)
    for path, leaf in _pytree.tree_flatten_with_path(output)[0]:
        if f"output{_pytree.keystr(path)}" == what and id(leaf) in lines.made:
            return Site.at(lines.made[id(leaf)])
    return _beginning(model)


def value_line(toggled: str, found: Reached, model: Any) -> Site:
    """The first line of the user's functions that names the value which was changed; else where the step begins."""
    names = re.findall(r"\w+", re.split(r" = |\(", toggled.removeprefix("putting back "))[0])
    for name in reversed(names):
        if name.isdigit() or name in ("data", "append", "forward"):
            continue
        for _, function in found.functions:
            for number, text in enumerate(_source(function)[0]):
                if number and re.search(rf"\b{name}\b", text):
                    return Site.at((function.__code__.co_filename, _source(function)[1] + number))
    return _beginning(model)


def _beginning(model: Any) -> Site:
    function = getattr(type(model), "forward", model) if isinstance(model, torch.nn.Module) else model
    code = getattr(function, "__code__", None)
    return Site.at((code.co_filename, code.co_firstlineno)) if code is not None else Site()


def _source(function: Any) -> tuple[list[str], int]:
    try:
        return inspect.getsourcelines(function)
    except (OSError, TypeError):  # made by exec: no lines
        return [], 0
