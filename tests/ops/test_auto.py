"""The rules of ``auto``: how they are chosen from, kept, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphs.ops import GroupedProjection
from graphs.ops.wo_a import auto_path, reference, tuned_path
from graphs.ops.wo_a.weights import PATHS

CPU = torch.device("cpu")
RULES = {2: ((4, "fused"), (64, "einsum")), 8: ((16, "gloop"), (64, "bmm"))}


def choose(rules: auto_path.Rules, groups: int, tokens: int) -> str:
    return auto_path.choose(auto_path.limits_for(rules, groups), tokens)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("groups", "tokens", "path"),
    [(2, 1, "fused"), (2, 4, "fused"), (2, 5, "einsum"), (2, 4096, "einsum"), (8, 16, "gloop"), (8, 17, "bmm"), (8, 65, "bmm")],
)
def test_a_measured_point_and_what_lies_between(groups: int, tokens: int, path: str) -> None:
    assert choose(RULES, groups, tokens) == path


@pytest.mark.parametrize(("groups", "like"), [(1, 2), (3, 2), (4, 2), (5, 8), (7, 8), (16, 8), (1000, 8)])
def test_other_numbers_of_groups_go_by_the_nearest(groups: int, like: int) -> None:
    assert all(choose(RULES, groups, m) == choose(RULES, like, m) for m in (1, 5, 64, 1000))
    assert auto_path.candidates(auto_path.limits_for(RULES, groups)) == auto_path.candidates(auto_path.limits_for(RULES, like))


def test_without_rules_everything_goes_to_the_library() -> None:
    assert choose({}, 2, 1) == choose({}, 2, 4096) == "einsum"
    assert auto_path.candidates(auto_path.limits_for({}, 2)) == ("einsum",)


@pytest.mark.parametrize(
    ("key", "known"), [("sm_90", True), ("sm_100", True), ("sm_120", True), ("sm_89", False), ("gfx950", False)]
)
def test_unknown_devices_follow_a_relative_or_the_library(key: str, known: bool) -> None:
    rules = auto_path.packaged(key)
    assert (choose(rules, 2, 4) == "fused") == known
    assert choose(rules, 2, 1024) == "einsum"
    assert all(choose(rules, g, 4) == choose(rules, 2, 4) for g in range(1, 17)), "no gap between measured numbers"


def test_the_packaged_rules_are_well_formed() -> None:
    for rules in auto_path.TABLE.values():
        for limits in rules.values():
            assert [limit for limit, _ in limits] == sorted({limit for limit, _ in limits})
            assert {path for _, path in limits} <= set(auto_path.EXACT), "no path that quantises activations"


TIMES = st.dictionaries(
    st.tuples(st.sampled_from([1, 2, 8]), st.sampled_from([1, 4, 64])),
    st.fixed_dictionaries({path: st.integers(1, 5) for path in auto_path.EXACT}),
    min_size=1,
)


@given(TIMES)
def test_rules_choose_a_fastest_path_wherever_it_was_measured(times: dict) -> None:
    rules = tuned_path.rules_from(times)
    for (groups, tokens), found in times.items():
        path = choose(rules, groups, tokens)
        assert found[path] == min(found.values())
        assert path == "einsum" or found["einsum"] > found[path], "a draw goes to the library"
        assert path in auto_path.candidates(auto_path.limits_for(rules, groups))


def test_what_is_kept_is_read_back_and_followed(cache: Path) -> None:
    assert tuned_path.read(CPU) is None and tuned_path.rules_for(CPU) == {}
    path = tuned_path.write(CPU, RULES, [{"groups": 2}])
    assert path.parent == cache and [file.name for file in cache.iterdir()] == [path.name]
    assert tuned_path.read(CPU) == RULES == tuned_path.rules_for(CPU)
    data, scale = reference.quantise_blocks(torch.randn(2, 128, 128))
    assert GroupedProjection(data, scale, path="auto").paths == ("fused", "einsum")
    tuned_path.write(CPU, {2: ((1, "einsum"),)}, [])
    assert tuned_path.read(CPU) == {2: ((1, "einsum"),)}


def changed(**parts: object) -> str:
    content = {"schema": 1, "identity": tuned_path.identity(CPU), "rules": {"2": [[4, "fused"]]}, "measured": []}
    return json.dumps(content | parts)


BAD = {
    "empty": "",
    "cut off": changed()[:40],
    "not an object": "[]",
    "binary": "\udcff",
    "schema": changed(schema=2),
    "another device": changed(identity={"device": "a"}),
    "no rules": changed(rules={}),
    "no limits": changed(rules={"2": []}),
    "unknown path": changed(rules={"2": [[4, "cutlass"]]}),
    "groups": changed(rules={"two": [[4, "fused"]]}),
    "no groups": changed(rules={"0": [[4, "fused"]]}),
    "order": changed(rules={"2": [[64, "fused"], [4, "einsum"]]}),
    "twice": changed(rules={"2": [[4, "fused"], [4, "einsum"]]}),
    "tokens": changed(rules={"2": [["4", "fused"]]}),
    "shape of a rule": changed(rules={"2": [[4]]}),
    "shape of rules": changed(rules=[1]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_no_use_is_named_and_ignored(case: str, cache: Path) -> None:
    cache.mkdir()
    tuned_path.file_of(CPU).write_bytes(BAD[case].encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"wo_a-cpu-.*\.json is ignored .*python -m graphs tune wo_a"):
        assert tuned_path.read(CPU) is None


def test_a_good_file_next_to_the_bad_ones_is_used(cache: Path) -> None:
    cache.mkdir()
    tuned_path.file_of(CPU).write_text(changed())
    assert tuned_path.read(CPU) == {2: ((4, "fused"),)}


def test_a_folder_in_its_place_is_named_and_ignored(cache: Path) -> None:
    tuned_path.file_of(CPU).mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert tuned_path.rules_for(CPU) == {}


def test_other_versions_have_files_of_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_path.write(CPU, RULES, [])
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert tuned_path.read(CPU) is None
    assert set(PATHS) >= set(auto_path.EXACT)


def test_a_write_that_fails_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuned_path.write(CPU, RULES, [])
    with pytest.raises(TypeError):
        tuned_path.write(CPU, {2: ((1, "einsum"),)}, [{"time": object()}])

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tuned_path.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuned_path.write(CPU, {2: ((1, "einsum"),)}, [])
    assert list(cache.iterdir()) == [before] and tuned_path.read(CPU) == RULES
