"""The table of families in docs/models.md, made from the descriptions in the code.

python docs/models_table.py      writes it into the page; a test compares
"""

from __future__ import annotations

from pathlib import Path

from revprobe import list_models
from revprobe.models.listing import shown_parity

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
HEADINGS = ("family", "loads", "attention", "shift", "parity", "tokenizer", "licences", "names on the hub")


def table() -> str:
    """The rows of `list_models` that are families, as Markdown."""
    listed = list_models()
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for row in listed[listed["licence"] != ""].to_dict("records"):
        names = ", ".join(f"`{name}`" for name in str(row["published"]).split(", ") if name) or "-"
        tokenizer = row["tokenizer"] if row["tokenizer"] == "its own" else f"`{row['tokenizer']}`"
        cells = [row["name"], row["about"], row["attention"], row["shift"], shown_parity(row["parity"])]
        lines.append(f"| {' | '.join(map(str, [*cells, tokenizer, row['licence'], names]))} |")
    return "\n".join(lines)


def page() -> str:
    """The page with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
