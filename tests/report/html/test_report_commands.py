"""The commands that stand in a tab without a reading are run as they stand, and fill it."""

import html
import re
from pathlib import Path

import pytest

import revprobe as rp
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.report.html.report import write_report


@pytest.mark.parametrize("name", ["storage", "edits"])
def test_the_commands_in_an_empty_tab_fill_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as they stand, from the folder that holds the report: once of a run's own, once of one beside it."""
    training = {"steps": 4, "batch_size": 8, "warmup_steps": 0, "device": "cpu"}
    about = {"model": {"d_model": 8}, "relation": {"length": 4, "alphabet": 9}, "snapshots": {"every": 4}}
    taken = rp.train(RunConfig(name="one", training=training, **about), tmp_path / "one", listener=False)
    for place in (tmp_path, tmp_path / "one"):
        page = write_report([taken.record()], place / "report.html").read_text()
        assert f"gallery-{name}" not in page
        tab = page[page.index(f'id="section-{name}"') : page.index("</section>", page.index(f'id="section-{name}"'))]
        code, command = (html.unescape(text) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", tab, re.S))
        monkeypatch.chdir(place)
        exec(code, {})
        assert command.strip() == "revprobe report ."
        page = write_report([rp.open_run(tmp_path / "one").record()], place / "report.html").read_text()
        assert f"gallery-{name}" in page and "one, step 4 (EMA" in page
        for made in (tmp_path / "one" / "readings").rglob("stored_evidence*"), (tmp_path / "one").rglob("route_edit*"):
            for file in made:
                file.unlink()
