"""Tables at 80 columns: golden texts, no word broken."""

import pandas as pd
from rich.console import Console

from revprobe.cli.reproduce import theory_cells
from revprobe.probes.readings.reading import Reading
from revprobe.probes.readings.readings import Readings
from revprobe.probes.theory.tables import theory_tables
from revprobe.report.summary.terminal import print_readings, text_table


def narrow() -> Console:
    return Console(markup=False, highlight=False, width=80, record=True, quiet=False, file=open("/dev/null", "w"))


def test_readings_stand_value_above_and_interval_below() -> None:
    rows = pd.DataFrame({"pair": range(20), "fact": [str(n) for n in range(20)], "kind": "same_target"})
    numbers = {"probability": [0.2, 0.4] * 10, "log_probability": 0.0, "rank": 1, "argmax_match": [0, 1] * 10}
    frame = rows.assign(direction="reverse", reason="", **numbers)
    about = {"seed": 0, "control": False, "kind": "same_target", "weights": "ema"}
    console = narrow()
    print_readings(Readings([Reading("reverse_probability", frame, about)]), "m, letters:5", console)
    text = console.export_text()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    start = next(n for n, line in enumerate(lines) if line.lstrip().startswith("reverse"))
    assert [line.split() for line in lines[start : start + 2]] == [
        ["reverse", "0.30", "-", "-", "20", "pairs", "ema"],
        ["probability", "[0.25,", "0.35]", "20", "facts", "same", "target"],
    ]
    assert "forward accuracy: 1 no forward query in this part" in text


def test_the_theory_has_no_columns_of_zeros_and_no_minus_nought() -> None:
    shown = theory_cells(theory_tables(samples=50))
    assert shown.columns.tolist() == ["table", "row", "column", "paper", "ours", "difference", "verdict"]
    assert not shown["difference"].eq("-0.0000").any()
    assert shown.iloc[0].tolist()[2:5] == ["d=64", "0.337", "0.3365"]
    console = narrow()
    console.print(text_table(shown, "Tables 3, 4 and 5"))
    lines = [line.rstrip() for line in console.export_text().splitlines() if line.strip()]
    assert len(lines) == len(shown) + 3 and max(map(len, lines)) <= 80, "one line a cell"
