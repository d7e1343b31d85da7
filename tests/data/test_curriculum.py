"""From easy to hard: which examples a step may draw, and what a run without a curriculum sees."""

import math
from collections import Counter

import pytest
from tiny_runs import save_tiny_model, tiny_recipe, write_jsonl

from lowmem_rlhf.data.curriculum import CurriculumStream, stream_of
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.report import html
from lowmem_rlhf.session.train import train

LEVELS = [5, 1, 4, 1, 3, 2, 9, 7, 8, 6]


def stream(steps: float = 10, start: float = 0.3, per_step: int = 2) -> CurriculumStream[int]:
    return CurriculumStream(LEVELS, LEVELS, start, steps, per_step, seed=4)


def test_the_share_grows_to_all_and_a_step_draws_from_the_easiest():
    curriculum, seen = stream(), Counter[int]()
    for step in range(10):
        share = math.sqrt(step / 10 * (1 - 0.09) + 0.09)
        pool = sorted(LEVELS)[: math.ceil(share * 10)]
        batch = curriculum.batch(step)
        assert set(batch) <= set(pool) and not Counter(batch) - Counter(pool), step
        assert stream().batch(step) == batch
        seen.update(batch)
    assert curriculum.share(0) == 0.3 and curriculum.share(10) == 1.0 and len(seen) > 4
    later = [one for step in range(10, 15) for one in curriculum.batch(step)]
    assert sorted(later) == sorted(LEVELS)  # an epoch
    assert later == [one for step in range(10, 15) for one in PromptStream(LEVELS, 2, 4).batch(step)]


def test_a_pool_smaller_than_a_step_repeats_its_examples():
    assert Counter(stream(start=0.1, per_step=4).batch(0)) == {1: 4}


def test_the_recipe_chooses_column_start_and_steps():
    examples = [Example(str(n), [n], {"meta": {"level": str(level)}}) for n, level in enumerate(LEVELS)]
    section = {"curriculum": {"column": "meta.level", "start": 0.5}}
    made = stream_of(examples, tiny_recipe("m", data=section, training={"max_steps": 40, "prompts_per_step": 3}))
    assert isinstance(made, CurriculumStream) and (made.start, made.steps, made.prompts_per_step) == (0.5, 20, 3)
    assert all(float(one.columns["meta"]["level"]) <= 5 for one in made.batch(0))


@pytest.mark.parametrize("level", ["hard", None, True, "nan"])
def test_a_row_without_a_number_is_one_sentence(level):
    examples = [Example("a", [1], {"level": 1}), Example("b", [2], {"level": level})]
    with pytest.raises(UserError, match=r"data\.curriculum\.column: 'level' must hold a number in every row"):
        stream_of(examples, tiny_recipe("m", data={"curriculum": {"column": "level"}}))


def test_sft_has_none():
    with pytest.raises(UserError, match=r"data\.curriculum: is for algorithms that sample, and sft does not"):
        tiny_recipe("m", algorithm="sft", data={"curriculum": {"column": "level"}})


def test_a_run_begins_with_the_easiest(tmp_path, monkeypatch, lowmem_rlhf):
    monkeypatch.setattr(html, "write_report", lambda run: None)
    rows = [{"question": f"{n}", "answer": "1", "level": n} for n in range(10, 50)]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval_size": 0, "template": "{question}="}
    data |= {"curriculum": {"column": "level", "start": 0.1, "steps": 100}, "train_size": None}
    recipe = tiny_recipe(save_tiny_model(tmp_path / "model"), data=data, training={"max_steps": 1})
    run = train(recipe, tmp_path / "run")
    assert sorted({int(row["prompt"][:2]) for row in run.samples()}) == [10, 11, 12, 13]
    (tmp_path / "bad.yaml").write_text(
        tiny_recipe(tmp_path / "model", data={**data, "curriculum": {"column": "x"}}).to_yaml()
    )
    done = lowmem_rlhf("data", tmp_path / "bad.yaml")
    assert done.code == 2 and "'x' must hold a number in every row, the easier the smaller; got nothing" in done.err
