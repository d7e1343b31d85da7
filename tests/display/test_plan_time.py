"""What `plan` and a run say of time."""

import io

import pytest
from fake_run import PLAN, metrics
from rich.console import Console

from lowmem_rlhf.display.notebook import NotebookDisplay
from lowmem_rlhf.display.run_display import ConsoleDisplay
from lowmem_rlhf.display.tables import print_plan
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
    assert "the time of its passes, or of the server that samples, is not known" in printed({**values, "time": None})
    del values["time"]  # as earlier versions wrote it
    assert "how long" not in printed(values) and "held-out examples, once" not in printed(values)


def test_what_does_not_fit_has_no_time():
    values = plan("model=Qwen/Qwen3-14B", "generation.max_completion_length=8000")
    assert not values["fits"] and "held-out examples, once" not in printed(values)


def test_the_first_time_left_is_the_plan_s():
    display = ConsoleDisplay(Console(file=io.StringIO()), Console(file=io.StringIO()))
    values = plan()
    display.plan({**values, "evaluation_steps": 0})
    display.begin(300, 0)
    assert display._view is not None
    left = display._view.state.time_left()
    assert left == pytest.approx(values["time"]["run_seconds"]) and not display._view.state.measured
    display.end()
    display.plan({**values, "time": None})
    display.begin(300, 0)
    assert display._view is not None and display._view.state.time_left() is None
    display.end()


def test_a_notebook_begins_with_the_plan_s_time_left():
    pytest.importorskip("IPython")
    display = NotebookDisplay()
    display.plan({"time": {"step_seconds": 2.0}})
    display.begin(50, 0)
    assert "ETA 1m40s, predicted" in display._content()
    display.step({"step": 1, "time/step": 4.0})
    assert "ETA 3m16s" in display._content() and "predicted" not in display._content()


def test_a_notebook_shows_rewards_memory_and_samples_as_text():
    pytest.importorskip("IPython")
    display = NotebookDisplay()
    display.plan(PLAN)
    display.begin(50, 0)
    display.samples(*({"prompt": "<b>p</b>", "completion": text, "reward": 0.5} for text in ("<script>1</script>", "")))
    for step in (1, 2):
        display.step(metrics(step))
    text = display._content()
    assert "&lt;script&gt;1&lt;/script&gt;" in text and "<script" not in text and "&lt;b&gt;p&lt;/b&gt;" in text
    assert "<polyline" in text and "peak 7.53 of 11.00 GiB, planned 9.03" in text
    assert "correct_answer 0.4   format_of_the_answer -0.25" in text and "rollout 640 tok/s" in text
    assert "step 2/50, ETA 40m20s" in text  # 48 steps of 40 s and 5 evaluations of 100 s
