"""The live view prints plain lines without a terminal, survives one, and never needs a metric."""

import io
import re

import pytest
from rich.console import Console

from lowmem_rlhf.display.format import evaluation_rows, format_bytes, format_number, format_ratio, format_seconds
from lowmem_rlhf.display.live import LiveView, print_evaluation, print_plan, tokens_per_second

METRICS = {
    "step": 12, "reward/mean": 0.31, "kl": 0.002, "completion/mean_length": 5.1, "time/step": 2.0,
    "tokens/generated": 40, "tokens/trained": 28, "memory/peak_bytes": 0.4 * 2**30,
}  # fmt: skip


class Pipe(io.StringIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def terminal() -> Console:
    return Console(force_terminal=True, file=io.StringIO(), width=100, _environ={"TERM": "xterm-256color"})


def test_one_line_a_step_without_a_terminal():
    pipe = Pipe()
    with LiveView(60, start_step=11, console=Console(file=pipe, width=40)) as view:
        view.phase("rollout", 1, 8)
        view.step(METRICS)
        flushed = pipe.flushes
        view.step({"kl": None})
        view.message("saved [bold]checkpoint[/bold]")
    first, second, message = pipe.getvalue().splitlines()
    assert first == ("step 12/60  reward 0.310  kl 0.002  len 5.1  2 s/step  34 tok/s  peak 0.40 GiB  ETA 1m36s")
    assert re.fullmatch(r"step 13/60  ETA \w+", second)
    assert message == "saved [bold]checkpoint[/bold]"
    assert flushed > 0


def test_a_code_page_without_the_character():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="cp1252"))
    with LiveView(1, console=console) as view:
        view.message("reward → 学")
    assert raw.getvalue().rstrip() == b"reward ? ?"


def test_terminal_shows_metrics_phase_and_messages():
    console = terminal()
    with LiveView(60, console=console) as view:
        view.phase("rollout", 3, 8)
        view._live.refresh()
        for step in range(1, 30):
            view.phase("update")
            view.step({**METRICS, "step": step, "reward/mean": step / 30})
            view.step({})
        view.message("saved [brackets] stay")
    text = console.file.getvalue()
    assert "rollout" in text and "3/8" in text and "saved [brackets] stay" in text and "ETA" in text
    assert "\x1b[?25h" in text  # the cursor came back


def test_an_error_ends_the_display_and_passes():
    console = terminal()
    with pytest.raises(ZeroDivisionError), LiveView(3, console=console) as view:
        view.step(METRICS)
        raise ZeroDivisionError
    assert view._live is None


def test_trend_compares_halves():
    view = LiveView(60, console=terminal())
    with view:
        for step, reward in enumerate([0.0, 0.0, 0.0, 0.3, 0.3, 0.3], 1):
            view.step({"step": step, "reward/mean": reward})
    assert "(+0.3 in 3 steps)" in view._status.plain


def test_tokens_per_second():
    assert tokens_per_second(METRICS) == 34.0
    assert tokens_per_second({"time/step": 2.0, "tokens/generated": 4}) == 2.0
    assert tokens_per_second({"time/step": 0.0, "tokens/generated": 4}) is None
    assert tokens_per_second({"time/step": 2.0}) is tokens_per_second({"tokens/trained": 2}) is None


def printed(function, value) -> str:
    out = io.StringIO()
    function(value, Console(file=out, width=120))
    return out.getvalue()


