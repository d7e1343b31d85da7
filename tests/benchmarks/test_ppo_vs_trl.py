"""ppo_vs_trl.py on a tiny model, our two sides; and its table, with numbers for a side of TRL's."""

import json
from contextlib import redirect_stdout
from io import StringIO

import ppo_vs_trl
import pytest

SIZES = {"prompts": 2, "generations": 2, "completion-length": 4, "micro-batch-tokens": 64, "tile": 8}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]
PHASES = {"rollout", "score", "update", "other", "step"}


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory):
    """Return what a run without TRL's environment prints as JSON."""
    out, data = StringIO(), tmp_path_factory.mktemp("data") / "train.jsonl"
    data.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("How many?", "How much is left?")))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setenv("OMP_NUM_THREADS", "1")
        ppo_vs_trl.main([*TINY, f"--model={tiny_folder}", f"--data={data}", "--device=cpu", "--json"])
    return json.loads(out.getvalue())


def test_both_sides_do_the_same_work_and_tell_times_and_peaks_by_phase(found):
    for side in (found["ppo"], found["grpo"]):
        assert set(side["seconds"]) == set(side["peak_bytes"]) == PHASES
        assert min(side["seconds"][p] for p in ("rollout", "score", "update")) > 0
        assert side["peak_bytes"]["step"] > side["bytes_before"] > 0
        assert side["tokens_generated"] == 2 * 2 * 4
    assert found["ppo"]["prompt_lengths"] == found["grpo"]["prompt_lengths"]
    assert found["ppo"]["tokens_updated"] == 2 * found["grpo"]["tokens_updated"]  # policy and critic
    assert "trl" not in found


def test_ratios_and_bounds(found):
    peaks = {name: found[name]["peak_bytes"]["step"] for name in ("ppo", "grpo")}
    verdict = found["bounds"]["peak ppo/grpo"]
    assert found["ratios"]["ppo/grpo"]["peak_bytes"]["step"] == verdict["ratio"] == peaks["ppo"] / peaks["grpo"]
    assert verdict["holds"] == (verdict["ratio"] <= verdict["bound"] == 1.25)
    assert set(found["ratios"]["ppo/grpo"]["seconds"]) >= {"rollout", "score", "update", "step"}
    assert list(found["bounds"]) == ["peak ppo/grpo"]


def test_parts_account_for_all_that_ppo_holds_beyond_grpo(found):
    parts = found["beyond_grpo_bytes"]
    assert parts["between_steps"] == parts["between_steps_measured"]
    assert parts["between_steps"] == sum(parts[part] for part in ppo_vs_trl.ALWAYS)
    assert parts["critic_gradients"] > parts["critic_adapter"] > 0
    assert parts["critic_optimizer_state"] > 2 * parts["critic_adapter"]


def test_table_says_whether_the_bounds_hold_and_that_a_side_is_missing(found, capsys):
    work = ppo_vs_trl.options().parse_args(TINY)
    sides = {name: found[name] for name in ("ppo", "grpo")}
    ppo_vs_trl.print_table(sides, work)
    text = capsys.readouterr().out
    assert "critic's optimizer state" in text and "TRL's side was left out: --env FOLDER" in text
    peaks = {p: 10 * bytes for p, bytes in sides["ppo"]["peak_bytes"].items()}
    ppo_vs_trl.print_table(sides | {"trl": {**sides["ppo"], "peak_bytes": peaks}}, work)
    text = capsys.readouterr().out
    assert "peak ppo/trl: 0.100; must be at most 0.15: holds" in text and "left out" not in text
