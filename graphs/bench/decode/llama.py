"""A Llama of random weights that decodes real text, one token per step, from a static cache.

The token ids are the bytes of a few sentences: every vocabulary here holds at least 256 ids, and no tokeniser has to be
fetched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphs.bench.harness.optional import optional_module

Tensor = torch.Tensor
Forward = Callable[..., Any]

TEXT = (
    "The ferry left the harbour an hour before sunrise, carrying mail, two bicycles and a crate of young apple trees. "
    "Nobody on deck spoke until the lighthouse was behind them. "
    "By noon the wind had turned, and the captain read the barometer twice before writing anything into the log. "
    "On the far shore a woman with a red umbrella waited for the trees, because the old orchard had not survived the frost. "
)


@dataclass(frozen=True)
class LlamaSize:
    """Dimensions of a model and of its cache.

    Attributes:
        cache_len: tokens that the static cache holds for each sequence.
        prompt: tokens read before decoding starts.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: torch.dtype
    cache_len: int
    prompt: int

    def describe(self) -> str:
        """One line for the report."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {self.layers} layers, hidden {self.hidden}, {kind}, static cache of {self.cache_len} tokens"


TOY = LlamaSize("toy Llama", 4, 128, 256, 4, 2, 512, torch.float32, cache_len=96, prompt=16)
WIDE = LlamaSize("Llama", 16, 2048, 8192, 32, 8, 32000, torch.bfloat16, cache_len=256, prompt=32)


def size_for(device: torch.device) -> LlamaSize:
    """The model that a device is measured with."""
    return WIDE if device.type == "cuda" else TOY


def build_llama(size: LlamaSize, device: torch.device) -> torch.nn.Module:
    """A ``LlamaForCausalLM`` with random weights from a fixed seed, in evaluation mode."""
    transformers = optional_module("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.cache_len,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=size.dtype)
    return model.eval()


def prompts(batch: int, length: int, device: torch.device) -> Tensor:
    """Token ids ``[batch, length]``: each row is another window of `TEXT`."""
    text = TEXT.encode()
    rows = [[text[(13 * row + column) % len(text)] for column in range(length)] for row in range(batch)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


class Decoding:
    """A batch of sequences in one static cache, to be decoded by whichever callable is given.

    Every recording made of it reads the same cache, so the object can be reset and reused, eager and replayed.

    Attributes:
        batch: sequences.
        first: token ids ``[batch, 1]`` of the first decode step.
    """

    def __init__(self, model: torch.nn.Module, size: LlamaSize, batch: int, device: torch.device) -> None:
        transformers = optional_module("transformers")
        self.batch = batch
        self._cache = transformers.StaticCache(config=model.config, max_cache_len=size.cache_len)
        ids = prompts(batch, size.prompt, device)
        positions = torch.arange(size.prompt, device=device).expand(batch, -1).contiguous()
        self.first = _greedy(self.forward(model, ids, positions))
        self._tensors = [value for layer in self._cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        self._saved = [tensor.clone() for tensor in self._tensors]
        steps = torch.arange(size.prompt, size.cache_len, device=device)
        self._positions = [step.expand(batch, 1).contiguous() for step in steps]

    @property
    def room(self) -> int:
        """Steps until the cache is full."""
        return len(self._positions)

    def reset(self) -> None:
        """Put the cache back to where the prompts have been read."""
        torch._foreach_copy_(self._tensors, self._saved)

    def forward(self, model: Forward, ids: Tensor, positions: Tensor) -> Tensor:
        """One forward pass; logits ``[batch, tokens, vocabulary]``."""
        with torch.no_grad():
            logits: Tensor = model(ids, past_key_values=self._cache, position_ids=positions).logits
        return logits

    def first_step(self, model: Forward) -> Tensor:
        """The decode step after the prompts. Each call moves the cache one token on: `reset` in between."""
        return self.forward(model, self.first, self._positions[0])

    def same_step(self, model: Forward, times: int) -> None:
        """``times`` decode steps on the same token, without looking at what comes out."""
        with torch.no_grad():  # entered once, as a decode loop does
            for index in range(times):
                model(self.first, past_key_values=self._cache, position_ids=self._positions[index])

    def host_microseconds(self, model: Forward, steps: int, before: Callable[[], None] = lambda: None) -> list[float]:
        """Host time of each of ``steps`` decode steps in a row, as a decode loop issues them, from an idle device.

        ``steps`` is small against the depth of the launch queue, so the host does not wait for the device.
        """
        self.reset()
        if self.first.is_cuda:
            torch.cuda.synchronize(self.first.device)
        samples = []
        for index in range(steps):
            before()
            start = time.perf_counter()
            self.forward(model, self.first, self._positions[index])
            samples.append((time.perf_counter() - start) * 1e6)
        return samples

    def generate(self, model: Forward, steps: int) -> Tensor:
        """Decode ``steps`` tokens greedily; ids ``[batch, steps]``."""
        ids, tokens = self.first, []
        for index in range(steps):
            ids = _greedy(self.forward(model, ids, self._positions[index]))
            tokens.append(ids)
        return torch.cat(tokens, dim=1)


def _greedy(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(dim=-1, keepdim=True)
