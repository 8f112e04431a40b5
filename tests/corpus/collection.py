"""All cases, in the order of their files."""

from __future__ import annotations

from tests.corpus import addressing, arithmetic
from tests.corpus.case import Case

CASES = [entry for module in (addressing, arithmetic) for entry in vars(module).values() if isinstance(entry, Case)]
