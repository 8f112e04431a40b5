"""What objects of Python's own keep for later when somebody looks at them is no change; what is set on them is one."""

from __future__ import annotations

import ipaddress
import pathlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs

pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
Tensor = torch.Tensor


def look_at_path(path: pathlib.PurePath) -> None:
    _ = str(path), hash(path), path < path, path == pathlib.PurePath("b"), path.parts, path.parent, path.suffixes, path.drive


def look_at_network(network: Any) -> None:
    _ = str(network), hash(network), network.broadcast_address, network.hostmask, network.num_addresses


LOOKS: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], None]]] = {
    "path": (lambda: pathlib.Path("a/b.txt"), lambda one: float(len(one.suffix)), look_at_path),
    "pure path": (lambda: pathlib.PurePosixPath("a/b.txt"), lambda one: float(one.name == "b.txt"), look_at_path),
    "windows path": (lambda: pathlib.PureWindowsPath("a/b.txt"), lambda one: float(len(one.stem)), look_at_path),
    "network": (lambda: ipaddress.ip_network("10.0.0.0/8"), lambda one: float(one.prefixlen), look_at_network),
}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", LOOKS)
def test_what_is_filled_by_looking_is_no_change(name: str, held: bool) -> None:
    make, read, look = LOOKS[name]
    one = make()
    holder = types.SimpleNamespace(one=one)
    step = (lambda x: x * read(holder.one)) if held else (lambda x: x * read(one))
    captured, x = graphs.capture(step), torch.ones(2)
    for context in (torch.no_grad, torch.inference_mode):
        for call in range(4):
            with context():
                assert torch.equal(captured(x), step(x))
            if call == 1:
                look(one)
    report = captured.report()
    assert report.eager_calls <= 2 and not report.refusals, report


def test_what_is_set_on_an_object_of_pythons_own_is_a_change() -> None:
    space, network = types.SimpleNamespace(scale=2.0), ipaddress.ip_network("10.0.0.0/8")
    captured = graphs.capture(lambda x: x * getattr(space, "factor", space.scale) * network.prefixlen)
    with torch.no_grad():
        assert captured(torch.ones(1)).tolist() == [16.0] == captured(torch.ones(1)).tolist()
        space.factor = 3.0
        assert captured(torch.ones(1)).tolist() == [24.0]
        network._prefixlen = 16
        assert captured(torch.ones(1)).tolist() == [48.0]
    assert {refusal.reason for refusal in captured.report().refusals} == {"changing-value"}
