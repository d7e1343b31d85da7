"""What `plan` and a run say of time."""

import io

import pytest
from rich.console import Console

from lowmem_rlhf.display.live import LiveView, print_plan
from lowmem_rlhf.display.notebook import NotebookDisplay
from lowmem_rlhf.display.run_display import ConsoleDisplay
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe


def plan(*changes: str) -> dict:
    return plan_recipe(load_recipe("grpo_gsm8k", ["hardware.profile=rtx-2080-ti", *changes])).to_dict()


def printed(values: dict) -> str:
    out = io.StringIO()
    print_plan(values, Console(file=out, width=120))
    return out.getvalue()


def test_a_plan_says_what_each_phase_a_step_and_the_run_take():
    text = printed(plan())
    lines = [line.split("  ")[0] for line in text.splitlines()]
    at = lines.index("time")
    assert lines[at + 1 : at + 7] == [
        *("rollout", "score", "update", "a step", "held-out examples, once", "the run of 300 steps")
    ]
    assert text.count("between") >= 3


def test_a_plan_without_a_time_says_why():
    values = plan()
    untold = {**values, "time": None, "device": {**values["device"], "speed": None}}
    assert "nobody tells how fast GeForce RTX 2080 Ti" in printed(untold)
    assert "the terms of its passes are not known" in printed({**values, "time": None})
    del values["time"]  # as earlier versions wrote it
    assert "how long" not in printed(values) and "held-out examples, once" not in printed(values)


def test_what_does_not_fit_has_no_time():
    values = plan("model=Qwen/Qwen3-14B", "generation.max_completion_length=8000")
    assert not values["fits"] and "held-out examples, once" not in printed(values)


def test_the_first_time_left_is_the_plan_s():
    view = LiveView(100, 40, Console(file=io.StringIO(), force_terminal=True), step_seconds=10.0)
    assert view._bars.tasks[0].fields["eta"] == "ETA 10m00s, predicted"
    assert LiveView(100, 40, Console(file=io.StringIO()))._bars.tasks[0].fields["eta"] == ""
    display = ConsoleDisplay(Console(file=io.StringIO()), Console(file=io.StringIO()))
    values = plan()
    display.plan(values)
    display.begin(300, 0)
    assert display._view is not None
    eta = display._view._bars.tasks[0].fields["eta"]
    display.end()
    assert eta.startswith("ETA ") and eta.endswith(", predicted")
    display.plan({**values, "time": None})
    display.begin(300, 0)
    assert display._view is not None and display._view._bars.tasks[0].fields["eta"] == ""
    display.end()


def test_a_notebook_begins_with_the_plan_s_time_left():
    pytest.importorskip("IPython")
    display = NotebookDisplay()
    display.plan({"time": {"step_seconds": 2.0}})
    display.begin(50, 0)
    assert "ETA 1m40s, predicted" in display._content()
    display.step({"step": 1, "time/step": 4.0})
    assert "ETA 3m16s" in display._content() and "predicted" not in display._content()
