"""Padding policies: what rows beyond the batch hold, in any dimension and dtype."""

from __future__ import annotations

import pytest
import torch

from graphs.contract.padding import Padding, as_padding, pad_rows, sentinel
from graphs.errors import ConfigError

DTYPES = [torch.bool, torch.int8, torch.int64, torch.bfloat16, torch.float32, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(
    ("policy", "rest"),
    [(Padding(), 2), (Padding("zero"), 0), (Padding("keep"), 1), (sentinel(7), 7)],
    ids=lambda p: getattr(p, "kind", ""),
)
def test_rows_beyond_the_batch(policy: Padding, rest: int, dim: int, dtype: torch.dtype) -> None:
    """Real rows are 0, 1 and 2, the storage held ones; it is filled up to five rows."""
    shape = [2, 2, 2]
    shape[dim] = 3
    rows = torch.arange(3).view([3 if d == dim else 1 for d in range(3)])
    x = rows.expand(shape).to(dtype)
    shape[dim] = 5
    out = torch.ones(shape, dtype=dtype)
    assert pad_rows(x, dim, 5, policy, out) is out
    for row, value in enumerate((0, 1, 2, rest, rest)):
        assert torch.equal(out.select(dim, row), torch.full((2, 2), value).to(dtype)), row


@pytest.mark.parametrize("kind", ["repeat", "zero", "keep"])
def test_a_full_bucket_is_copied(kind: str) -> None:
    x = torch.randn(3, 2)
    assert torch.equal(pad_rows(x, 0, 3, Padding(kind), torch.zeros(3, 2)), x)


def test_a_policy_is_given_by_name_or_as_it_is() -> None:
    assert as_padding("x", "zero") == Padding("zero")
    policy = sentinel(3)
    assert as_padding("x", policy) is policy


@pytest.mark.parametrize("policy", ["sentinel", "mirror", 3, None])
def test_an_illegal_policy_is_named_with_its_argument(policy: object) -> None:
    with pytest.raises(ConfigError, match=r"padding\['x'\].*'repeat', 'zero', 'keep'.*sentinel"):
        as_padding("x", policy)  # type: ignore[arg-type]
