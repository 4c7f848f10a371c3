"""A page that can be read: long tables are closed until they are opened, and say what is in them."""

from revprobe.report.paper.markdown import folded, markdown_table

ROWS = [{"a < b": place, "c": "x"} for place in range(5)]


def test_a_long_table_is_closed_and_says_what_is_in_it() -> None:
    """Its lines stay as they were, with the empty line before them that Markdown inside of HTML asks for."""
    table = markdown_table(ROWS)
    page = f"# Title\n\nText.\n\n{table}\nAfter.\n"
    closed = f"<details><summary>5 rows: a &lt; b · c</summary>\n\n{table}\n</details>\n"
    assert folded(page, most=4) == page.replace(table, closed)
    assert folded(page, most=5) == page


def test_every_table_is_closed_by_itself_also_one_that_ends_the_page() -> None:
    table = markdown_table(ROWS)
    page = folded(f"{table}\nBetween.\n\n{table}", most=2)
    assert page.count("<details>") == page.count("</details>") == 2
    assert page.index("</details>") < page.index("Between.") < page.rindex("<details>")


def test_a_wide_table_names_its_first_columns() -> None:
    wide = markdown_table([{f"c{place}": 1 for place in range(12)}] * 3)
    assert "<summary>3 rows: c0 · c1 · c2 · c3 · c4 · c5 · c6 · c7 · ...</summary>" in folded(wide, most=1)


def test_no_cell_ends_its_row_or_opens_a_tag() -> None:
    """A run's name is anybody's: a line break made two rows of one, and "<b>" was a tag of the page."""
    made = markdown_table([{"run": "a\nb\r\nc", "x": "<b>|</b>", "y": "absolute < RoPE <= 3"}])
    assert made.splitlines()[2:] == ["| a b c | &lt;b>\\|&lt;/b> | absolute < RoPE <= 3 |"]
