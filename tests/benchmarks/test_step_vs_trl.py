"""The comparison's arithmetic and table; the steps themselves take minutes and are the benchmark's."""

import pytest
import step_vs_trl

PHASES = ("rollout", "score", "update", "other")


def step(scale: float, length: int = 4) -> dict:
    return {
        "seconds": dict.fromkeys(PHASES, scale),
        "peaks": {"rollout": 10 * scale, "update": 40 * scale},
        "start_bytes": 3,
        "lengths": [length] * 6,
        "prompt_lengths": [7, 5],
        "update_tokens": 42 * scale,
    }


@pytest.fixture
def work():
    return step_vs_trl.options().parse_args(["--generations", "3", "--completion-length", "4"])


@pytest.fixture
def found(work):
    return {
        name: step_vs_trl.figures([step(scale), step(3 * scale)], step(scale), {}, work)
        for name, scale in (("ours", 1.0), ("trl", 4.0))
    }


def test_figures_are_medians_of_the_steps_and_peaks_of_the_counted_one(found):
    ours = found["ours"]
    assert ours["seconds"] == {**dict.fromkeys(PHASES, 2.0), "step": 8.0}
    assert ours["peak_bytes"] == {"rollout": 10, "score": 0, "update": 40, "other": 0, "step": 40}
    assert (ours["tokens_generated"], ours["tokens_updated"], ours["bytes_before"]) == (24, 42, 3)


def test_completions_of_another_length_are_an_error(work):
    with pytest.raises(SystemExit, match="completions of 4 tokens"):
        step_vs_trl.figures([step(1.0)], step(1.0, length=3), {}, work)


def test_table_says_whether_the_bounds_hold(found, work, capsys):
    assert step_vs_trl.ratios(found)["peak_bytes"]["step"] == 0.25
    step_vs_trl.print_table(found, work)
    text = capsys.readouterr().out
    assert "time: 0.250 of TRL's; must be at most 0.3, goal 0.2: holds" in text
    assert "peak: 0.250 of TRL's; must be at most 0.1, goal 0.06: MISSED" in text
