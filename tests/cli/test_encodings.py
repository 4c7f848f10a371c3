"""A terminal that cannot write every letter still gets the answer: what it lacks is a question mark."""

import io
import sys
from pathlib import Path

import pytest

from revprobe.cli.main import main


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_command_ends_well_whatever_the_terminal_can_write(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended in "unexpected UnicodeEncodeError", after the tables were written."""
    monkeypatch.chdir(tmp_path)
    out, said = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(said, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["revprobe", "reproduce", "theory", "--out", "theory"])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    sys.stderr.flush()
    assert ended.value.code in (0, None), said.getvalue()[-500:]
    assert b"?" in out.getvalue() and b"Error" not in said.getvalue()


def test_an_error_with_other_letters_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(said, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["revprobe", "report", str(tmp_path / "Läufe")])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stderr.flush()
    assert ended.value.code == 1 and said.getvalue().startswith(b"error: ") and b"L?ufe" in said.getvalue()
