"""The kernels that copy inputs in and outputs out and that count runs: interpreted, and compiled for four chips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot be interpreted or compiled")

from graphs.contract.padding import Padding
from graphs.errors import ConfigError
from graphs.ops import offline
from graphs.recording import copy_kernels, run_word
from graphs.recording.copy_kernels import Move, move_rows

SCRIPT = Path(__file__).with_name("interpret_copies.py")
ROOT = SCRIPT.parents[2]
DTYPES = ["bool", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "complex64", "complex128"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, list[str]]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_are_filled_and_padded_as_the_reference_does(interpreted: dict[str, Any], dtype: str) -> None:
    assert interpreted[dtype]["inbound"] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_cut_to_their_real_rows(interpreted: dict[str, Any], dtype: str) -> None:
    assert interpreted[dtype]["outbound"] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_tensors_is_written(interpreted: dict[str, Any], dtype: str) -> None:
    assert interpreted[dtype]["guards"] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_turn_and_its_row_are_carried_across_the_end_of_the_ring(interpreted: dict[str, Any], dtype: str) -> None:
    assert interpreted[dtype]["turn"] == []


def test_a_recording_without_tensors_still_counts_its_turn(interpreted: dict[str, Any]) -> None:
    assert interpreted["nothing"]["turn"] == ["9"], "one replay, and the launches that load the kernels"


def test_a_row_that_many_programs_read_is_fetched_ahead_of_them(interpreted: dict[str, Any]) -> None:
    alone, fetch, many = interpreted["kernels"]["launched"]
    assert alone == "move_rows[1, 1] 1 True"
    assert (fetch, many) == ("fetch_row[1] 1 None", "move_rows[1, 3] 4 False")


def test_a_run_leaves_its_number_and_whether_it_was_broken(interpreted: dict[str, Any]) -> None:
    assert interpreted["run word"]["left"] == ["2 2", "4 5", "6 6"], "twice the runs, and one more in the word if broken"


def test_a_sentinel_for_elements_wider_than_a_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sentinel = 3 .* 0 for torch\.complex128"):
        Padding("sentinel", 3).fill_bits(torch.complex128)
    assert Padding("sentinel", 0).fill_bits(torch.complex128) == 0


VARIANTS = {  # what `Copier` launches, and `count_run`: kernel, constants, warps
    "run word": (run_word._count_run, {}, 1),
    "fetch": (copy_kernels.fetch_row, {}, 1),
    "few inputs": (move_rows, {"INBOUND": True, "FETCH": True, "HOST": False}, 1),
    "many inputs": (move_rows, {"INBOUND": True, "FETCH": False, "HOST": False}, copy_kernels._WARPS),
    "few inputs, some from the host": (move_rows, {"INBOUND": True, "FETCH": True, "HOST": True}, 1),
    "many inputs, some from the host": (move_rows, {"INBOUND": True, "FETCH": False, "HOST": True}, copy_kernels._WARPS),
    "outputs": (move_rows, {"INBOUND": False, "FETCH": False, "HOST": False}, copy_kernels._WARPS),
}


def compiled(target: str, variant: str, width: int = 32) -> tuple[Any, str]:
    """A kernel compiled for a chip as it is launched there, and its assembly."""
    triton = copy_kernels.triton
    kernel, constants, warps = VARIANTS[variant]
    vendor, arch, warp, *_ = offline.TARGETS[target]
    known = constants | {"WIDTH": width, "HEADER": copy_kernels._HEADER, "FIELDS": copy_kernels._FIELDS}
    known["BLOCK"] = copy_kernels._BLOCK * warps // copy_kernels._WARPS
    known = {name: value for name, value in known.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in known else "*u8" if name == "broken" else "*i64" for name in kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind == "*i64"}
    source = triton.compiler.ASTSource(kernel, signature, known, aligned)
    chip = triton.backends.compiler.GPUTarget(vendor, arch, warp)
    binary = triton.compile(source, target=chip, options={"enable_fp_fusion": True, "num_warps": warps})
    return binary, binary.asm["amdgcn" if vendor == "hip" else "ptx"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", offline.TARGETS)
def test_the_kernels_compile_without_spills(target: str, variant: str) -> None:
    binary, text = compiled(target, variant)
    if offline.TARGETS[target][0] == "hip":
        registers, spills = offline.amd_registers(text)
    else:
        registers, spills = offline.nvidia_registers(binary.asm["cubin"])
    assert spills == 0
    assert registers <= 128, "a program that waits for host memory should not have to wait for room as well"
    assert binary.metadata.shared <= 1024, "only a sum over one row of addresses goes through shared memory"


@pytest.mark.parametrize("variant", ["few inputs", "many inputs"])
def test_arguments_in_host_memory_are_read_past_the_caches_and_others_are_not(variant: str) -> None:
    plain, host = (compiled("sm_90", name)[1].count("ld.volatile.global") for name in (variant, f"{variant}, some from the host"))
    assert host >= plain + 4, "one load for each size of unit"


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_table_in_host_memory_is_read_past_the_caches(target: str) -> None:
    """A row is written anew by the host; only the kernels that read it ask for volatile loads."""
    volatile = {variant for variant in VARIANTS if "ld.volatile.global" in compiled(target, variant)[1]}
    assert volatile == {"fetch", "few inputs", *(variant for variant in VARIANTS if "from the host" in variant)}


@pytest.mark.parametrize("variant", ["fetch", "few inputs"])
def test_one_warp_reads_a_usual_row_with_one_load(variant: str) -> None:
    """Each warp waits for each of its loads from host memory, one after the other."""
    assert compiled("sm_90", variant)[1].count("ld.volatile.global") == 1


def test_a_wide_table_compiles() -> None:
    assert compiled("sm_90", "fetch", width=256)[0].asm["cubin"]
    assert compiled("sm_90", "outputs", width=256)[0].asm["cubin"]


def test_fields_of_a_tensor_with_rows_in_the_middle() -> None:
    static = torch.zeros(2, 4, 3, dtype=torch.int16)
    address, *fields = Move(static, 1, Padding("sentinel", 3)).fields()
    assert address == static.data_ptr()
    assert fields == [2, 4, 6, 1, 0x0003_0003_0003_0003, 1]


def test_fields_of_a_tensor_without_rows() -> None:
    assert Move(torch.zeros(2, 3), None, Padding("repeat")).fields()[1:] == [1, 1, 24, 0, 0, 0]


@pytest.mark.parametrize("value", [-1, 1.5])
def test_a_fill_word_repeats_the_bits_of_one_element(value: float) -> None:
    for dtype in (torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64):
        word = torch.tensor([Padding("sentinel", value).fill_bits(dtype)])
        assert torch.equal(word.view(dtype), torch.full((8 // dtype.itemsize,), value).to(dtype)), dtype
