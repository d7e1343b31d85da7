"""same_bits.py: equal runs and plans are the same, and one bit that differs is named; both sides run a real command."""

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import same_bits
from same_values import Compared, compare_plans, compare_runs
from twins import NEEDS, TWINS

from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.server import SERVERS

ROOT = Path(__file__).resolve().parents[2]
OLD_RUNS = ROOT / "tests" / "fixtures" / "old_runs"
RUN = OLD_RUNS / "ppo_1a8dfe0"


@pytest.fixture
def other(tmp_path) -> Path:
    """Return a copy of the run that a test may change."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def next_up(value: float) -> float:
    """Return the float whose bits are the next ones."""
    return struct.unpack("<d", struct.pack("<q", struct.unpack("<q", struct.pack("<d", value))[0] + 1))[0]


def change_metric(run: Path, key: str, value: Any) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1][key] = value(rows[1][key])
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def differences(compared: dict[str, Compared]) -> dict[str, str]:
    return {part: one.difference for part, one in compared.items() if one.difference}


def test_a_copy_is_the_same_and_everything_in_it_was_compared(other):
    found = compare_runs(RUN, other)
    assert not differences(found) and not same_bits.verdict(found)
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    counted = sum(not key.startswith(("time/", "memory/")) for row in rows for key in row)
    assert found["metrics"].values == counted > 40
    assert found["evaluation"].values == 16
    from safetensors.torch import load_file

    tensors = [tensor for file in RUN.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert found["tensors"].values == sum(tensor.numel() for tensor in tensors) > 1000


def test_a_metric_that_only_the_new_side_has_is_no_difference(other):
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps({**row, "more": 1}) + "\n" for row in rows))
    assert not differences(compare_runs(RUN, other))
    assert differences(compare_runs(other, RUN)) == {"metrics": "line 1.more: 1 was, nothing is"}


def test_times_and_memory_do_not_count(other):
    for key in ("time/step", "memory/peak_bytes"):
        change_metric(other, key, lambda value: value + 1)
    assert not differences(compare_runs(RUN, other))


def test_one_bit_of_a_metric_is_named(other):
    change_metric(other, "loss", next_up)
    found = differences(compare_runs(RUN, other))
    assert list(found) == ["metrics"] and found["metrics"].startswith("line 2.loss: ")
    before, after = found["metrics"].removeprefix("line 2.loss: ").removesuffix(" is").split(" was, ")
    assert float(after) == next_up(float(before))


def test_a_metric_that_is_gone_or_zero_of_another_sign_is_named(other):
    change_metric(other, "policy/approx_kl_first", lambda value: -0.0)
    assert differences(compare_runs(RUN, other)) == {"metrics": "line 2.policy/approx_kl_first: 0.0 was, -0.0 is"}
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text(lines[0])
    assert differences(compare_runs(RUN, other)) == {"metrics": "line 2.step: 2 was, nothing is"}
    assert differences(compare_runs(other, RUN)) == {"metrics": "line 2.step: nothing was, 2 is"}


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "checkpoints/step-2/optimizer.safetensors"])
def test_one_bit_of_a_tensor_is_named(other, file):
    content = bytearray((other / file).read_bytes())
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    name = min(key for key, tensor in header.items() if key != "__metadata__" and tensor["dtype"] == "F32")
    start = 8 + struct.unpack("<Q", content[:8])[0] + header[name]["data_offsets"][0]
    element = 0 if not header[name]["shape"] else 1
    content[start + 4 * element + 2] ^= 1
    (other / file).write_bytes(content)
    where = f"{file}: {name}: differs from element {element} on"
    assert differences(compare_runs(RUN, other)) == {"tensors": where}


def test_a_file_of_tensors_that_is_gone_is_named(other):
    (other / "adapter" / "critic" / "head.safetensors").unlink()
    found = differences(compare_runs(RUN, other))["tensors"]
    assert found.startswith("adapter/critic/head.safetensors: ") and found.endswith(" is gone")


def test_nothing_on_both_sides_is_not_the_same(tmp_path):
    for side in "ab":
        (tmp_path / side).mkdir()
    assert same_bits.verdict(compare_runs(tmp_path / "a", tmp_path / "b")) == "there is nothing to compare"


def test_one_value_of_a_plan_is_named():
    def plans(peak: int, said: str = "", code: int = 0) -> list[dict[str, Any]]:
        out = {"fits": True, "memory": {"peak_bytes": peak}}
        return [{"recipe": "dpo", "profile": card, "code": code, "out": out, "err": said} for card in ("t4", "l4")]

    assert compare_plans(plans(1), plans(1, "a note")) == {"dpo": Compared(6)}
    changed = [*plans(1)[:1], *plans(2)[1:]]
    assert compare_plans(plans(1), changed)["dpo"].difference == "l4.out.memory.peak_bytes: 1 was, 2 is"
    refused = compare_plans(plans(1, "error: a", 2), plans(1, "error: b", 2))["dpo"]
    assert refused.difference == 't4.err: "error: a" was, "error: b" is'
    assert compare_plans(plans(1), [])["dpo"].difference == "t4.code: 0 was, nothing is"


def test_every_shipped_recipe_has_a_twin_after_what_it_goes_on_from():
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    recipes = {name for name in shipped if load_recipe(name).generation.engine not in SERVERS}  # no server is here
    assert len(shipped - recipes) == 2
    assert set(same_bits.WORK) == recipes | {"plans"}
    assert same_bits.chosen(["ppo_reward_adapter", "plans"]) == ["reward_model", "ppo_reward_adapter", "plans"]
    order = list(TWINS)
    assert all(order.index(first) < order.index(second) for second, first in NEEDS.items())


def test_two_sides_are_run_and_one_that_differs_is_told(tmp_path, capsys, monkeypatch):
    """A stand-in for the package trains nothing: what is seen is that each side runs its own checkout."""
    for side, loss in (("old", 0.5), ("new", 0.25)):
        package = tmp_path / side / "lowmem_rlhf"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(
            "import pathlib, sys\n"
            "run = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
            "run.mkdir(parents=True)\n"
            f"loss = {loss} if 'dpo' in sys.argv else 1.0\n"
            "(run / 'metrics.jsonl').write_text(f'{{\"loss\": {loss}}}')\n"
        )
    monkeypatch.setattr(same_bits, "DATA", tmp_path)
    monkeypatch.setattr(same_bits, "prepare", lambda folder: None)
    work = [str(tmp_path / "old"), str(tmp_path / "new"), "--only", "grpo_gsm8k", "dpo"]
    with pytest.raises(SystemExit) as stop:
        same_bits.main([*work, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1 and found["differing"] == ["dpo"]
    assert found["recipes"]["dpo"]["metrics"]["difference"] == "line 1.loss: 0.5 was, 0.25 is"
    assert found["recipes"]["grpo_gsm8k"]["metrics"] == {"values": 1, "difference": ""}
    (tmp_path / "new" / "lowmem_rlhf" / "__main__.py").write_text("raise SystemExit('no card')")
    with pytest.raises(SystemExit):
        same_bits.main(work)
    assert "dpo: new failed: no card" in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit, match="holds no lowmem_rlhf/ and no bin/python"):
        same_bits.main([str(tmp_path), *work[1:]])


def test_plans_are_made_by_the_command_line_in_one_process(tmp_path):
    side = same_bits.make_side("new", ROOT, Path(sys.executable), tmp_path)
    done = side.run(str(ROOT / "benchmarks" / "plans_side.py"))
    plans = [json.loads(line) for line in done.stdout.splitlines()]
    recipes, profiles = ({path.stem for path in (ROOT / folder).glob("*.yaml")} for folder in ("recipes", "profiles"))
    assert {(plan["recipe"], plan["profile"]) for plan in plans} == {(r, p) for r in recipes for p in profiles}
    assert {plan["recipe"] for plan in plans if plan["code"]} == {"style_classifier"}  # it has no plan
    assert all(plan["out"]["memory"]["peak_bytes"] > 0 for plan in plans if not plan["code"])
