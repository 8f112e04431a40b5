"""Steps lowered to MLIR, and their linalg form compiled and run, against eager."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")

import graphs
import passes
from graphs.ops.wo_a import reference
from passes.errors import IndexOutOfRange, OptionError
from passes.mlir import DIALECTS
from passes.mlir.lower import run_pipeline

ops = torch.ops.graphs
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
TO_LINALG = {  # how the wheel itself brings the other dialects to linalg: what they say can be run
    "stablehlo": "builtin.module(stablehlo-legalize-to-linalg,stablehlo-convert-to-signless,canonicalize)",
    "tosa": "builtin.module(func.func(tosa-infer-shapes,tosa-make-broadcastable,tosa-to-linalg-named,tosa-to-linalg),"
    "func.func(tosa-to-arith,tosa-to-tensor,tosa-to-scf),canonicalize)",
}


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def same_bits(y: Tensor, expected: Tensor) -> bool:
    """Equal numbers, and NaN in the same places."""
    return bool(((y == expected) | (y.isnan() & expected.isnan())).all())


def run_dialect(dialect: str, model: Callable[..., Any], *args: Any) -> Any:
    lowered = passes.to_mlir(model, *args, dialect=dialect)
    if dialect != "linalg":
        run_pipeline(lowered.module, TO_LINALG[dialect], "test")
    return passes.compile_mlir(dataclasses.replace(lowered, dialect="linalg"))(*args)


# The operators of graphs


def exact_operands(seed: int, m: int = 3, g: int = 2, n: int = 128, k: int = 256) -> dict[str, Tensor]:
    """Small integers, scales that are powers of two, activations whose groups peak at 448: every sum is exact in float32."""
    rng = torch.Generator().manual_seed(seed)
    o = torch.randint(-8, 9, (m, g, k), generator=rng).float()
    o[..., ::128] = 448.0
    w = torch.randint(-8, 9, (g, n, k), generator=rng).float()
    blocks = 2.0 ** torch.randint(-3, 4, (g, n // 128, k // 128), generator=rng)
    return {
        "o": o.bfloat16(),
        "w": w.bfloat16(),
        "q": w.to(torch.float8_e4m3fn),
        "single": torch.tensor([0.25]),
        "blocks": blocks,
        "positions": torch.randint(0, 9, (m,), generator=rng),
        "table": torch.randint(-1, 2, (9, 64), generator=rng).float(),
    }


PATHS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "einsum": (lambda o, w: ops.wo_a_einsum(o, w), "o w"),
    "bmm": (lambda o, q, s: ops.wo_a_bmm(o, q, s), "o q single"),
    "gloop": (lambda o, q, s: ops.wo_a_gloop(o, q, s), "o q blocks"),
    "fused": (lambda o, q, s: ops.wo_a_fused(o, q, s, True), "o q blocks"),
    "fused, fp8": (lambda o, q, s: ops.wo_a_fused(o, q, s, False, "fp8"), "o q blocks"),
}


def path_call(path: str, seed: int = 0) -> tuple[Callable[..., Tensor], list[Tensor]]:
    operator, names = PATHS[path]
    operands = exact_operands(seed)
    return operator, [operands[name] for name in names.split()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_path_lowers_to_every_dialect(path: str, dialect: str) -> None:
    operator, operands = path_call(path)
    text = str(passes.to_mlir(operator, *operands, dialect=dialect))
    assert "func.func @main" in text and "wo_a" not in text
    assert ("f8E4M3FN" in text) == (path != "einsum")  # FP8 stays FP8 in every dialect
    own = {"torch": "!torch.vtensor", "linalg": "linalg.generic", "stablehlo": "stablehlo.", "tosa": "tosa."}
    assert own[dialect] in text


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_paths_are_the_same_bits_where_sums_are_exact(path: str, seed: int) -> None:
    operator, operands = path_call(path, seed)
    assert torch.equal(passes.run_mlir(operator, *operands), operator(*operands))


@pytest.mark.parametrize("dialect", TO_LINALG)
@pytest.mark.parametrize("path", PATHS)
def test_other_dialects_mean_the_same(path: str, dialect: str) -> None:
    operator, operands = path_call(path)
    result = run_dialect(dialect, operator, *operands)
    expected = operator(*operands)
    if dialect == "tosa":  # it divides by multiplying with the reciprocal, so that roundings to FP8 may differ
        assert relative(result, expected) < 1e-2
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("fp8", FP8)
def test_arithmetic_of_the_paths_in_float32(m: int, fp8: torch.dtype) -> None:
    o, w = torch.randn(m, 2, 512), torch.randn(2, 256, 512)
    single, blocks = reference.quantise_single(w, fp8), reference.quantise_blocks(w, fp8)
    for project, weights in (
        (reference.project, (w,)),
        (reference.project_quantised, single),
        (reference.project_quantised, blocks),
        (reference.project_blocks, blocks),
    ):
        assert relative(passes.run_mlir(project, o, *weights), project(o, *weights)) <= 1e-5
    assert relative(passes.run_mlir(ops.wo_a_einsum.default, o, w), ops.wo_a_einsum(o, w)) <= 1e-5


def test_inverse_rotary_in_front_of_the_projection() -> None:
    operands = exact_operands(0, k=512)
    names = ("o", "q", "blocks", "positions", "table")
    values = [operands[name] for name in names]

    def step(o: Tensor, q: Tensor, s: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        return ops.wo_a_fused(o, q, s, False, "bf16", positions, table)

    assert torch.equal(passes.run_mlir(step, *values), step(*values))
    o, table = torch.randn(3, 2, 512), torch.randn(9, 64)
    undone = passes.run_mlir(reference.inverse_rotary, o, operands["positions"], table)
    assert relative(undone, reference.inverse_rotary(o, operands["positions"], table)) <= 1e-5


@pytest.mark.parametrize("path", ["einsum", "bmm", "gloop", "fused"])
def test_projection_module_on_random_data(path: str) -> None:
    module = graphs.GroupedProjection(torch.randn(2, 128, 256).bfloat16(), path=path)
    o = torch.randn(4, 2, 256).bfloat16()
    result, expected = passes.run_mlir(module, o), module(o)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-5)  # float32 sums in another order, then one rounding
    assert relative(result, expected) < 5e-4


# FP8 in integer arithmetic


@pytest.mark.parametrize("fp8", FP8)
def test_every_byte_is_decoded(fp8: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(fp8)
    results = passes.run_mlir(lambda x: (x.float(), x.bfloat16(), x.double()), x)
    for result, expected in zip(results, (x.float(), x.bfloat16(), x.double()), strict=True):
        assert same_bits(result, expected)
        assert torch.equal(torch.signbit(result) & ~result.isnan(), torch.signbit(expected) & ~expected.isnan())


def assert_encoded(x: Tensor, fp8: torch.dtype) -> None:
    result, expected = passes.run_mlir(lambda x: x.to(fp8), x), x.to(fp8)
    differ = result.view(torch.uint8) != expected.view(torch.uint8)
    assert not (differ & ~(result.float().isnan() & expected.float().isnan())).any()


@pytest.mark.parametrize("fp8", FP8)
def test_every_bfloat16_is_encoded(fp8: torch.dtype) -> None:
    assert_encoded(torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16), fp8)


@pytest.mark.parametrize("fp8", FP8)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_float32_is_encoded_ties_to_even(fp8: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    patterns = torch.randint(-(2**31), 2**31, (4096,), generator=rng).to(torch.int32).view(torch.float32)
    numbers = torch.arange(127, dtype=torch.uint8).view(fp8).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    assert_encoded(torch.cat((patterns, ties, -ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1))), fp8)


# Blocks and steps


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(width), nn.Linear(width, 3 * width)
        self.out, self.last, self.heads = nn.Linear(width, width), nn.LayerNorm(width), heads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.out((causal + masked).transpose(1, 2).reshape(b, t, d))
        return self.last(x + F.gelu(y) * F.silu(y))


class DecodeStep(nn.Module):
    """One token in, one token out; keys and values are written at ``position`` in buffers."""

    def __init__(self, vocabulary: int = 17, width: int = 16, heads: int = 2, length: int = 8) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(vocabulary, width), nn.Linear(width, 3 * width, bias=False)
        self.head, self.heads, self.length = nn.Linear(width, vocabulary), heads, length
        self.register_buffer("keys", torch.zeros(1, heads, length, width // heads))
        self.register_buffer("values", torch.zeros(1, heads, length, width // heads), persistent=False)

    def forward(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.embed(token)).view(1, 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        self.keys[:, :, position] = k
        self.values.index_copy_(2, position, v)
        mask = (torch.arange(self.length) <= position)[None]
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        logits = self.head(y.transpose(1, 2).reshape(1, 1, -1))
        return logits.argmax(-1), logits


@pytest.mark.parametrize("dialect", ["linalg", "stablehlo", "tosa"])
def test_attention_block(dialect: str) -> None:
    block, x = Attention(), torch.randn(2, 5, 32)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        assert relative(run_dialect(dialect, block, x, mask), block(x, mask)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_block_in_short_floats(dtype: torch.dtype) -> None:
    block, x = Attention().to(dtype), torch.randn(2, 5, 32).to(dtype)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        assert relative(passes.run_mlir(block, x, mask), block(x, mask)) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dialect", ["torch", "linalg", "stablehlo"])
def test_decode_step_lowers(dialect: str) -> None:
    assert "func.func @main" in str(passes.to_mlir(DecodeStep(), torch.tensor([[3]]), torch.tensor([0]), dialect=dialect))


@torch.no_grad()
def test_decode_step_writes_its_cache() -> None:
    eager = DecodeStep()
    model = copy.deepcopy(eager)
    token = expected_token = torch.tensor([[3]])
    step = passes.compile_mlir(passes.to_mlir(model, token, torch.tensor([0])))
    assert not model.keys.any() and not model.values.any()  # lowering runs nothing
    for index in range(model.length):
        token, logits = step(token, torch.tensor([index]))
        expected_token, expected = eager(expected_token, torch.tensor([index]))
        assert torch.equal(token, expected_token) and relative(logits, expected) <= 1e-5
        assert relative(model.keys, eager.keys) <= 1e-5 and relative(model.values, eager.values) <= 1e-5


def test_tensors_without_a_name_are_state_too() -> None:
    """A closure, and an object that is no pytree, hold what is written; lowering writes none of it."""

    class Cache:
        def __init__(self) -> None:
            self.rows, self.length = torch.zeros(4, 2), torch.zeros((), dtype=torch.int64)

    total = torch.zeros(2)

    def step(x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        cache.rows.index_copy_(0, cache.length.reshape(1), x[None])
        cache.length.add_(1)
        total.add_(x)
        return cache.rows.sum(0) + total, cache

    cache, x = Cache(), torch.ones(2)
    compiled = passes.compile_mlir(passes.to_mlir(step, x, cache))
    assert cache.length == 0 and not cache.rows.any() and not total.any()
    for index in range(1, 4):
        y, returned = compiled(x * index, cache)
        assert returned is cache and cache.length == index
    assert torch.equal(y, torch.full((2,), 12.0)) and torch.equal(cache.rows[:, 0], torch.tensor([1.0, 2.0, 3.0, 0.0]))
    with pytest.raises(OptionError, match=r"args\[1\]"):
        compiled(x, Cache())


@torch.no_grad()
def test_llama_with_a_static_cache() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config).eval()
    mine, theirs = (transformers.StaticCache(config=config, max_cache_len=8) for _ in range(2))
    for cache in (mine, theirs):
        model(torch.tensor([[3, 5]]), past_key_values=cache, position_ids=torch.arange(2)[None])
    token, at = torch.tensor([[7]]), torch.tensor([[2]])
    compiled = passes.compile_mlir(passes.to_mlir(model, token, kwargs={"past_key_values": mine, "position_ids": at}))
    for _ in range(3):
        result = compiled(token, position_ids=at, past_key_values=mine)
        expected = model(token, past_key_values=theirs, position_ids=at)
        assert type(result) is type(expected) and relative(result.logits, expected.logits) <= 1e-5
        token, at = expected.logits.argmax(-1), at + 1
    assert relative(mine.layers[1].keys, theirs.layers[1].keys) <= 1e-5


# What goes in and out


def test_models_functions_graphs_programs_and_captured_steps() -> None:
    model, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4)
    step = graphs.capture(model)
    for _ in range(2):
        step(x)
    for kind in (model, lambda x: model(x), make_fx(model)(x), torch.export.export(model, (x,)), step):
        assert relative(passes.run_mlir(kind, x), model(x)) <= 1e-5
    assert [o.name for o in passes.to_mlir(model, x).program.operands] == ["weight", "bias", "args[0]"]


def test_results_keep_their_structure() -> None:
    def model(x: Tensor, *, scale: float, also: dict[str, Tensor]) -> dict[str, Any]:
        y = x * scale
        return {"y": (y, y), "none": None, "number": 3, "x": x, "view": y.t(), "more": [also["b"] + 1]}

    x, kwargs = torch.randn(2, 3), {"scale": 2.0, "also": {"b": torch.arange(3)}}
    result, expected = passes.run_mlir(model, x, kwargs=kwargs), model(x, **kwargs)
    assert result["none"] is None and result["number"] == 3 and list(result) == list(expected)
    for key in ("x", "view"):
        assert torch.equal(result[key], expected[key])
    assert torch.equal(result["y"][0], expected["y"][0]) and torch.equal(result["y"][1], expected["y"][1])
    assert torch.equal(result["more"][0], expected["more"][0])


def test_arguments_written_in_place_and_with_strides() -> None:
    def model(x: Tensor, state: Tensor) -> Tensor:
        state.mul_(2).add_(x)
        return state[0]

    x, state = torch.randn(3, 2).t(), torch.randn(3, 2).t()
    expected = state.clone()
    y = model(x, expected)
    assert torch.equal(passes.run_mlir(model, x, state), y) and torch.equal(state, expected)


def test_a_weight_replaced_in_place_is_the_one_that_is_read() -> None:
    model, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4)
    compiled = passes.compile_mlir(passes.to_mlir(model, x))
    model.weight.copy_(torch.randn(3, 4))
    assert relative(compiled(x), model(x)) <= 1e-5


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(3),), {"flag": True}, "args[0] = 'torch.float32 (3,)'"),
        ((torch.ones(2).double(),), {"flag": True}, "torch.float64"),
        ((torch.ones(2, device="meta"),), {"flag": True}, "'cpu'"),
        ((torch.ones(2),), {"flag": False}, "kwargs['flag'] = False"),
        ((torch.ones(2),), {}, "structure of the arguments"),
        ((2.0,), {"flag": True}, "args[0]"),
    ],
)
def test_another_call_than_the_one_lowered(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    def model(x: Tensor, *, flag: bool) -> Tensor:
        return x + 1 if flag else x - 1

    compiled = passes.compile_mlir(passes.to_mlir(model, torch.ones(2), kwargs={"flag": True}))
    with pytest.raises(OptionError) as raised:
        compiled(*args, **kwargs)
    assert message in str(raised.value)


INDEXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "read": lambda b, i: b[i],
    "read columns": lambda b, i: b[:, i],
    "index_select": lambda b, i: b.index_select(0, i),
    "embedding": lambda b, i: F.embedding(i, b),
    "gather": lambda b, i: b.gather(0, i[:, None]),
    "write": lambda b, i: b.index_put((i,), torch.ones(2, 3)),
    "accumulate": lambda b, i: b.index_put((i,), torch.ones(2, 3), accumulate=True),
    "index_copy": lambda b, i: b.index_copy(0, i, torch.ones(2, 3)),
    "index_add": lambda b, i: b.index_add(0, i, torch.ones(2, 3)),
    "scatter": lambda b, i: b.scatter(0, i[:, None], torch.ones(2, 1)),
}


@pytest.mark.parametrize("name", INDEXED)
def test_indices_count_from_the_end_or_raise_as_in_eager(name: str) -> None:
    function, board = INDEXED[name], torch.arange(18.0).view(6, 3)
    compiled = passes.compile_mlir(passes.to_mlir(function, board, torch.tensor([0, 1])))
    from_the_end = (
        [] if name in ("index_copy", "index_add") else [[-1, 1], [-3, -2]]
    )  # torch's own decomposition of them is lenient
    for pair in ([2, 0], [7, 1], [-9, 0], [5, 6], [0, 2**40], *from_the_end):
        index = torch.tensor(pair)
        try:
            expected = function(board, index)
        except (IndexError, RuntimeError):
            with pytest.raises(IndexOutOfRange):
                compiled(board, index)
        else:
            assert torch.equal(compiled(board, index), expected)


def test_an_index_out_of_range_names_the_line_and_writes_nothing() -> None:
    def model(board: Tensor, index: Tensor) -> Tensor:
        board.add_(1)
        board.index_copy_(0, index, torch.ones(1))  # here
        return board.sum()

    board = torch.zeros(4)
    compiled = passes.compile_mlir(passes.to_mlir(model, board, torch.tensor([0])))
    with pytest.raises(IndexOutOfRange, match="Remedy") as raised:
        compiled(board, torch.tensor([4]))
    assert raised.value.site.source.endswith("# here") and not board.any()
    assert compiled(board, torch.tensor([3])) == 4  # and the next call is fine