def test_print_plan():
    plan = {
        "fits": False,
        "device": {
            "name": "Card [1]",
            "total_bytes": 11 * 2**30,
            "free_bytes": 10 * 2**30,
            "notes": ["the first of two"],
        },
        "profile": "card",
        "settings": {"quantization": "nf4", "gradient_checkpointing": True},
        "reasons": {"quantization": "it has [brackets]"},
        "memory": {
            "budget_bytes": 10 * 2**30,
            "peak_bytes": 12 * 2**30,
            "phases": {"rollout": {"base": 2**30}, "export": {}},
        },
    }
    text = printed(print_plan, plan)
    for part in ("Card [1]", "profile card", "the first of two", "it has [brackets]", "true", "base 1.00 GiB"):
        assert part in text
    assert "peak 12.00 GiB of 10.00 GiB: does not fit" in text
    assert "fits" in printed(print_plan, {**plan, "fits": True})
    assert "does not fit" in printed(print_plan, {})
    placement = {"model": "org/bert", "device": "cpu", "reason": "its 1.00 GiB do not fit"}
    lines = printed(print_plan, {**plan, "rewards": {"style": placement}}).splitlines()
    assert ["style", "org/bert", "cpu", "its", "1.00", "GiB", "do", "not", "fit"] in [line.split() for line in lines]


def test_print_evaluation():
    evaluation = {
        "before": {"reward/exact": -0.5, "accuracy": 0.1, "problems": 128, "note": "x"},
        "after": {"reward/exact": 0.5, "accuracy": 0.34, "problems": 128, "completion/mean_length": 5.25},
    }
    text = printed(print_evaluation, evaluation)
    lines = [line.split() for line in text.splitlines()]
    assert lines == [
        ["held-out", "before", "after", "ratio"],
        ["accuracy", "0.1", "0.34", "3.4x"],
        ["reward/exact", "-0.5", "0.5", "-"],
        ["completion/mean_length", "-", "5.25", "-"],
        ["128", "held-out", "problems"],
    ]
    assert "accuracy" in printed(print_evaluation, {"before": {"accuracy": 0.0}})
    assert "no held-out evaluation" in printed(print_evaluation, {})


def test_results_are_shown_with_intervals_and_begin_with_what_the_task_has():
    ends = [
        {"accuracy": 0.0, "reward/mean": value, "headline": "reward/mean", "problems": 32}
        | {"intervals": {"reward/mean": [value - 0.05, value + 0.05]}}
        for value in (0.13, 0.91)
    ]
    text = printed(print_evaluation, {"before": ends[0], "after": ends[1]})
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[1] == ["reward/mean", "0.13 [0.08, 0.18]", "0.91 [0.86, 0.96]", "7x"]
    assert cells[2][0] == "accuracy" and cells[3] == ["32 held-out problems, 95 % intervals over them in brackets"]
    odd = {"after": {"accuracy": 1, "intervals": "?"}, "best": 3, "during": {}}  # whatever stands there
    assert evaluation_rows(odd) == [("accuracy", None, 1)]


def test_the_live_view_keeps_the_last_evaluation():
    console = terminal()
    with LiveView(60, console=console) as view:
        view.step({**METRICS, "eval/headline": "accuracy", "eval/accuracy": 0.523})
        view.step({**METRICS, "step": 13})
        assert view._status.plain.endswith("held-out accuracy 52.3% after step 12")
        view.step({**METRICS, "step": 14, "eval/headline": "reward/mean", "eval/reward/mean": 0.91})
        assert view._status.plain.endswith("held-out mean reward 0.91 after step 14")


def test_formats():
    assert [format_seconds(s) for s in (None, 0.4, 59, 130, 3725)] == ["-", "0s", "59s", "2m10s", "1h02m"]
    assert [format_bytes(b) for b in (None, 0, 2**20, 2**30)] == ["-", "0 MiB", "1 MiB", "1.00 GiB"]
    assert [format_number(n) for n in (None, float("nan"), True, 5, 1234.5, 0.12345)] == [
        "-",
        "-",
        "-",
        "5",
        "1,234",
        "0.123",
    ]
    assert format_ratio(0, 1) == format_ratio(None, 1) == "-" and format_ratio(0.5, 0) == "0x"
    assert evaluation_rows({"before": None, "after": {"accuracy": 1}}) == [("accuracy", None, 1)]
