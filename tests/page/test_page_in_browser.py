"""The report in a real headless Chromium: drawn, driven, wide and narrow, light and dark; nothing from elsewhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_browser import ALL_DRAWN, CUT, DRAWN, OVERLAPS, Seen
from looks import EVIL, STEPS, write_look
from page_runs import lines

from lowmem_rlhf.display.format import format_bytes, format_number, format_seconds
from lowmem_rlhf.page.html import ASSETS, SCRIPTS
from lowmem_rlhf.page.report_data import report_data
from lowmem_rlhf.page.source import RunSource
from lowmem_rlhf.report.html import write_report
from lowmem_rlhf.run.directory import RunDirectory

VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
KINDS = ("grpo", "ppo", "sft")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Return by kind the report of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: write_report(RunDirectory(write_look(folder / kind, kind, f"my-{kind}"))) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_report_is_drawn_whole(show, reports, kind, width, scheme):
    seen = show(reports[kind], width, scheme)
    if width < 640:
        assert seen.page.locator(".group:not([open])").count() >= 1  # a phone begins with what counts
        seen.page.evaluate("document.querySelectorAll('.group').forEach((group) => { group.open = true; })")
    seen.until(ALL_DRAWN)
    drawn = dict(seen.page.evaluate(DRAWN))
    assert min(drawn.values()) > 3, drawn
    for title in {"grpo": ["Total reward"], "ppo": ["Total reward"], "sft": ["Loss"]}[kind]:
        assert title in drawn
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.page.evaluate(CUT) == []
    assert seen.page.evaluate(OVERLAPS) == []
    assert seen.is_dark() == (scheme == "dark")
    assert seen.said == [] and seen.asked == [reports[kind].as_uri()]


def titles(seen: Seen) -> list[str]:
    return list(seen.page.locator("figcaption").all_inner_texts())


def test_every_metric_is_in_a_panel_that_has_a_title(show, reports):
    grpo, ppo, sft = (titles(show(reports[kind])) for kind in KINDS)
    for title in (
        *("Total reward", "Each reward", "Groups without a learning signal", "KL to the reference, nats a token"),
        *("Entropy, nats a token", "Loss", "Gradient norm", "Learning rate", "Clipped tokens", "Peak memory, GiB"),
        *("Completion length, tokens", "Total reward, by task", "Held-out accuracy", "Time of a step, seconds"),
        *("Tokens a second", "Sampling against training, nats a token", "own/thing"),
    ):
        assert title in grpo, title
    for title in (
        "KL coefficient",
        "Explained variance",
        "Values and returns",
        "Value loss",
        "Probability ratio of an update",
    ):
        assert title in ppo and title not in grpo, title
    assert "Total reward" not in sft and {"Loss", "Held-out loss", "Learning rate"} <= set(sft)


def test_a_text_of_the_run_stays_text(show, reports):
    seen = show(reports["grpo"])
    assert seen.page.title() == "my-grpo · lowmem_rlhf"
    assert EVIL in seen.text("#description")
    assert EVIL in seen.page.locator(".sample pre").all_inner_texts()
    assert seen.page.locator("main img, #description b, .sample b:text('bold')").count() == 0


def test_the_policy_stops_a_script_that_is_not_the_pages_own(show, reports):
    seen = show(reports["sft"])
    seen.page.evaluate("""() => {
      const script = document.createElement('script'), image = new Image();
      script.textContent = "document.title = 'hit'";
      image.src = 'https://example.invalid/x.png';
      document.body.append(script, image);
    }""")
    seen.page.wait_for_timeout(50)
    assert seen.page.title() != "hit" and len(seen.said) == 2
    assert all("Content Security Policy" in line for line in seen.said)


def shown_samples(seen: Seen, count: str) -> list[str]:
    status = "document.querySelector('#samples-body [role=status]').textContent"
    seen.until(f"(text) => {status}.startsWith(text)", count)
    return list(seen.page.locator(".sample header").all_inner_texts())


def test_samples_are_found_filtered_and_sorted(show, reports):
    seen = show(reports["grpo"])
    page, total = seen.page, 2 * STEPS
    assert len(shown_samples(seen, f"{total} of {total}")) == 20
    page.get_by_role("button", name="Show more").click()
    seen.until("document.querySelectorAll('.sample').length === 40")
    page.get_by_label("Search").fill("STEP 7 is")
    assert all("step 7" in one for one in shown_samples(seen, f"2 of {total}"))
    page.get_by_role("button", name="Clear").click()
    shown_samples(seen, f"{total} of {total}")
    page.get_by_label("Reward", exact=True).select_option("exact")
    page.get_by_label("Reward from").fill("0.5")
    right = sum((step + place) % 3 == 0 for step in range(1, STEPS + 1) for place in range(2))
    assert all("exact 1" in one for one in shown_samples(seen, f"{right} of {total}"))
    page.get_by_label("Task", exact=True).select_option("words")
    words = sum((step + 1) % 3 == 0 for step in range(1, STEPS + 1))
    assert all("words" in one for one in shown_samples(seen, f"{words} of {total}"))
    page.get_by_label("Order").select_option("oldest")
    seen.until("document.querySelector('.sample b').textContent === 'step 2'")
    page.get_by_label("Ended").select_option("true")
    cut = sum((step + 1) % 3 == 0 and step % 7 == 0 for step in range(1, STEPS + 1))
    shown_samples(seen, f"{cut} of {total}")
    page.get_by_label("Reward from").fill("2")
    assert shown_samples(seen, f"0 of {total}") == []
    assert seen.said == []


def test_completions_of_one_prompt_are_compared(show, reports):
    seen = show(reports["grpo"], 390)
    button = seen.page.get_by_role("button", name="Compare with others of this prompt").nth(3)
    button.click()
    dialog = seen.page.locator("dialog[open]")
    dialog.locator("ins").first.wait_for()
    assert "12 samples of this prompt" in dialog.inner_text()
    assert dialog.locator("del").all_inner_texts() and dialog.locator("select").count() == 2
    assert seen.page.evaluate(CUT) == []
    dialog.get_by_label("Mark the words that differ").uncheck()
    assert dialog.locator("ins, del").count() == 0
    before = dialog.locator(".side pre").nth(0).inner_text()
    dialog.locator("select").nth(0).select_option("1")
    assert dialog.locator(".side pre").nth(0).inner_text() != before
    seen.page.keyboard.press("Escape")
    assert button.evaluate("(node) => node === document.activeElement")


def test_curves_are_read_zoomed_smoothed_and_hidden(show, reports):
    seen = show(reports["grpo"])
    page = seen.page
    panel = page.locator(".panel", has=page.get_by_text("Each reward", exact=True))
    plot, legend = panel.locator(".plot"), panel.locator(".legend")
    box = plot.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 50)
    assert f"step {STEPS}" in legend.inner_text()
    others = page.locator(".panel", has=page.get_by_text("Loss", exact=True)).locator(".legend")
    assert f"step {STEPS}" in others.inner_text()  # of all panels at once
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 60)
    page.mouse.up()
    seen.until("document.querySelector('#zoom').textContent.startsWith('Steps ')")
    page.get_by_role("button", name="Show all steps").click()
    assert seen.text("#zoom") == "All steps"
    last = lambda: legend.locator("b").first.inner_text()  # noqa: E731
    page.mouse.move(5, 5)
    raw = last()
    page.locator("#smoothing").fill("0.9")
    seen.until("(raw) => document.querySelectorAll('.panel')[1].querySelector('b').textContent !== raw", raw)
    page.get_by_label("Logarithmic scale").check()
    legend.get_by_role("button").first.click()
    assert last() == "hidden" and legend.get_by_role("button").first.get_attribute("aria-pressed") == "false"
    assert seen.said == []


def test_curves_and_themes_work_from_the_keyboard(show, reports):
    seen = show(reports["ppo"])
    page = seen.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    plot = page.locator(".plot").first
    plot.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert seen.text("#zoom").startswith("Total reward, step 2: mean of a step 0.")
    page.keyboard.press("+")
    assert seen.text("#zoom").startswith("Steps ")
    page.keyboard.press("Escape")
    assert seen.text("#zoom") == "All steps"
    for theme, dark in (("light", False), ("dark", True), ("auto", False)):
        page.locator("#theme").click()
        assert seen.text("#theme-name") == theme
        assert seen.is_dark() == dark
    assert seen.said == []


def test_a_run_of_odd_files_is_shown_all_the_same(show, tmp_path):
    folder = write_look(tmp_path / "odd", "grpo", "odd")
    names = (
        "__proto__",
        "constructor",
        "reward/",
        "task//x",
        "task/a/reward/constructor",
        "a/min",
        "reward/x/errors",
        "",
    )
    (folder / "metrics.jsonl").write_text(lines({"step": n, **dict.fromkeys(names, n * 1.5)} for n in range(1, 4)))
    odd = {"prompt": None, "completion": {"a": [1]}, "rewards": [1], "tokens": "x", "truncated": 3, "advantage": "y"}
    (folder / "samples.jsonl").write_text(
        lines([{"step": "z", **odd}, {"prompt": [{"content": 5}], "__proto__": 1}, {}])
    )
    phases = {"a": [1], "b": {"c": "d", "__proto__": 2**30}, "e": None}
    plan = {
        "memory": {"phases": phases, "budget_bytes": "f"},
        "settings": {"g": None, "h": [{}]},
        "reasons": {"g": {"i": 1}},
    }
    (folder / "plan.json").write_text(
        json.dumps({**plan, "device": 5, "time": {"phases": [1, "j"], "run_seconds": []}})
    )
    before = {"intervals": 5, "tasks": "k", "accuracy": "l", "constructor": 0.5, "problems": -1}
    (folder / "evaluation.json").write_text(json.dumps({"before": before, "during": [5, {"step": 2}], "after": 6}))
    later = {
        "results": {"policy": 5, "m": {"n": {"value": "o"}}},
        "counts": {"p": None},
        "difference": "q",
        "tasks": [1],
    }
    (folder / "evaluations.jsonl").write_text(lines([later, {}]))
    seen = show(write_report(RunDirectory(folder)))
    assert seen.page.locator(".sample").count() == 3 and {"constructor", "a"} <= set(titles(seen))
    assert seen.page.get_by_text("This part cannot be drawn").all_inner_texts() == []
    assert min(colours for _, colours in seen.page.evaluate(DRAWN)) > 3 and seen.said == []
    seen.page.get_by_role("button", name="Compare with others of this prompt").first.click()
    assert "sampled once" in seen.page.locator("dialog[open]").inner_text()


@pytest.fixture(scope="module")
def run_script(browser) -> Iterator[Any]:
    """Return a function that evaluates an expression where the page's functions are."""
    page = browser.new_page()
    assets = [(ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS if name != "page"]

    def run(expression: str, given: Any = None) -> Any:
        return page.evaluate(f"(given) => {{ {''.join(assets)}; return ({expression}); }}", given)

    yield run
    page.close()


def test_numbers_are_written_as_the_terminal_writes_them(run_script):
    for value in (0, 1, 12.5, 0.123456, 1234.6, 1234567, 12_345_678.9, -0.25, None):
        assert run_script("formatNumber(given)", value) == format_number(value).replace(
            "-", "–" if value is None else "-"
        )
    for value in (5 << 20, 3 << 30, 100_000_000, 123_456_789_012):
        assert run_script("formatBytes(given)", value) == format_bytes(value)
    for value in (12, 59.4, 61, 3599, 3600, 40_000):
        assert run_script("formatSeconds(given)", value) == format_seconds(value)


def test_a_sample_of_a_task_shows_its_own_rewards_alone(run_script):
    tags = "rewardTags(given).map((tag) => tag.textContent)"
    rewards = {"exact": 1, "style": None}
    assert run_script(tags, {"task": "sums", "rewards": rewards, "reward": 1}) == ["exact 1"]
    assert run_script(tags, {"task": None, "rewards": rewards, "reward": 1}) == ["sum 1", "exact 1", "style –"]


@pytest.mark.parametrize("query", [
    {}, {"sort": "oldest"}, {"sort": "highest"}, {"sort": "lowest", "reward": "exact"}, {"sort": "longest"},
    {"sort": "shortest", "first": 10, "last": 20}, {"low": 1.5}, {"high": 0.5, "reward": "exact", "task": "sums"},
    {"text": "ANSWER of step 1"}, {"truncated": True, "sort": "highest"}, {"truncated": False, "task": "words"},
    {"text": "nowhere"},
])  # fmt: skip
def test_a_report_finds_the_samples_that_the_server_finds(run_script, reports, query):
    folder = reports["grpo"].parent
    expected = RunSource(folder).samples(**query, offset=3, limit=30)
    asked = {"sort": "newest", "offset": 3, "limit": 30, **query}
    found = run_script("new Embedded(given[0]).samples('', given[1])", [report_data(folder), asked])
    assert [row["index"] for row in found["rows"]] == [row["index"] for row in expected["rows"]]
    assert (found["total"], found["all"]) == (expected["total"], expected["all"])


@pytest.mark.parametrize(("columns", "expected"), [
    ({"reward/mean": [0.1, 0.9], "reward/a": [0.1, 0.9]}, [0, 1]),
    ({"reward/mean": [0.5, 1.8], "reward/a": [0, 1], "reward/b": [0.5, 0.8]}, [0, 2]),
    ({"reward/mean": [3, 4.5], "reward/a": [3, 4.5]}, [0, None]),
    ({"reward/mean": [-0.1, 0.2], "reward/a": [-0.1, 0.2]}, [None, None]),
])  # fmt: skip
def test_a_band_stays_inside_the_rewards_range(run_script, columns, expected):
    told = {"step": [1, 2], "last": 2, "taken_back": 0, "columns": columns}
    code = """(() => { const all = new Columns(); all.add(given);
      return rewardRange(all).map((bound) => (isNumber(bound) ? bound : null)); })()"""
    assert run_script(code, told) == expected


def test_differences_give_both_texts_back(run_script):
    for before, after in (("a b c d", "a x c"), ("", "new words"), ("same", "same"), ("3 + 4 = 8.", "3 + 4 is 7.")):
        pieces = run_script("differences(given[0], given[1])", [before, after])
        assert "".join(text for kind, text in pieces if kind != "new") == before
        assert "".join(text for kind, text in pieces if kind != "gone") == after
    assert run_script("differences('3 + 4 = 8.', '3 + 4 = 7.')") == [
        ["same", "3 + 4 = "], ["gone", "8"], ["new", "7"], ["same", "."]
    ]  # fmt: skip


def test_a_run_that_grows_or_is_taken_back_is_followed(run_script):
    code = """(() => { const all = new Columns(), seen = given.map((told) => all.add(told));
      return [seen, all.step, all.columns, all.last]; })()"""
    told = [
        {"step": [1, 2], "last": 2, "taken_back": 0, "columns": {"a": [1, 2]}},
        {"step": [3], "last": 3, "taken_back": 0, "columns": {"b": [7]}},
        {"step": [], "last": 3, "taken_back": 0, "columns": {}},
    ]
    assert run_script(code, told) == [[True, True, False], [1, 2, 3], {"a": [1, 2, None], "b": [None, None, 7]}, 3]
    told.append({"step": [], "last": 2, "taken_back": 1, "columns": {}})
    assert run_script(code, told)[:2] == [[True, True, False, "anew"], []]
