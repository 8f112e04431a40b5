"""What ``generate()`` is measured with: GPT-2 at its real size and a wide Llama, with random weights; small ones on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphs.bench.choices import MODELS
from graphs.bench.decode.llama import TOY, WIDE, build_llama, prompts
from graphs.bench.harness.optional import optional_module

Tensor = torch.Tensor
Model = Any  # a model of transformers


@dataclass(frozen=True)
class Workload:
    """A model, and what it is asked for.

    Attributes:
        build: makes the model on a device.
        batch: sequences.
        prompt, new: tokens of each that are given, and that are asked for.
    """

    name: str
    build: Callable[[torch.device], Model]
    batch: int
    prompt: int
    new: int

    def describe(self) -> str:
        """One line for the report."""
        return f"{self.name}, batch {self.batch}, {self.prompt} in, {self.new} out"

    def model(self, device: torch.device) -> Model:
        """The model, which ends no sequence before it has all its tokens."""
        model = self.build(device)
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        return model

    def ids(self, device: torch.device) -> Tensor:
        """The prompts, ``[batch, prompt]``."""
        return prompts(self.batch, self.prompt, device)


def workloads(device: torch.device, names: tuple[str, ...]) -> list[Workload]:
    """Those of a device for some of `MODELS`."""
    on_gpu = device.type == "cuda"
    size = WIDE if on_gpu else TOY
    llama = functools.partial(build_llama, size)
    known = {
        "gpt2": Workload("GPT-2", _gpt2, 1, 128, 32) if on_gpu else Workload("toy GPT-2", _toy_gpt2, 1, 24, 8),
        "llama": Workload(size.name, llama, 4, 128, 64) if on_gpu else Workload(size.name, llama, 2, 24, 8),
    }
    return [known[name] for name in MODELS if name in names]


def _gpt2(device: torch.device) -> Model:
    return _built(device, torch.bfloat16)


def _toy_gpt2(device: torch.device) -> Model:
    return _built(device, torch.float32, n_layer=2, n_embd=64, n_head=4, vocab_size=512, bos_token_id=None, eos_token_id=None)


def _built(device: torch.device, dtype: torch.dtype, **sizes: int | None) -> Model:
    transformers = optional_module("transformers")
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes), dtype=dtype).eval()
