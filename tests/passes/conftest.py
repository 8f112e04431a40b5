"""What tests of the passes have in common: the invariants are checked behind each pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from passes.core import verify


@pytest.fixture(autouse=True)
def _invariants_hold() -> Iterator[None]:
    with verify.after_each_pass():
        yield
