"""The committed table of the long tests names every test that is marked as one, and no test that failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from long_cases import LONG_TESTS
from long_table import long_table

TABLE = Path(__file__).with_name("LONG.md")


def test_the_table_is_of_the_tests_there_are(request: pytest.FixtureRequest) -> None:
    """Of those in the files that were collected, case by case: all, in the whole suite."""
    marked = request.config.stash[LONG_TESTS]
    table = TABLE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(tests/.+)` \| \d+ \| (\w+) \|$", table, re.MULTILINE)
    listed = {name for name, _ in rows if name.partition("::")[0] in {*marked}}
    assert set().union(*marked.values()) == listed, "run `make test-long` and commit its table"
    assert len(rows) == table.count("| `") > 50 and {outcome for _, outcome in rows} == {"passed"}


def test_a_failed_test_stands_in_the_table_as_failed(tmp_path: Path) -> None:
    cases = '<testcase classname="tests.a.test_b" name="test_c[x]" time="2.6"/>'
    cases += '<testcase classname="tests.a.test_b" name="test_d" time="9"><failure/></testcase>'
    (tmp_path / "results.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    table = long_table(tmp_path / "results.xml")
    assert "2 tests, 1 failed" in table
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows == ["| `tests/a/test_b.py::test_d` | 9 | failure |", "| `tests/a/test_b.py::test_c[x]` | 3 | passed |"]
