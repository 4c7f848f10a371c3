"""The committed table of the long tests names every test that is marked as one, and no test that failed."""

from __future__ import annotations

import re
from pathlib import Path

from long_table import long_table

HERE = Path(__file__).parent
_MARKED = re.compile(r"^@pytest\.mark\.long\n(?:[@ )\]].*\n)*def (test_\w+)", re.MULTILINE)


def test_the_table_is_of_the_tests_there_are() -> None:
    marked = {
        f"{path.relative_to(HERE.parent).as_posix()}::{name}"
        for path in HERE.rglob("test_*.py")
        for name in _MARKED.findall(path.read_text(encoding="utf-8"))
    }
    table = (HERE / "LONG.md").read_text(encoding="utf-8")
    listed = {name.partition("[")[0] for name in re.findall(r"`(tests/[^`]+)`", table)}
    assert marked == listed, "run `make test-long` and commit its table"
    assert len(marked) > 5
    assert set(re.findall(r"^\| `.* \| (\w+) \|$", table, re.MULTILINE)) == {"passed"}


def test_a_failed_test_stands_in_the_table_as_failed(tmp_path: Path) -> None:
    cases = '<testcase classname="tests.a.test_b" name="test_c[x]" time="2.6"/>'
    cases += '<testcase classname="tests.a.test_b" name="test_d" time="9"><failure/></testcase>'
    (tmp_path / "results.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    table = long_table(tmp_path / "results.xml")
    assert "2 tests, 1 failed" in table
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows == ["| `tests/a/test_b.py::test_d` | 9 | failure |", "| `tests/a/test_b.py::test_c[x]` | 3 | passed |"]
