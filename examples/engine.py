"""A small serving engine: continuous batching, batch buckets, and a paged cache with a spare slot for padded rows.

    python examples/engine.py

Requests of different lengths come and go, so the batch changes from step to step. ``buckets`` records a few batch sizes; a
batch in between is padded. A padded row must not write where a sequence lives, so its ``slot`` is one that no sequence owns:
``padding={"slot": graphs.sentinel(SPARE)}``. Prompts are read one token per step, to keep the example to one kind of step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphs

HEADS, HEAD, VOCABULARY = 4, 32, 256
PAGE, PAGES, PAGES_PER_REQUEST = 8, 32, 4  # a page holds the keys and values of 8 tokens
SPARE = PAGE * PAGES  # the slot that padded rows write to
BUCKETS = (1, 2, 4, 8)


class Decoder(nn.Module):
    """One layer of attention over a paged cache: enough of a model to need everything that an engine needs."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.qkv, self.out, self.logits = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, VOCABULARY)
        self.register_buffer("keys", torch.zeros(SPARE + 1, HEADS, HEAD))
        self.register_buffer("values", torch.zeros(SPARE + 1, HEADS, HEAD))

    def forward(self, token: Tensor, position: Tensor, slot: Tensor, pages: Tensor) -> Tensor:
        """One token of each sequence.

        Args:
            token, position, slot: ``[batch]``, int64; ``slot`` is the row of the cache that this token's keys go to.
            pages: ``[batch, PAGES_PER_REQUEST]``, int64: the pages of each sequence, in order.

        Returns:
            Logits ``[batch, VOCABULARY]``.
        """
        x = self.embedding(token)
        query, key, value = self.qkv(x).view(-1, 3, HEADS, HEAD).unbind(1)
        self.keys.index_copy_(0, slot, key)
        self.values.index_copy_(0, slot, value)
        offsets = torch.arange(PAGE, device=token.device)
        rows = (pages[:, :, None] * PAGE + offsets).flatten(1)  # [batch, tokens]
        seen = torch.arange(rows.shape[1], device=token.device) <= position[:, None]
        keys, values = self.keys[rows].transpose(1, 2), self.values[rows].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=seen[:, None, None])
        return self.logits(x + self.out(mixed.flatten(1)))


@dataclass
class Request:
    """A prompt to be continued by ``new_tokens`` tokens; ``ids`` holds the prompt and what has been decoded."""

    ids: list[int]
    new_tokens: int
    read: int = 0
    pages: list[int] = field(default_factory=list)
    length: int = field(init=False)

    def __post_init__(self) -> None:
        """The number of tokens when it is finished."""
        self.length = len(self.ids) + self.new_tokens


class Engine:
    """Runs requests to their end, at most ``BUCKETS[-1]`` at a time."""

    def __init__(self, step: Callable[..., Tensor], device: str) -> None:
        self._step, self._device = step, device
        self._free = list(range(PAGES))

    def run(self, requests: list[Request]) -> list[list[int]]:
        """The ids of each request, prompt included, in the order given."""
        waiting, running = list(requests), list[Request]()
        while waiting or running:
            while waiting and len(running) < BUCKETS[-1] and len(self._free) >= PAGES_PER_REQUEST:
                running.append(waiting.pop(0))
                running[-1].pages = [self._free.pop() for _ in range(PAGES_PER_REQUEST)]
            self._decode(running)
            for request in [request for request in running if len(request.ids) == request.length]:
                running.remove(request)
                self._free += request.pages
        return [request.ids for request in requests]

    def _decode(self, running: list[Request]) -> None:
        """One step for all that run: read the next token of each, and keep the new one where its prompt is read."""
        token = torch.tensor([request.ids[request.read] for request in running], device=self._device)
        position = torch.tensor([request.read for request in running], device=self._device)
        pages = torch.tensor([request.pages for request in running], device=self._device)
        slot = pages.gather(1, position[:, None] // PAGE)[:, 0] * PAGE + position % PAGE
        best = self._step(token, position, slot, pages).argmax(-1).tolist()
        for request, new in zip(running, best, strict=True):
            request.read += 1
            if request.read == len(request.ids):
                request.ids.append(new)


def requests() -> list[Request]:
    """Twelve prompts of different lengths."""
    return [Request([65 + index, *range(index)], new_tokens=4 + 5 * index % 13) for index in range(12)]


def main() -> None:
    """Serve the same requests eagerly and captured, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Decoder().eval().to(device)
    step = graphs.capture(
        model,
        buckets=BUCKETS,
        batch_dims={"token": 0, "position": 0, "slot": 0, "pages": 0},
        padding={"slot": graphs.sentinel(SPARE)},
    )
    with torch.no_grad():
        expected = Engine(model, device).run(requests())
        found = Engine(step, device).run(requests())
    if found != expected:
        raise SystemExit("the tokens differ")
    print(f"{len(found)} requests on {device}, the same tokens eager and replayed")
    print(step.report())


if __name__ == "__main__":
    main()
