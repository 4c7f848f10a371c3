"""What the tests of the dashboard in a real browser share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny import ROOT, module_at

shot = module_at(ROOT / "examples" / "dashboard_screenshot.py")
shot.PATIENCE = 60


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Any]:
    """A browser at the dashboard of the test file's `folder`, its runs listed."""
    with shot.served(folder, every=0.5) as address, shot.browser() as driver:
        driver.get(address)
        shot.await_true(lambda: shot.drawable(driver), "the list")
        yield driver
