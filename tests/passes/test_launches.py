"""`passes.optimize.single_kernel`: the same results from operators that launch less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import passes
from tests.passes.steps import printed


def thinned(step: object, *inputs: Tensor) -> GraphModule:
    module: GraphModule = make_fx(step)(*inputs)
    passes.run(module, [passes.fewer_launches])
    return module


PLACES = """\
mask_1 [6] = placeholder(mask_1)
_launch_constant_0 [6, 6] = get_attr(_launch_constant_0)
_launch_constant_1 [4] = get_attr(_launch_constant_1)
_launch_constant_2 [] = get_attr(_launch_constant_2)
unsqueeze_default [1, 6] = unsqueeze.default(mask_1, 0)
logical_and_default [6, 6] = logical_and.default(_launch_constant_0, unsqueeze_default)
sum_dim_int_list [6] = sum.dim_IntList(logical_and_default, [1])
unsqueeze_default_1 [1, 6] = unsqueeze.default(sum_dim_int_list, 0)
unsqueeze_default_2 [4, 1] = unsqueeze.default(_launch_constant_1, 1)
le_tensor [4, 6] = le.Tensor(unsqueeze_default_1, unsqueeze_default_2)
sum_dim_int_list_1 [4] = sum.dim_IntList(le_tensor, [1])
select_int [] = select.int(sum_dim_int_list, 0, 5)
lt_tensor [4] = lt.Tensor(_launch_constant_1, select_int)
where_self [4] = where.self(lt_tensor, sum_dim_int_list_1, _launch_constant_2)
unsqueeze_default_3 [4, 1] = unsqueeze.default(where_self, 1)
return unsqueeze_default_3"""


def test_the_places_of_a_short_mask_are_counted_in_pairs() -> None:
    module = thinned(lambda mask: torch.nonzero_static(mask, size=4, fill_value=0), torch.ones(6, dtype=torch.bool))
    assert printed(module) == PLACES


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 12), st.integers(-1, 3))
def test_they_are_those_of_nonzero_static(mask: list[bool], size: int, fill: int) -> None:
    given_mask = torch.tensor(mask)
    module = thinned(lambda mask: torch.nonzero_static(mask, size=size, fill_value=fill), torch.zeros_like(given_mask))
    expected = torch.nonzero_static(given_mask, size=size, fill_value=fill)
    assert torch.equal(module(given_mask), expected) and expected.dtype == module(given_mask).dtype


@pytest.mark.parametrize("shape", [(2, 3), (300,)], ids=["two dimensions", "long"])
def test_other_masks_are_left_alone(shape: tuple[int, ...]) -> None:
    module = thinned(lambda mask: torch.nonzero_static(mask, size=4), torch.ones(shape, dtype=torch.bool))
    assert "nonzero_static" in printed(module)


@pytest.mark.parametrize("number", [0, -float("inf"), 0.1, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_fill_is_a_choice(number: float, dtype: torch.dtype) -> None:
    if dtype == torch.int64 and number in (0.1, -float("inf")):
        pytest.skip("whole numbers take whole numbers")
    x, mask = torch.tensor([[1.0, -2.0], [-0.0, float("nan")]]).nan_to_num(3.0).to(dtype), torch.tensor([True, False])
    module = thinned(lambda x, mask: x.masked_fill(mask, number), x, mask)
    assert "where.self" in printed(module) and "masked_fill" not in printed(module)
    assert torch.equal(module(x, mask), x.masked_fill(mask, number))


def test_a_fill_of_a_transposed_tensor_keeps_its_layout() -> None:
    x, mask = torch.randn(3, 2).t(), torch.tensor([True, False, True])
    module = thinned(lambda x, mask: x.masked_fill(mask, 0), x, mask)
    assert module(x, mask).stride() == x.masked_fill(mask, 0).stride()


def test_a_second_run_leaves_the_constants_of_the_first() -> None:
    x, mask = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    module = thinned(lambda x, mask: x.masked_fill(mask, 3.0), x, mask)
    (output,) = module.graph.find_nodes(op="output")
    with module.graph.inserting_before(output):
        again = module.graph.call_function(torch.ops.aten.masked_fill.Scalar, (output.args[0], output.args[0].args[0], 5.0))
    again.meta["val"] = x
    output.args = ([output.args[0], again],)
    passes.run(module, [passes.fewer_launches])
    first, second = module(x, mask)
    assert first.tolist() == [3.0, 2.0] and second.tolist() == [5.0, 2.0]
