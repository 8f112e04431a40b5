"""What a captured call costs on the host: the whole call, its parts, and the bare replay of the same kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree

import graphs
from graphs.bench.decode.bare import bare_graph, same_output
from graphs.bench.decode.llama import TOY, Decoding, build_llama
from graphs.bench.overhead import small_arguments, small_step
from graphs.contract.arguments import flatten_call

Timer = Callable[..., None]
CPU = torch.device("cpu")


def test_small_call(benchmark: Any, time_host: Timer, device: torch.device, mode: str) -> None:
    benchmark.group = "call with 4 tensors"
    arguments = small_arguments(device)
    step = graphs.capture(small_step)
    same_output(step(*arguments), small_step(*arguments), "a captured call")
    step.mode = mode
    time_host(functools.partial(step, *arguments), device)


def test_bare_replay(benchmark: Any, time_host: Timer, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a bare graph needs a GPU")
    benchmark.group = "call with 4 tensors"
    arguments = small_arguments(device)
    graph, output = bare_graph(functools.partial(small_step, *arguments))
    graph.replay()
    same_output(output, small_step(*arguments), "a bare replay")
    time_host(graph.replay, device)


def test_toy_llama_on_the_cpu(benchmark: Any, time_call: Timer, mode: str) -> None:
    benchmark.group = "toy Llama on the CPU"
    model = build_llama(TOY, CPU)
    decoding, step = Decoding(model, TOY, 1, CPU), graphs.capture(model)
    expected = decoding.first_step(model)
    decoding.reset()
    same_output(decoding.first_step(step), expected, "a tape replay")
    step.mode = mode
    time_call(functools.partial(decoding.first_step, step), CPU, decoding.reset)


@pytest.mark.parametrize("flatten", ["graphs", "torch"])
def test_flatten_four_tensors(benchmark: Any, time_host: Timer, flatten: str) -> None:
    benchmark.group = "flatten a call with 4 tensors"
    a, b, c, d = small_arguments(CPU)
    args, kwargs = (a, b), {"c": c, "d": d}
    assert flatten_call(args, kwargs).tensors == _pytree.tree_flatten((args, kwargs))[0]
    ours, theirs = functools.partial(flatten_call, args, kwargs), functools.partial(_pytree.tree_flatten, (args, kwargs))
    time_host(ours if flatten == "graphs" else theirs, CPU)
