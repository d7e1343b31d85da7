"""A browser for the tests of a module, and what opens pages in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_browser import CHROMIUM, FLAGS, Seen


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start one Chromium; without it, or without Playwright, the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def show(browser) -> Iterator[Any]:
    """Return a function that opens a page at a width, in light or dark, and waits until a run is drawn."""
    contexts = []

    def open_page(address: Path | str, width: int = 1280, scheme: str = "light") -> Seen:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        context.set_default_timeout(60_000)  # of a machine that others use
        seen = Seen(context.new_page())
        seen.page.goto(address.as_uri() if isinstance(address, Path) else address)
        seen.page.wait_for_selector(".plot canvas")
        seen.page.wait_for_selector("#samples-body [role=status]:not(:empty)")
        return seen

    yield open_page
    for context in contexts:
        context.close()
