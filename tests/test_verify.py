"""Comparing a replay with eager: large and non-finite elements must not hide wrong ones."""

import pytest
import torch

from graphs.numerics.tolerance import difference


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min, 3e38])
def test_a_mask_value_does_not_hide_wrong_elements(mask: float) -> None:
    expected = torch.tensor([mask, 1.0, 5.0, 2.0])
    assert difference(expected, torch.tensor([mask, 2.0, 7.0, 2.0]))
    assert not difference(expected, expected.clone())


@pytest.mark.parametrize(("a", "b"), [("inf", "nan"), ("inf", "-inf"), ("nan", "-inf"), ("nan", "0")])
def test_non_finite_values_are_told_apart(a: str, b: str) -> None:
    assert difference(torch.tensor([1.0, float(a)]), torch.tensor([1.0, float(b)]))
    assert not difference(torch.tensor([1.0, float(a)]), torch.tensor([1.0, float(a)]))
