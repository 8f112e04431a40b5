"""The vendor: what each object says, and which one is chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphs.recording.vendor import CUDA, HIP, Vendor, choose_vendor, current_vendor


def test_both_vendors_record_thread_locally() -> None:
    assert CUDA.capture_error_mode == HIP.capture_error_mode == "thread_local"


def test_the_vendors_drivers() -> None:
    assert CUDA.libraries == ("libcuda.so.1",) and CUDA.driver == ("cuStreamBeginCapture_v2", "cuStreamCreate")
    assert HIP.driver == ("hipStreamBeginCapture", "hipStreamCreateWithFlags")
    assert all(name.startswith("libamdhip64.so") for name in HIP.libraries)


def test_hip_polls_the_capture_and_counts_driver_memory_and_cuda_does_not() -> None:
    assert (CUDA.vendor, CUDA.poll_capture, CUDA.bytes_per_graph) == ("cuda", False, 0)
    assert (HIP.vendor, HIP.poll_capture) == ("hip", True) and HIP.bytes_per_graph > 0


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CUDA.vendor = "hip"  # type: ignore[misc]


@pytest.mark.parametrize("faulting", [True, False])
def test_a_build_for_cuda_gets_the_policy_of_cuda(faulting: bool) -> None:
    assert choose_vendor(None, faulting) is CUDA


def test_a_build_for_hip_refuses_topk_only_where_it_faults() -> None:
    faulting, sound = choose_vendor("7.2.1", True), choose_vendor("7.2.1", False)
    assert "second replay" in (faulting.refuses("aten.topk.default") or "")
    assert faulting.refuses("aten.topk.values") and not faulting.refuses("aten.sort.default")
    assert sound.refuses("aten.topk.default") is None
    assert dataclasses.replace(faulting, refused_operators=()) == sound


def test_cuda_refuses_no_operator() -> None:
    assert CUDA.refuses("aten.topk.default") is None


def test_this_process_has_one_policy_which_is_that_of_its_torch() -> None:
    assert current_vendor() is current_vendor()
    assert current_vendor().vendor == ("cuda" if torch.version.hip is None else "hip")


C_LIBRARY = "libc.so.6"


def test_a_driver_that_refuses_is_named_with_its_status() -> None:
    """``toupper`` stands in for the driver: an int function that gives its argument back."""
    policy = Vendor("test", libraries=("libnothing.so.1", C_LIBRARY), driver=("toupper", "toupper"))
    with pytest.raises(RuntimeError, match="toupper failed with status 7"):
        policy.begin_empty_capture(7)
    policy.begin_empty_capture(0)


def test_a_driver_that_is_not_there_is_named_with_every_library_tried() -> None:
    policy = Vendor("test", libraries=("libnothing.so.1", "libnothing.so"), driver=("toupper", "toupper"))
    with pytest.raises(RuntimeError, match=r"cannot be loaded: libnothing\.so\.1.*; libnothing\.so:"):
        policy.create_stream()
