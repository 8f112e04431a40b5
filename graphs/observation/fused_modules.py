"""Watching without being noticed by modules that take another way when functions of torch are overridden.

`torch.nn.TransformerEncoder`, its layers and `torch.nn.MultiheadAttention` run one fused operator in evaluation, unless
``torch.overrides.has_torch_function`` tells them that somebody overrides functions. A mode that only looks on counts as
somebody, so that a watched run would compute otherwise than the caller's: under autocast in another dtype even.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import _get_current_function_mode, _pop_mode_temporarily

from passes.core.composites import Calls
from passes.forked_process import forkable_lock, put_back_by

_lock = forkable_lock()
_users: set[object] = set()
_original: Any = torch.overrides.has_torch_function


def _has_torch_function(args: Iterable[Any]) -> bool:
    """What torch's own function says where no `Calls` is entered last; other threads get just that."""
    if isinstance(_get_current_function_mode(), Calls):
        with _pop_mode_temporarily():
            return bool(_original(args))
    return bool(_original(args))


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Inside, modules that ask whether functions are overridden are not told of a `Calls`.

    The one place that exchanges a function of torch: the name that modules look it up by, while at least one thread watches.
    """
    user = object()

    def noticed() -> None:
        with _lock:
            _users.discard(user)
            if not _users:
                torch.overrides.has_torch_function = _original

    with put_back_by(noticed):
        with _lock:
            _users.add(user)
            torch.overrides.has_torch_function = _has_torch_function
        yield
