"""Which cases of a parametrized test `make test` runs: the first few; `make test-long` runs the others as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# In pytest's configuration: file -> its long tests, of every file that was collected, whatever `-m` leaves out.
LONG_TESTS = pytest.StashKey[dict[str, set[str]]]()


def rest_long(cases: Iterable[Any], keep: int = 1) -> list[Any]:
    """The cases as they are given, all but the first `keep` of them marked as long.

    For tests that say the same of many models or places, each at length: the first cases are those that differ most.
    A case of several arguments is a tuple. Of crossed parameters a case is long where any of its values is.
    """
    cases = list(cases)
    assert 0 < keep < len(cases), "some of them stay, and some are left out"
    given = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [*cases[:keep], *(pytest.param(*values, marks=pytest.mark.long) for values in given[keep:])]
