"""axe-core on the page that a browser shows: what it finds that keeps somebody from reading or using the page."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

GRAVE = ("serious", "critical")
ALSO = ("scrollable-region-focusable",)  # later versions of axe call it serious
# Told as [impact, rule, address, why], and how many rules were passed: a page that is not there passes none.
RUN = """
const done = arguments[arguments.length - 1];
const told = (found) => found.violations.flatMap((rule) => rule.nodes.map((node) =>
  [rule.impact, rule.id, node.target.join(" "), node.failureSummary.split("\\n").slice(1).join(" ").trim()]));
axe.run(document, {resultTypes: ["violations"]})
  .then((found) => done([told(found), found.passes.length]),
    (error) => done([[["critical", "axe", "", String(error)]], 0]));
"""


def axe_findings(driver: Any) -> list[str]:
    """The serious and critical findings on the page as it stands, one text each."""
    if not driver.execute_script("return Boolean(window.axe)"):
        driver.execute_script(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found, passed = driver.execute_async_script(RUN)
    assert passed > 5 or found, "axe has looked at nothing"
    return [
        f"{rule} ({impact}) at {where}: {why}" for impact, rule, where, why in found if impact in GRAVE or rule in ALSO
    ]
