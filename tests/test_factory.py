"""Steps named on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from graphs.errors import FactoryError
from graphs.factory import load_factory

SOURCE = """
import torch

def plain():
    return torch.nn.Linear(4, 2), (torch.ones(1, 4),)

def with_keywords():
    return torch.sum, [torch.ones(2, 3)], {"dim": 1}

class Models:
    @staticmethod
    def nested():
        return torch.neg, (torch.ones(2),)

def broken():
    raise KeyError("of its own")

def nothing(): ...
def one(): return (torch.neg,)
def bare_tensor(): return torch.neg, torch.ones(2)
def no_model(): return 3, ()
number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, which is not on the path."""
    (tmp_path / "factory_sample.py").write_text(SOURCE)
    (tmp_path / "factory_incomplete.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "factory_sample", raising=False)
    return "factory_sample"


def test_models_arguments_and_keywords(module: str) -> None:
    model, args, kwargs = load_factory(f"{module}:plain")
    assert model(*args, **kwargs).shape == (1, 2)
    model, args, kwargs = load_factory(f"{module}:with_keywords")
    assert model(*args, **kwargs).tolist() == [3, 3]
    model, args, kwargs = load_factory(f"{module}:Models.nested")
    assert torch.equal(model(*args, **kwargs), -torch.ones(2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("factory_sample", "form package.module:factory"),
        ("factory_sample:", "form package.module:factory"),
        ("path/to.py:plain", "form package.module:factory"),
        ("path/to.py:plain", "'path/to.py' names a file; write path.to:plain"),
        ("./decode.py:factory", "'./decode.py' names a file; write decode:factory"),
        ("decode.py:step", "'decode.py' names a file; write decode:step"),
        ("factory_sample.py:plain", "form package.module:factory"),
        ("factory_sample.py:plain", "'factory_sample.py' names a file; write factory_sample:plain"),
        ("decode.py", "'decode.py' names a file; write decode:factory"),
        ("/models/decode.py:step", "'/models/decode.py' names a file; write decode:step, and run in '/models'"),
        ("../decode.py:step", "'../decode.py' names a file; write decode:step, and run in '..'"),
        ("factory_absent:plain", "no module 'factory_absent'"),
        ("factory_sample.deeper:plain", "no module 'factory_sample.deeper'"),
        ("factory_sample:plane", "name one of: Models, bare_tensor, broken"),
        ("factory_sample:number", "int, which cannot be called"),
        ("factory_sample:nothing", "returned a NoneType"),
        ("factory_sample:one", "returned a tuple of 1"),
        ("factory_sample:bare_tensor", "args of type Tensor"),
        ("factory_sample:no_model", "the model it returned is a int"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(spec: str, message: str) -> None:
    with pytest.raises(FactoryError, match="Remedy") as raised:
        load_factory(spec)
    assert message in str(raised.value) and repr(spec) in str(raised.value)


def test_errors_of_the_users_own_code_pass_through() -> None:
    with pytest.raises(KeyError, match="of its own"):
        load_factory("factory_sample:broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_factory("factory_incomplete:plain")
