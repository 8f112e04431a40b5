"""How often verification refuses a right recording, and how many planted faults it catches.

A decode step is captured once: a Llama by ``compiler="inductor"``, DeepSeek-V4 of transformers with its host reads rewritten.
Then it gets other random weights and tokens, ``--starts`` times, and each time the replay is compared with eager as
``verify="always"`` does: as it is, and with each fault planted in the replay alone. ::

    PYTHONPATH=. python3 benchmarks/verify_faults.py --device cuda --layers 16 --width 2048 --starts 20
    PYTHONPATH=. python3 benchmarks/verify_faults.py --device cpu --layers 2 --width 64 --starts 3 --compiler none

``visible row``: another row in a matrix of keys, values or logits. ``any row``: in any other matrix; most of those move the
results of 16 bits by less than rounding does, and are reported beside the rest. ``stale input``: the tokens of the call before.
``missed write``: one written tensor is left as it was before the step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import graphs
from graphs.bench.decode.llama import TOY, WIDE, Decoding, build_llama
from graphs.contract.arguments import flatten_call, named_leaves
from graphs.contract.eligibility import parameter_names
from graphs.contract.settings import ambient_of
from graphs.dispatch.call_log import NotReplayed
from graphs.eager_mode import forced_eager
from graphs.first_call.verify_replay import compare_replay
from graphs.numerics import tolerance

Tensor = torch.Tensor
FAULTS = ("visible row", "stale input", "missed write", "any row")
VISIBLE = re.compile(r"(k_proj|v_proj|kv_proj|lm_head)\.weight$")
UNUSED = re.compile(r"(embed|norm|rotary|tid2eid)")


@dataclasses.dataclass
class Subject:
    """A captured step, the tokens of its call and how to call it.

    Attributes:
        tokens: the argument that is made anew for each start.
        call: arguments of a call with those tokens.
    """

    name: str
    model: torch.nn.Module
    step: Any
    tokens: Tensor
    vocabulary: int
    call: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


def llama(args: argparse.Namespace, device: torch.device) -> Subject:
    wide = WIDE if device.type == "cuda" else dataclasses.replace(TOY, dtype=torch.bfloat16)
    width, heads = args.width, max(args.width // 64, 2)
    sizes = {"hidden": width, "intermediate": 4 * width, "heads": heads, "kv_heads": max(heads // 4, 1)}
    size = dataclasses.replace(wide, layers=args.layers, **sizes)
    model = build_llama(size, device)
    decoding = Decoding(model, size, 4, device)
    position, cache = decoding._positions[0], decoding._cache
    decoding.reset()
    step = graphs.capture(model, compiler=args.compiler)
    return Subject(
        f"Llama {args.layers} x {width}, {args.compiler}",
        model,
        step,
        decoding.first,
        size.vocabulary,
        lambda ids: ((ids,), {"past_key_values": cache, "position_ids": position}),
    )


def deepseek(args: argparse.Namespace, device: torch.device) -> Subject:
    from tests.models.decoders import DECODERS, DEEPSEEK, PROMPT, VOCABULARY

    layers, width = args.deepseek_layers, args.deepseek_width
    kinds = DEEPSEEK["layer_types"]
    sizes = {
        **DEEPSEEK,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "moe_intermediate_size": width // 2,
        "layer_types": [kinds[min(i, 1 + i % 2)] for i in range(layers)],
        "mlp_layer_types": ["hash_moe", *["moe"] * (layers - 1)],
    }
    decoder = dataclasses.replace(DECODERS["deepseek_v4"], sizes=sizes)
    model = decoder.build(device=device).to(torch.bfloat16)
    cache, prompt = decoder.cache(model.config), PROMPT.to(device)
    with torch.no_grad():
        randomise(model, 0)
        where = torch.arange(prompt.shape[1], device=device).expand(len(prompt), -1)
        model(prompt, use_cache=True, **decoder.arguments(where, cache))
    position = torch.full((len(prompt), 1), prompt.shape[1], device=device)
    given = decoder.arguments(position, cache)
    name = f"DeepSeek-V4 {layers} x {width}, rewritten"
    step = graphs.capture(model)
    return Subject(name, model, step, prompt[:, -1:].clone(), VOCABULARY, lambda ids: ((ids,), {"use_cache": True, **given}))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Other weights, in place, of a size that leaves activations near one."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


class Planted:
    """A recording that gets something wrong."""

    def __init__(
        self, recording: Any, fault: Callable[[Sequence[Tensor]], contextlib.AbstractContextManager[Sequence[Tensor]]]
    ) -> None:
        self._recording, self._fault = recording, fault

    def replay(self, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
        """Like `graphs.recording.recorder.Recording.replay`, with the fault around it."""
        with self._fault(tensors) as given:
            return [out.clone() for out in self._recording.replay(given, rows)]


@contextlib.contextmanager
def no_fault(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    yield tensors


@contextlib.contextmanager
def other_row(weight: Tensor, row: int, tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    saved = weight[row].clone()
    weight[row].normal_(std=weight.shape[-1] ** -0.5)
    try:
        yield tensors
    finally:
        weight[row].copy_(saved)


@contextlib.contextmanager
def missed_write(written: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    saved = [tensor.clone() for tensor in written]
    yield tensors
    changed = [i for i, (a, b) in enumerate(zip(written, saved, strict=True)) if not torch.equal(a, b)]
    chosen = random.choice(changed)
    written[chosen].copy_(saved[chosen])


def plant(fault: str, subject: Subject, entry: Any, ids: Tensor, before: Tensor) -> Any:
    """What a replay of ``entry`` gets wrong."""
    if fault == "missed write":
        return lambda tensors: missed_write(entry.written.tensors, tensors)
    if fault == "stale input":
        return lambda tensors: given_instead(ids, before, tensors)
    matrices = [(n, p) for n, p in subject.model.named_parameters() if p.dim() == 2 and not UNUSED.search(n)]
    weights = [p for n, p in matrices if bool(VISIBLE.search(n)) == (fault == "visible row")]
    weight = random.choice(weights)
    row = random.randrange(len(weight))
    return lambda tensors: other_row(weight, row, tensors)


@contextlib.contextmanager
def given_instead(ids: Tensor, before: Tensor, tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The tokens of the call before in place of this call's."""
    yield [before if tensor is ids else tensor for tensor in tensors]


