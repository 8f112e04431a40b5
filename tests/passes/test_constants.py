"""Golden graphs of `passes.hoist_constants`, and the pipeline around it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import graphs
import passes
from passes.core.facts import Facts


def printed(module: torch.fx.GraphModule) -> list[str]:
    return [node.format_node() for node in module.graph.nodes if node.op != "output"]


def test_copies_and_casts_of_a_host_constant_become_one_buffer():
    def step(x):
        return x * torch.tensor([1.0, 2.0]).to(torch.float64)

    module = make_fx(step)(torch.ones(2))
    x = torch.randn(2)
    expected = module(x)
    changes = passes.run(module)
    assert [line.split(" : ")[0] + " " + line.split("target=")[1].split("]")[0] for line in printed(module)] == [
        "%x_1 x_1",
        "%_hoisted_constant_1 _hoisted_constant_1",
        "%mul torch.ops.aten.mul.Tensor",
    ]
    assert [change.by for change in changes] == ["hoist_constants"] * 2
    assert "lift_fresh" in changes[0].before and "_to_copy" in changes[1].before
    assert torch.equal(module(x), expected)


def test_a_constant_that_the_step_writes_is_left_alone():
    def step(x):
        return torch.zeros(2).copy_(torch.tensor([1.0, 2.0]).add_(x))

    module = make_fx(step)(torch.ones(2))
    before = printed(module)
    assert passes.run(module) == []
    assert printed(module) == before
    assert torch.equal(module(torch.ones(2)), module(torch.ones(2)))


def test_a_constant_that_is_written_through_one_of_several_views_is_left_alone():
    def step(x):
        table = torch.tensor([1.0, 2.0])
        table.split(1)[0].add_(x)
        return table + x

    module = make_fx(step)(torch.ones(1))
    assert passes.run(module) == []
    assert module(torch.ones(1)).tolist() == module(torch.ones(1)).tolist() == [3.0, 3.0]


def test_a_constant_that_holds_running_statistics_is_left_alone():
    def step(x):
        mean = torch.tensor([0.0])
        torch.ops.aten.native_batch_norm(x, None, None, mean, torch.tensor([1.0]), True, 0.5, 1e-5)
        return mean * 2

    module = make_fx(step)(torch.ones(4, 1))
    passes.run(module)
    assert module(torch.ones(4, 1)).tolist() == module(torch.ones(4, 1)).tolist() == [1.0]


def test_a_table_that_the_step_computes_on_the_host_is_uploaded_once():
    def step(x):
        return x * (1.0 / 10000 ** (torch.arange(0, 4, 2) / 4)).to(x.device)

    module = make_fx(step)(torch.ones(2, device="meta"))
    assert passes.run(module)
    assert [node.op for node in module.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]


def test_a_table_of_the_steps_own_is_uploaded_once_and_told_of():
    table = torch.arange(2.0)

    def step(x):
        return [x * torch.ops.aten.alias(table).to(x.device)]

    module = make_fx(step)(torch.ones(2, device="meta"))
    (own,) = [node for node in module.graph.nodes if node.op == "get_attr"]
    own.target, module.state_0 = "state_0", table
    graph = passes.rewrite(passes.TracedStep(module, Facts(FakeTensorMode())), only=["constants"])
    assert [node.op for node in module.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]
    assert [held is table for held in graph.uploaded] == [True]


def test_a_tensor_that_a_step_makes_on_the_host_and_leaves_there_is_not_kept():
    module = make_fx(lambda x: x + torch.arange(2))(torch.ones(2))
    before = printed(module)
    assert passes.run(module) == [] and printed(module) == before


def test_a_parameter_is_no_constant():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x):
            return x * self.weight.clone() * self.scale.clone()

    module = torch.export.export(Model(), (torch.ones(2),)).run_decompositions().module()
    before = printed(module)
    assert any("weight" in line for line in before)
    passes.run(module)
    assert printed(module) == before


def test_a_graph_without_findings_is_not_touched():
    module = make_fx(lambda x: x.sin() + 1)(torch.ones(2))
    code, nodes = module.code, list(module.graph.nodes)
    assert passes.run(module) == []
    assert module.code == code and list(module.graph.nodes) == nodes


def test_an_ill_formed_graph_is_not_let_through():
    def broken(module):
        nodes = list(module.graph.nodes)
        nodes[-2].append(nodes[0])  # a placeholder after its user
        return [("a", "b")]

    module = make_fx(lambda x: x.sin() + 1)(torch.ones(2))
    with pytest.raises(RuntimeError):
        passes.run(module, [broken])


@pytest.mark.parametrize("names", [["constants"], ["constants", "addressing"], ["arithmetic"], []])
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_what_a_step_assumes_is_refused_where_no_pass_takes_it(names: list[str]) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([1.0, 2.0])
        return x * table if x.sum() > 0 else x - table

    captured = graphs.capture(step, passes=names)
    with torch.no_grad():
        for value in (1.0, -1.0, 2.0, -2.0):
            assert torch.equal(captured(torch.full((2,), value)), step(torch.full((2,), value)))
    assert captured.report().replays == 0
