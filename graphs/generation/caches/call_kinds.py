"""What a cache that is lent to a call of ``generate()`` has to fit, beside rows and length: what else the prompt is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensor = torch.Tensor
Kind = frozenset[tuple[str, str]]


def kind_of(arguments: Mapping[str, Any]) -> Kind:
    """The names of what ``generate()`` passes on to the model, with their classes."""
    return frozenset((name, type(value).__qualname__) for name, value in arguments.items() if value is not None)


def given_beside_tokens(arguments: Mapping[str, Any]) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    """Names and shapes of tensors that are no tokens, such as images: layers may keep what they made of them.

    The number of tokens is left out of the shapes, and so are numbers and masks of tokens.
    """
    tokens = arguments.get("attention_mask")
    length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.ndim == 2 else -1
    beside = [(name, value) for name, value in arguments.items() if isinstance(value, Tensor) and not _is_of_tokens(value)]
    return tuple(sorted((name, tuple(None if size == length else size for size in value.shape)) for name, value in beside))


def _is_of_tokens(value: Tensor) -> bool:
    return value.ndim < 3 and not value.is_floating_point()
