"""The choice of a recorder."""

from __future__ import annotations

import torch

from graphs.recording.recorder import Recorder


def recorder_for(device: torch.device) -> Recorder:
    """The recorder of a device: the tape on a CPU, a graph on CUDA and HIP."""
    if device.type == "cuda":
        from graphs.recording.cuda_graph import CudaRecorder

        return CudaRecorder(device)
    from graphs.recording.cpu_tape import TapeRecorder

    return TapeRecorder()
