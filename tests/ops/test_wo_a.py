"""The operators as torch sees them: schemas, fakes, dispatch, compilation, checks."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphs.errors import MissingDependency, WeightError
from graphs.ops.wo_a import operators, reference

G, N, K = 2, 128, 256
OPERATORS = ("einsum", "bmm", "gloop", "fused")


def operator(path: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.graphs, f"wo_a_{path}").default


def operands(path: str, m: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    o = torch.randn(m, G, K, generator=generator).bfloat16()
    w = torch.randn(G, N, K, generator=generator)
    if path == "einsum":
        return o, w.bfloat16()
    return o, *(reference.quantise_single(w) if path == "bmm" else reference.quantise_blocks(w))


@pytest.fixture
def fp8_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck compares inputs before and after with ``torch.allclose``, which has no FP8 kernel: compare the bytes instead."""
    original = torch.allclose

    def allclose(a: torch.Tensor, b: torch.Tensor, **options: object) -> bool:
        if a.dtype in reference.FP8_MAX:
            return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        return original(a, b, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "allclose", allclose)


@pytest.mark.usefixtures("fp8_comparable")
@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(path: str, layout: str) -> None:
    o, *rest = operands(path)
    if layout == "transposed":
        o = o.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(operator(path), (o, *rest))


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_result_is_contiguous_and_right(path: str, m: int) -> None:
    o, weight, *scale = operands(path, m)
    y = operator(path)(o, weight, *scale)
    assert y.shape == (m, G, N) and y.is_contiguous() and y.dtype == torch.bfloat16
    if m:
        factor = 1.0 if not scale else scale[0] if path == "bmm" else reference.expand_blocks(scale[0])
        exact = reference.project_fp64(o, weight.double() * factor)
        assert reference.relative_error(y, exact) < (0.004 if path in ("einsum", "fused") else 0.03)


@pytest.mark.parametrize("path", OPERATORS)
def test_compiles_into_one_graph(path: str) -> None:
    arguments = operands(path)

    def step(*args: torch.Tensor) -> torch.Tensor:
        return operator(path)(*args) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), step(*arguments))
    other = operands(path, 7)
    assert torch.equal(compiled(*other), step(*other)), "a second number of tokens"


def test_inductor_calls_the_operator() -> None:
    o, weight, scale = operands("gloop")
    compiled = torch.compile(lambda *a: operator("gloop")(*a), fullgraph=True)
    assert torch.equal(compiled(o, weight, scale), operator("gloop")(o, weight, scale))


@pytest.mark.parametrize("path", OPERATORS)
def test_a_dispatch_mode_sees_one_operator(path: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[object] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    arguments = operands(path)
    with Record():
        operator(path)(*arguments)
    assert seen == [operator(path)]


Change = Callable[[list[torch.Tensor]], None]


def replace(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(arguments: list[torch.Tensor]) -> None:
        arguments[index] = change(arguments[index])

    return apply


BAD: dict[str, tuple[tuple[str, ...], Change, str]] = {
    "o rank": (OPERATORS, replace(0, lambda o: o[0]), r"o has shape \(2, 256\)"),
    "o groups": (OPERATORS, replace(0, lambda o: o[:, :1]), r"o has shape \(3, 1, 256\), the weight \(2, 128, 256\)"),
    "o features": (OPERATORS, replace(0, lambda o: o[..., :128]), r"same G and K"),
    "o dtype": (OPERATORS, replace(0, lambda o: o.half()), r"o is torch.float16"),
    "weight rank": (OPERATORS, replace(1, lambda w: w.flatten(0, 1)), r"the weight \(256, 256\)"),
    "weight dtype": (
        OPERATORS[1:],
        replace(1, lambda w: w.view(torch.uint8)),
        r"weight is torch.uint8; legal are torch.float8_e4m3fn",
    ),
    "einsum with fp8": (
        ("einsum",),
        replace(1, lambda w: w.to(torch.float8_e4m3fn)),
        r"weight is torch.float8_e4m3fn; both must be",
    ),
    "scale dtype": (OPERATORS[1:], replace(2, lambda s: s.double()), r"scale is torch.float64; legal is torch.float32"),
    "scale shape": (OPERATORS[1:], replace(2, lambda s: s.flatten()[:1].expand(5)), r"scale has shape \(5,\); legal is"),
    "weight strides": (OPERATORS[1:], replace(1, lambda w: w.mT.contiguous().mT), r"must be contiguous"),
    "device": (OPERATORS, replace(1, lambda w: w.to("meta")), r"o is on cpu, weight on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_operands_are_named_before_anything_runs(case: str) -> None:
    paths, change, message = BAD[case]
    for path in paths:
        arguments = list(operands(path))
        change(arguments)
        if case != "device":
            with pytest.raises(WeightError, match=rf"wo_a_{path}: .*{message}"):
                operator(path)(*arguments)
        with pytest.raises(WeightError, match=message):
            operators.check(path, arguments[0], arguments[1], arguments[2] if len(arguments) > 2 else None)


@pytest.mark.parametrize("path", OPERATORS)
def test_fake_tensors_meet_the_same_checks(path: str) -> None:
    arguments = operands(path)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) for a in arguments]
        assert operator(path)(*fake).shape == (3, G, N)
        with pytest.raises(WeightError, match="same G and K"):
            operator(path)(fake[0][..., :128], *fake[1:])


@pytest.mark.parametrize("path", OPERATORS[1:])
def test_sizes_that_are_no_multiple_of_128_are_named(path: str) -> None:
    o, w = torch.zeros(1, 1, 128).bfloat16(), torch.zeros(1, 64, 128).to(torch.float8_e4m3fn)
    with pytest.raises(WeightError, match=r"N = 64, K = 128; both must be multiples of 128"):
        operator(path)(o, w, torch.ones(1))


def test_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "graphs.ops.wo_a.kernels.portable", raising=False)
    monkeypatch.delattr("graphs.ops.wo_a.kernels.portable", raising=False)
    operators.kernels.cache_clear()
    with pytest.raises(MissingDependency, match="pip install triton"):
        operators.kernels()
    operators.kernels.cache_clear()


def test_without_gluon_the_portable_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "graphs.ops.wo_a.kernels.hopper", raising=False)
    monkeypatch.delattr("graphs.ops.wo_a.kernels.hopper", raising=False)
    operators.hopper.cache_clear()
    assert operators.hopper() is None
    operators.hopper.cache_clear()


