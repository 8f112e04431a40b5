from __future__ import annotations

import torch

from graphs.observation.launches import count_launches, submissions


def test_operators_are_counted_on_the_cpu() -> None:
    a = torch.ones(3)
    assert count_launches(lambda: (a + a) * a, torch.device("cpu")) == 2


def test_only_driver_calls_that_submit_work_count() -> None:
    counts = {
        "cudaLaunchKernel": 3,
        "cudaLaunchKernelExC": 2,
        "cuLaunchKernelEx": 5,
        "cudaLaunchCooperativeKernel": 1,
        "cudaMemcpyAsync": 7,
        "cudaMemsetAsync": 11,
        "cudaGraphLaunch": 13,
        "hipExtModuleLaunchKernel": 17,
        "hipGraphLaunch": 19,
        "cudaStreamSynchronize": 100,
        "cudaDeviceSynchronize": 100,
        "cudaEventRecord": 100,
        "aten::mm": 100,
        "ampere_gemm_kernel": 100,
        "Memcpy DtoD (Device -> Device)": 100,
    }
    assert submissions(counts) == 3 + 2 + 5 + 1 + 7 + 11 + 13 + 17 + 19
