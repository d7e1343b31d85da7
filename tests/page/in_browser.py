"""What browser tests look at: a page, its console, what is drawn, cut off or lies over other. Not a test module."""

import shutil
from dataclasses import dataclass, field
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
DARK = "rgb(17, 22, 27)"  # the ground of the page

# [title, colours] of the canvas of each panel in view
DRAWN = """() => [...document.querySelectorAll('.panel')].filter((panel) => panel.checkVisibility()).map((panel) => {
  const canvas = panel.querySelector('canvas'), { width, height } = canvas;
  const pixels = new Uint32Array(canvas.getContext('2d').getImageData(0, 0, width, height).data.buffer);
  return [panel.querySelector('figcaption').textContent, new Set(pixels).size];
})"""
ALL_DRAWN = "() => [...document.querySelectorAll('.panel')].every((panel) => panel.querySelector('canvas'))"

# Elements whose text is cut off, or that leave the page at its right.
CUT = """() => [...document.querySelectorAll('body *')].filter((node) => {
  const apart = 'nav, .skip, #theme span, svg, .uplot, dialog:not([open])';
  if (!node.checkVisibility() || node.closest(apart)) return false;
  const style = getComputedStyle(node);
  const scrolls = ['auto', 'scroll'].includes(style.overflowX) || style.display === 'inline';
  const field = ['INPUT', 'TEXTAREA', 'SELECT'].includes(node.tagName);
  const cut = !scrolls && !field && node.scrollWidth > node.clientWidth + 1;
  return cut || node.getBoundingClientRect().right > innerWidth + 0.5;
}).map((node) => `${node.tagName}.${node.className}: ${node.textContent.slice(0, 60)}`)"""

# Pairs of neighbouring texts that lie over each other.
OVERLAPS = """() => {
  const kinds = 'h1, h2, h3, p, th, td, pre, button, label, figcaption, .card, .tag, .fact';
  const texts = [...document.querySelectorAll(kinds)].filter(
    (node) => node.checkVisibility() && !node.closest('.top, .skip, .runs, dialog:not([open])')); // runs scroll
  const found = [];
  for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < Math.min(texts.length, i + 30); j++) {
    const [a, b] = [texts[i], texts[j]];
    if (a.contains(b) || b.contains(a)) continue;
    const [p, q] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 1 && high > 1) found.push(`${a.textContent.slice(0, 40)} | ${b.textContent.slice(0, 40)}`);
  }
  return found;
}"""


@dataclass
class Seen:
    """A page in the browser, what its console said, and what it asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Listen."""
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def until(self, condition: str, given: Any = None) -> None:
        """Wait for a condition; Playwright's own waiting evaluates a text, which the page's content policy forbids."""
        for _ in range(1000):
            if self.page.evaluate(condition, given):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never came true: {condition}")

    def text(self, selector: str) -> str:
        """Return what an element shows."""
        return str(self.page.locator(selector).inner_text())

    def is_dark(self) -> bool:
        """Whether the page is drawn for the dark."""
        return bool(self.page.evaluate("getComputedStyle(document.body).backgroundColor") == DARK)