def test_overlap_changes_no_result() -> None:
    o, weight, scale = operands("fused")
    assert torch.equal(operator("fused")(o, weight, scale, True), operator("fused")(o, weight, scale))


POSITIONS, TABLE = torch.tensor([5, 0, 9]), torch.randn(10, 64, generator=torch.Generator().manual_seed(2))


def fused_with_heads(m: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m)
    o = torch.randn(m, G, 1024, generator=generator).bfloat16()
    return o, *reference.quantise_blocks(torch.randn(G, N, 1024, generator=generator))


@pytest.mark.usefixtures("fp8_comparable")
@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_rotary_and_quantised_activations_are_those_of_separate_steps(activations: str) -> None:
    o, weight, scale = fused_with_heads()
    turned = reference.inverse_rotary(o, POSITIONS, TABLE)
    project = reference.project_quantised if activations == "fp8" else reference.project_blocks
    y = operator("fused")(o, weight, scale, False, activations, POSITIONS, TABLE)
    assert torch.equal(y, project(turned, weight, scale))
    torch.library.opcheck(operator("fused"), (o, weight, scale, False, activations, POSITIONS, TABLE))


BAD_OPTIONS = {
    "activations": (("int8", None, None), r"activations is 'int8'; legal are 'bf16', 'fp8'"),
    "one of two": (("bf16", POSITIONS, None), r"positions and table come together"),
    "positions shape": (("bf16", POSITIONS[:2], TABLE), r"positions is \(2,\) torch.int64; legal is a contiguous \(3,\)"),
    "positions dtype": (("bf16", POSITIONS.float(), TABLE), r"positions is \(3,\) torch.float32"),
    "table shape": (("bf16", POSITIONS, TABLE[:, :32]), r"table is \(10, 32\) torch.float32; legal is a contiguous \[P, 64\]"),
    "table dtype": (("bf16", POSITIONS, TABLE.bfloat16()), r"table is \(10, 64\) torch.bfloat16"),
    "device": (("bf16", POSITIONS.to("meta"), TABLE), r"positions on meta, table on cpu"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_of_fused_are_named(case: str) -> None:
    options, message = BAD_OPTIONS[case]
    with pytest.raises(WeightError, match=message):
        operators.check_activations(fused_with_heads()[0], *options)
    if case != "device":
        with pytest.raises(WeightError, match=message):
            operator("fused")(*fused_with_heads(), False, *options)


def test_rotary_needs_whole_heads() -> None:
    with pytest.raises(WeightError, match="K = 256; with positions it must be a multiple of 512"):
        operator("fused")(*operands("fused"), False, "bf16", POSITIONS, TABLE)


def test_a_device_that_cannot_multiply_the_format_names_the_path_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    operators.arch_of.cache_clear()
    with pytest.raises(WeightError, match=r"capability 8\.0 does not multiply .*use path 'einsum'"):
        operators.arch_of(0, "bmm", torch.float8_e4m3fn)
    operators.arch_of.cache_clear()