def verdict(subject: Subject, ids: Tensor, fault: Any) -> Any:
    """The refusal of a replay with ``fault``, None, or ``"another way"`` where it assumes what does not hold here."""
    args, kwargs = subject.call(ids)
    recordings = subject.step._graphs_recordings
    call = flatten_call(args, kwargs, ambient_of(subject.model))
    entry, rows = recordings.routes.by_signature[call.signature]
    step = recordings.keys.step(call, named_leaves(call, parameter_names(subject.model)))
    for variant in entry.group.variants:
        original = variant.recording
        variant.recording = Planted(original, fault(variant))
        try:
            with forced_eager("first call"):
                found = compare_replay(step, variant, rows)
        finally:
            variant.recording = original
        if found is not None or variant.checked is None or variant.checked.valid():
            return found
    return "another way"


def measured(subject: Subject, starts: int, seconds: float) -> dict[str, Any]:
    """Capture the step, then count what verification says of it at each start."""
    began = time.perf_counter()
    args, kwargs = subject.call(subject.tokens)
    for _ in range(3):  # a step that initialises itself is recorded at its second call
        subject.step(*args, **kwargs)
    report = subject.step.report()
    if not report.recordings:
        return {"name": subject.name, "not recorded": str(report)}
    captured, began = time.perf_counter() - began, time.perf_counter()
    names = [
        "starts",
        "false refusals",
        "another way",
        *(f"{fault}, {what}" for fault in FAULTS for what in ("planted", "caught")),
    ]
    counts, before, examples = Counter(dict.fromkeys(names, 0)), subject.tokens, dict[str, str]()
    first = [f"{r.reason}: {r.detail}" for r in report.refusals]
    for start in range(starts):
        if time.perf_counter() - began > seconds:
            break
        randomise(subject.model, start + 1)
        random.seed(start)
        ids = torch.randint(subject.vocabulary, subject.tokens.shape, device=subject.tokens.device)
        found = verdict(subject, ids, lambda way: no_fault)
        counts["starts"] += 1
        counts["false refusals"] += found not in (None, "another way")
        counts["another way"] += found == "another way"
        examples.update({"false refusal": str(found)} if found not in (None, "another way") else {})
        for fault in FAULTS:
            found = verdict(
                subject, ids, lambda way, fault=fault, ids=ids, before=before: plant(fault, subject, way, ids, before)
            )
            counts[f"{fault}, planted"] += found != "another way"
            counts[f"{fault}, caught"] += found not in (None, "another way")
            examples.update({fault: str(found)} if found not in (None, "another way") else {f"{fault}, missed": f"start {start}"})
        before = ids
    return {
        "name": subject.name,
        "compiler": report.keys[0].compiler,
        "seconds of starts": round(time.perf_counter() - began, 1),
        "seconds of capture": round(captured, 1),
        "refusals at capture": first,
        **counts,
        "examples": examples,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The counts, at 80 columns."""
    lines = [f"{'step':34}{'starts':>7}{'refused':>8}{'row':>7}{'stale':>7}{'missed':>8}{'any row':>8}"]
    for row in rows:
        if "not recorded" in row:
            lines.append(f"{row['name'][:33]:34} not recorded")
            continue
        caught = [f"{row[f'{fault}, caught']}/{row[f'{fault}, planted']}" for fault in FAULTS]
        cells = "".join(f"{cell:>{width}}" for cell, width in zip(caught, (7, 7, 8, 8), strict=True))
        lines.append(f"{row['name'][:33]:34}{row['starts']:>7}{row['false refusals']:>8}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Measure the chosen models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="llama,deepseek", help="llama, deepseek, or both")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--deepseek-layers", type=int, default=8)
    parser.add_argument("--deepseek-width", type=int, default=256)
    parser.add_argument("--compiler", default="inductor", help="of the Llama")
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each model, once captured; no start is begun after that")
    parser.add_argument("--json", default="", help="write the counts to this file")
    args = parser.parse_args()
    device, builders, rows = torch.device(args.device), {"llama": llama, "deepseek": deepseek}, []
    warnings.simplefilter("default", NotReplayed)
    with torch.no_grad():
        for name in args.models.split(","):
            rows.append(measured(builders[name](args, device), args.starts, args.seconds))
            print(json.dumps(rows[-1], indent=1), flush=True)
    print(f"tolerance without float64: {tolerance.OTHER_KERNELS} times the elementwise one")
    print(table(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
