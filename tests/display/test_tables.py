"""Tables of plans and results, and numbers as people read them."""

import io

from rich.console import Console

from lowmem_rlhf.display.format import evaluation_rows, format_bytes, format_number, format_ratio, format_seconds
from lowmem_rlhf.display.tables import print_evaluation, print_plan


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
