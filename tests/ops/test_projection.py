"""GroupedProjection: one preparation, one operator per call."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import graphs
from graphs.errors import ConfigError, WeightError
from graphs.ops import GroupedProjection, load, path_bytes
from graphs.ops.wo_a import auto_path, reference, weights

G, N, K = 2, 128, 256


def fp8() -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantise_blocks(torch.randn(G, N, K, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("path", ["einsum", "bmm", "gloop", "fused", "auto"])
@pytest.mark.parametrize("kind", ["fp8", "bf16", "loaded"])
def test_every_path_projects_every_kind_of_weight(path: str, kind: str) -> None:
    data, scale = fp8()
    exact_weight = reference.dequantise_blocks(data, scale, torch.float64)
    arguments = {"fp8": (data, scale), "bf16": (exact_weight.bfloat16(),), "loaded": (load(data, scale),)}[kind]
    module = GroupedProjection(*arguments, path=path)
    o = torch.randn(5, G, K).bfloat16()
    y = module(o)
    assert y.shape == (5, G, N) and y.dtype == torch.bfloat16
    quantised = path in ("bmm", "gloop") or (path == "fused" and kind == "bf16")
    assert reference.relative_error(y, reference.project_fp64(o, exact_weight)) < (0.05 if quantised else 0.004)
    assert module.weight_bytes == path_bytes(G, N, K)["einsum" if path == "auto" else path]
    assert module.path == path and f"path={path!r}" in repr(module)


@pytest.mark.parametrize("path", ["einsum", "bmm", "gloop", "fused", "auto"])
def test_compiles_copies_and_reloads(path: str) -> None:
    module, o = GroupedProjection(*fp8(), path=path), torch.randn(3, G, K).bfloat16()
    expected = module(o)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(o), expected)
    assert torch.equal(copy.deepcopy(module)(o), expected)
    other = GroupedProjection(torch.zeros(G, N, K).bfloat16(), path=path)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(o), expected)


@pytest.mark.parametrize("path", ["einsum", "bmm", "gloop", "fused", "auto"])
def test_every_path_undoes_the_rotary_embedding(path: str) -> None:
    data, scale = reference.quantise_blocks(torch.randn(G, N, 512, generator=torch.Generator().manual_seed(3)))
    module, o = GroupedProjection(data, scale, path=path), torch.randn(3, G, 512).bfloat16()
    positions, table = torch.tensor([4, 0, 2]), torch.randn(5, 64)
    assert torch.equal(module(o, positions, table), module(reference.inverse_rotary(o, positions, table)))
    with pytest.raises(WeightError, match="come together"):
        module(o, positions)


def test_activations_may_be_quantised_on_the_way_in() -> None:
    o = torch.randn(3, G, K).bfloat16()
    quantised = GroupedProjection(*fp8(), path="fused", activations="fp8")
    assert torch.equal(quantised(o), GroupedProjection(*fp8(), path="gloop")(o))
    with pytest.raises(ConfigError, match="activations"):
        GroupedProjection(*fp8(), path="fused", activations="int4")


def test_moving_or_casting_the_module_keeps_the_formats() -> None:
    module, o = GroupedProjection(*fp8(), path="gloop"), torch.randn(3, G, K).bfloat16()
    expected = module(o)
    assert torch.equal(module.bfloat16().to("cpu", torch.float16)(o), expected)


def test_two_dimensional_weights_need_groups() -> None:
    data, scale = fp8()
    flat = data.reshape(G * N, K), scale.reshape(-1, K // 128)
    assert GroupedProjection(*flat, path="gloop", groups=G).groups == G
    with pytest.raises(WeightError, match="needs groups"):
        GroupedProjection(*flat, path="gloop")


def test_wrong_path_names_the_legal_ones() -> None:
    with pytest.raises(ConfigError, match=r"'cutlass' is not legal; it must be one of 'einsum', 'bmm', 'gloop', 'fused', 'auto'"):
        GroupedProjection(*fp8(), path="cutlass")


@pytest.mark.parametrize("path", ["einsum", "fused", "auto", None])
def test_a_path_that_the_back_end_lacks_is_named(path: str | None) -> None:
    with pytest.raises(ConfigError, match=r"path \(with backend='aiter'\) = .* must be one of 'bmm', 'gloop'"):
        GroupedProjection(*fp8(), path=path, backend="aiter")
    with pytest.raises(ConfigError, match=r"backend = 'rocm' is not legal; it must be one of 'native', 'aiter'"):
        GroupedProjection(*fp8(), path=path, backend="rocm")


def test_auto_gives_odd_sizes_to_einsum() -> None:
    module = GroupedProjection(torch.randn(2, 100, 60).bfloat16(), path="auto")
    assert module(torch.randn(1, 2, 60).bfloat16()).shape == (1, 2, 100)


def test_auto_follows_the_rules_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto_path.TABLE, "cpu", {2: ((16, "fused"), (64, "einsum"))})
    module = GroupedProjection(*fp8(), path="auto")
    assert module.paths == ("fused", "einsum")
    assert [module.choice(m) for m in (1, 16, 17, 4096)] == ["fused", "fused", "einsum", "einsum"]
    o = torch.randn(16, G, K).bfloat16()
    assert torch.equal(module(o), GroupedProjection(*fp8(), path="fused")(o))
    assert module.memory == {"fused": path_bytes(G, N, K)["fused"]}
    assert module.weight_bytes == sum(module.memory.values())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(compiled(x), module(x)) for x in (o, torch.randn(17, G, K).bfloat16()))
    assert "holding fused 0.0656 MB" in repr(module) and "einsum" not in repr(module)


@pytest.mark.parametrize("seed", range(3))
def test_auto_never_holds_two_forms_and_gives_the_bits_of_the_path_it_takes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setitem(auto_path.TABLE, "cpu", {2: ((16, "fused"), (64, "einsum"))})
    weight = torch.randn(G, 256, 384, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 1)
    blocks = reference.quantise_blocks(weight)
    module, o = GroupedProjection(*blocks, path="auto"), torch.randn(40, G, 384).bfloat16()
    assert {name: tuple(buffer.shape) for name, buffer in module.named_buffers()} == {
        "weight_blocks": (G, 256, 384),
        "scale_blocks": (G, 2, 3),
    }
    for rows in (16, 40):
        assert torch.equal(module(o[:rows]), GroupedProjection(*blocks, path=module.choice(rows))(o[:rows]))
    step = graphs.capture(module)
    with torch.no_grad():
        assert all(torch.equal(step(o[:rows]), module(o[:rows])) for rows in (16, 40, 16, 40))
    assert step.report().replays == 4


@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_widening_rounds_once_as_preparing_does(format: torch.dtype) -> None:
    data, scale = fp8()
    data.view(torch.uint8)[0, 0, :2] = torch.tensor([0x80, 0x01])  # minus zero and the smallest number
    wanted = weights.prepare(load(data, scale), "einsum").data
    held = weights.prepare(load(data, scale), "fused", format)
    assert held.scale is not None and torch.equal(weights.widened(held.data, held.scale), wanted)


def test_the_report_of_a_captured_model_sums_the_weights_of_each_path() -> None:
    model = torch.nn.Sequential(
        GroupedProjection(*fp8(), path="fused"), GroupedProjection(torch.randn(G, K, N).bfloat16(), path="einsum")
    )
    report = graphs.capture(model).report()
    assert report.projection_bytes == {path: path_bytes(G, N, K)[path] for path in ("fused", "einsum")}
    assert "grouped projections hold: fused 0.1 MiB, einsum 0.1 MiB" in str(report)
    assert json.loads(report.to_json())["projection_bytes"] == report.projection_bytes
    assert graphs.capture(torch.nn.Linear(1, 1)).report().projection_bytes == {} == graphs.capture(abs).report().projection_bytes


def test_paths_that_share_a_weight_hold_it_once() -> None:
    module = GroupedProjection(*fp8(), path="gloop")
    assert module.memory == {"gloop": path_bytes(G, N, K)["gloop"]} and module.weight_bytes == module.memory["gloop"]


def test_device_key_of_the_host_touches_no_device() -> None:
    assert auto_path.device_key("cpu") == "cpu"
