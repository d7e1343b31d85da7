"""What `lowmem-rlhf watch` shows, in a real headless Chromium: runs beside each other, one that goes on, a chat."""

import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_browser import ALL_DRAWN, CUT, DRAWN, OVERLAPS, Seen
from looks import EVIL, STEPS, grpo_row, write_look
from page_runs import append, sample_row

from lowmem_rlhf.page.chat import Chat
from lowmem_rlhf.page.followed import Followed
from lowmem_rlhf.page.server import PageServer
from lowmem_rlhf.run.lock import LOCK, Lock

HALF = STEPS // 2


class Answering:
    """Stands for a finished run that was opened: its model is no matter of the page."""

    def __init__(self, path: Path) -> None:
        self.name = path.name

    def generate(self, prompt: str, compare: bool, task: str | None) -> dict[str, list[str]]:
        """Return what each role answers."""
        return {role: [f"{role} of {self.name} on {task}: {prompt}"] for role in ("policy", "reference")}

    def close(self) -> None:
        """Free nothing."""


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Return the folder of two finished runs and of one that trains."""
    write_look(tmp_path / "old", "grpo", "old")
    write_look(tmp_path / "other", "ppo", "other", device="cpu")
    lock = Lock(write_look(tmp_path / "now", "grpo", "now", steps=HALF, seed=1) / LOCK, "the run")
    lock.acquire()
    yield tmp_path
    lock.release()


@pytest.fixture
def address(folder) -> Iterator[str]:
    """Serve the runs; return what is opened."""
    followed = Followed.named([str(folder / name) for name in ("old", "other", "now")])
    with PageServer(followed, Chat(Answering, followed)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server.address
        server.shutdown()


def legend(seen: Seen, title: str) -> Any:
    return seen.page.locator(".panel", has=seen.page.get_by_text(title, exact=True)).locator(".legend .key span")


def open_run(seen: Seen, name: str) -> None:
    seen.page.locator(".run", has_text=name).first.click()
    seen.until("(name) => document.querySelector('#name').textContent === name", name)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_runs_lie_over_each_other_and_one_that_trains_is_followed(show, address, folder, width, scheme):
    seen = show(address, width, scheme)
    assert seen.page.locator(".run").count() == 3
    open_run(seen, "now")
    assert "running" in seen.text("#cards") and f"step {HALF} of {STEPS}" in seen.text("#cards")
    assert legend(seen, "Total reward").all_inner_texts() == ["mean of a step"]
    seen.page.get_by_label("Show the curves of old,").check()
    seen.page.get_by_label("Show the curves of other,").check()
    seen.until("() => document.querySelector('.panel .legend').textContent.includes('other')")
    assert legend(seen, "Total reward").all_inner_texts() == ["now", "old", "other"]
    assert "now: exact" in legend(seen, "Each reward").all_inner_texts()
    assert legend(seen, "Explained variance").all_inner_texts() in (["other"], [])  # folded on a phone
    seen.page.evaluate("document.querySelectorAll('.group').forEach((group) => { group.open = true; })")
    seen.until(ALL_DRAWN)
    assert min(colours for _, colours in seen.page.evaluate(DRAWN)) > 3
    lines = "() => [...document.querySelectorAll('.panel .legend')].map((one) => [...one.querySelectorAll('.swatch')]"
    looks = seen.page.evaluate(
        f"{lines}.map((swatch) => swatch.getAttribute('class') + swatch.firstChild.getAttribute('stroke-dasharray')))"
    )
    assert all(len(set(own)) == len(own) for own in looks)
    append(folder / "now" / "metrics.jsonl", [grpo_row(HALF + 1, random.Random(0))])
    append(folder / "now" / "samples.jsonl", [sample_row(HALF + 1, 0, completion=EVIL)])
    seen.until("(text) => document.querySelector('#cards').textContent.includes(text)", f"step {HALF + 1} of {STEPS}")
    seen.until(f"() => document.querySelector('.sample')?.textContent.includes('step {HALF + 1}')")
    assert EVIL in seen.page.locator(".sample pre").all_inner_texts()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.page.evaluate(CUT) == [] and seen.page.evaluate(OVERLAPS) == []
    assert seen.said == []
    assert all(one.startswith((address.split("?")[0], "data:image/svg+xml")) for one in seen.asked)


def test_the_server_finds_samples_and_says_what_is_wrong(show, address, folder):
    seen = show(address)
    open_run(seen, "old")
    page, status = seen.page, "document.querySelector('#samples-body [role=status]').textContent"
    page.get_by_label("Search").fill("step 7 is")
    seen.until(f"() => {status}.startsWith('2 of ')")
    page.get_by_role("button", name="Compare with others of this prompt").first.click()
    page.locator("dialog[open] ins").first.wait_for()
    page.keyboard.press("Escape")
    (folder / "old").rename(folder / "away")
    seen.until("() => document.querySelector('#said').textContent.includes('moved or deleted')")
    (folder / "away").rename(folder / "old")
    seen.until("() => document.querySelector('#said').textContent === ''")
    shutil.rmtree(folder / "old")
    seen.until("() => document.querySelector('#said').textContent.includes('moved or deleted')")
    assert (
        page.locator(".run:disabled").count() == 1 and "no longer there" in page.locator(".run:disabled").inner_text()
    )
    open_run(seen, "other")
    seen.until("() => document.querySelector('#said').textContent === ''")


def test_a_finished_run_answers_beside_its_reference(show, address):
    seen = show(address)
    open_run(seen, "now")
    assert not seen.page.locator("#chat").is_visible()
    open_run(seen, "old")
    ask = seen.page.get_by_role("button", name="Answer", exact=True)
    seen.page.get_by_role("textbox", name="Prompt").fill("hello")
    ask.click()
    seen.until("() => document.querySelector('#chat [role=status]').textContent.includes('is training')")
    seen.said.clear()  # the browser says that the server answered 400
    open_run(seen, "other")
    seen.page.get_by_role("textbox", name="Prompt").fill(f"hello {EVIL}")
    seen.page.locator("#chat").get_by_label("Task").select_option("words")
    ask.click()
    seen.page.locator(".answers article").wait_for()
    answers = seen.page.locator(".answers .side").all_inner_texts()
    assert [one.split("\n")[0] for one in answers] == ["Policy", "Reference"]
    assert f"reference of other on words: hello {EVIL}" in answers[1]
    assert seen.said == []
