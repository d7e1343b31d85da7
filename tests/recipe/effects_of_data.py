"""What the keys of a recipe do to rows, prompts, examples, rewards and evaluations. Not a test module.

A case is a key, what is observed, its other value, and the values that it is seen beside.
"""

import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.data.curriculum import stream_of
from lowmem_rlhf.data.prompts import Example, build_examples
from lowmem_rlhf.data.sources import load_rows
from lowmem_rlhf.data.supervised import build_pairs, build_supervised, labelled_texts
from lowmem_rlhf.errors import LowmemError
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.sections import DataConfig, RewardConfig
from lowmem_rlhf.rewards import load_rewards, score
from lowmem_rlhf.rollout.scores import Scores
from lowmem_rlhf.run.directory import RunDirectory, default_output
from lowmem_rlhf.training.evaluate import Sampled
from lowmem_rlhf.training.held_out import HeldOut

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from tiny_classifiers import save_classifier, save_sentence_encoder
from training_cases import make_tokenizer

VALUES = {"model": "none", "rewards": ["arithmetic_answer"], "data": {"train": "arithmetic"}}
CHAT = "{% for m in messages %}{{ m['content'] }}{% if shout %}*{% endif %}={% endfor %}"
SHOTS = [{"question": f"{n} - 1", "answer": str(n - 1), "short": "5"} for n in (3, 4)]
ROWS = [
    {"question": f"{n} + {n % 3}", "ask": f"{n} * {n}", "answer": str(n), "short": "1", "level": 9 - n}
    | {"good": n % 2 == 0, "by": n / 4, "more": SHOTS, "shots": [{"question": "7 + 1", "answer": "8", "short": "2"}]}
    | ({"much": "1" * n} if n else {})
    | {"talk": [{"role": role, "content": f"{n}{role[0] == 'u'}"} for role in ("user", "assistant") * 2]}
    for n in range(9)
]


@cache
def kept() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@cache
def folder() -> Path:
    """Return a folder with rows: files of them, and one in which they lie under two keys."""
    made = Path(kept().name)
    for name, rows in (("rows", ROWS), ("other", ROWS[:4]), ("shots", SHOTS)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "twice.json").write_text(json.dumps({"a": ROWS[:3], "b": ROWS[5:]}))
    return made


@cache
def tokenizer() -> Any:
    made = make_tokenizer()
    made.chat_template = CHAT
    return made


def said_or(make: Any) -> Any:
    """Return what comes of a call, or the sentence that it ends with."""
    try:
        return make()
    except LowmemError as error:
        return str(error)


def placed(values: dict[str, Any]) -> dict[str, Any]:
    """Return values in which the names of files are paths."""
    return {
        k: str(folder() / v) if isinstance(v, str) and v.endswith((".json", ".jsonl")) else v for k, v in values.items()
    }


def section(**data: Any) -> DataConfig:
    return DataConfig.model_validate(placed({"train": "rows.jsonl", "eval_size": 0, **data}))


def rows(**data: Any) -> Any:
    return [[dict(row) for row in load_rows(section(**data), split)] for split in ("train", "eval")]


def prompts(**data: Any) -> Any:
    return str(said_or(lambda: build_examples(ROWS, section(**data), tokenizer())))


def supervised(**values: Any) -> Any:
    settings = {key: values.pop(key) for key in SFTSettings.model_fields if key in values}
    data = section(**{"completion": "answer", **values})
    made = said_or(lambda: build_supervised(ROWS, data, SFTSettings(**settings), tokenizer(), frozenset([3])))
    return str(made)


def pairs(**data: Any) -> Any:
    return [str(one) for one in build_pairs(ROWS, section(**data), 1024, tokenizer(), frozenset([3]))]


def texts(**data: Any) -> Any:
    return labelled_texts(ROWS, section(**data))


def curriculum(**values: Any) -> Any:
    """Return the examples of a run's first steps."""
    given = {"train": "arithmetic", "curriculum": {"column": "level", "start": 0.3, "steps": 4, **values}}
    recipe = validate_recipe({"model": "none", "rewards": ["length"], "data": given})
    examples = [Example(str(n), [n], {"level": row["level"], "by": row["by"]}) for n, row in enumerate(ROWS)]
    return [one.prompt for step in range(4) for one in stream_of(examples, recipe).batch(step)]


def few_shot(**values: Any) -> Any:
    return prompts(chat=False, few_shot=placed(values))


def tasks(mixing: dict[str, Any] | None = None, **task: Any) -> Any:
    """Return what follows from two tasks, of which the second has 30 examples and the first 10."""
    both = [{"name": "a", "data": {"train": "arithmetic"}}, {"name": "b", "data": {"train": "arithmetic"}}]
    both[0] |= task
    values = {"model": "none", "rewards": ["length", "arithmetic_answer"], "tasks": both, "mixing": mixing or {}}
    recipe = validate_recipe(values)
    names = [one.name for one in recipe.tasks]
    examples = [Example(str(n), [n], {}, task=names[n >= 10]) for n in range(40)]
    drawn = [one.prompt for step in range(4) for one in stream_of(examples, recipe).batch(step)]
    alone = [
        (own.data.train, own.evaluation.accuracy, own.generation.max_completion_length, [r.name for r in own.rewards])
        for own in recipe.by_task.values()
    ]
    return names, drawn, alone


def mixing(**values: Any) -> Any:
    return tasks(mixing=values)


def rewarded(**values: Any) -> Any:
    """Return the names, values and sums of a reward beside another one, for two prompts' four completions."""
    (folder() / "fails.py").write_text("def fails(completions, **_):\n    raise ValueError('no')\n")
    first = {"function": "length", "options": {"target": 4}, **values}
    if first["function"] == "fails":
        first |= {"function": f"{folder() / 'fails.py'}:fails", "options": {}}
    configs = [RewardConfig.model_validate(one) for one in (first, {"function": "arithmetic_answer"})]
    done = ["12", "1", "123 is 4", "4"]
    given = (["?"] * 4, done, [[5] * len(one) for one in done], {"answer": ["12", "3", "4", "9"]})
    found = said_or(lambda: score(load_rewards(configs), *given, num_generations=2))
    return found if isinstance(found, str) else (found.by_name, [repr(one) for one in found.total], found.failures)


def evaluations(**values: Any) -> Any:
    """Return what is made of the evaluations of a run, and when it would end."""
    recipe = validate_recipe(
        {"model": "none", "rewards": ["length"], "data": {"train": "arithmetic"}}
        | {"evaluation": values, "training": {"max_steps": 12}}
    )
    held_out, ended = HeldOut(recipe, RunDirectory(folder() / "run")), []
    for step in range(1, 12):
        if held_out.due(step):
            right = (0.5, 0.55, 0.54, 0.2, 0.56)[step // 2 - 1]
            held_out.add("during", {"accuracy": right, "reward/mean": -right, "headline": "accuracy"}, step)
            ended.append(bool(held_out.ends(step)))
    return held_out.results, ended


def right(**values: Any) -> Any:
    """Return which completions count as correct."""
    recipe = validate_recipe({**VALUES, "rewards": ["think_format", "arithmetic_answer"], "evaluation": values})
    return Sampled([], Scores({"think_format": [1.0, 0.0], "arithmetic_answer": [0.0, 1.0]}, []), 1, 1.0).correct(
        recipe.evaluation.accuracy
    )


def planned(**hardware: Any) -> Any:
    values = {**VALUES, "model": "Qwen/Qwen2.5-0.5B-Instruct", "hardware": hardware}
    return str(said_or(lambda: plan_recipe(validate_recipe(values)).to_dict()))


@cache
def encoder(name: str) -> str:
    """Return the folder of a tiny classifier or sentence encoder."""
    if name == "sentences":
        return str(save_sentence_encoder(folder() / name))
    return str(save_classifier(folder() / name))


def learned(function: str, **options: Any) -> Any:
    """Return what a learned reward says of three texts, and how it is laid out."""
    config = RewardConfig(function=function, options=options)
    (reward,) = load_rewards([config])
    read, done = reward.function.encoder, ["w1 w2 w3", "w4 " * 9, "w5 w6 " * 30]
    texts = {"answer": ["w1 w3"] * 3, "short": ["w7"] * 3}
    values = score([reward], ["w8 w9 "] * 3, done, [[]] * 3, texts).by_name[function]
    return values, str(read.model.dtype), read.max_length, read.batch_tokens, reward.placement


def classifier(**options: Any) -> Any:
    return learned("classifier", **{"model": encoder("classifier"), "label": 1, **options})


def similarity(**options: Any) -> Any:
    return learned("similarity", **{"model": encoder("sentences"), **options})


FEW = {"file": "shots.jsonl"}
STEPS = {"steps": 2}
DATA: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ("data.train", rows, "other.jsonl", {}),
    ("data.eval", rows, "other.jsonl", {"eval_size": 2}),
    ("data.eval_size", rows, 3, {"eval_size": 2}),
    ("data.train_size", rows, 4, {}),
    ("data.streaming", rows, True, {"eval_size": 2, "shuffle_buffer": 3, "bad_rows": "drop"}),
    ("data.shuffle_buffer", rows, 4, {"streaming": True, "shuffle_buffer": 3, "bad_rows": "drop"}),
    ("data.field", rows, "b", {"train": "twice.json", "field": "a"}),
    ("data.options", rows, {"high": 3}, {"train": "arithmetic"}),
    ("data.prompt", prompts, "ask", {}),
    ("data.answer", prompts, "short", {}),
    ("data.system", prompts, "2", {}),
    ("data.template", prompts, "{question}=", {}),
    ("data.prompt_words", prompts, 2, {}),
    ("data.chat", prompts, False, {}),
    ("data.chat_template_kwargs", prompts, {"shout": True}, {}),
    ("data.max_prompt_length", prompts, 2, {}),
    ("data.long_prompts", prompts, "drop", {"max_prompt_length": 8, "template": "{question}{much?}"}),
    ("data.bad_rows", prompts, "drop", {"prompt": "much"}),
    ("data.messages", prompts, "talk", {}),
    ("data.completion", supervised, "short", {}),
    ("data.text", supervised, "question", {}),
    ("sft.max_length", supervised, 8, {}),
    ("sft.completion_only_loss", supervised, False, {}),
    ("sft.learn", supervised, "all", {"messages": "talk"}),
    ("data.chosen", pairs, "ask", {"chosen": "answer", "rejected": "question"}),
    ("data.rejected", pairs, "ask", {"chosen": "answer", "rejected": "question"}),
    ("data.margin", pairs, "by", {"chosen": "answer", "rejected": "question"}),
    ("data.label", texts, "short", {"text": "question", "label": "good"}),
    ("data.few_shot.file", few_shot, "rows.jsonl", FEW),
    ("data.few_shot.count", few_shot, 1, FEW),
    ("data.few_shot.answer", few_shot, "short", FEW),
    ("data.few_shot.column", few_shot, "shots", {"column": "more"}),
    ("data.curriculum.column", curriculum, "by", {}),
    ("data.curriculum.start", curriculum, 0.8, {}),
    ("data.curriculum.steps", curriculum, 1, {}),
    ("tasks.name", tasks, "c", {}),
    ("tasks.weight", tasks, 3, {}),
    ("tasks.data", tasks, {"train": "other.jsonl"}, {}),
    ("tasks.rewards", tasks, ["length"], {}),
    ("tasks.generation.max_completion_length", lambda **own: tasks(generation=own), 9, {}),
    ("tasks.accuracy", tasks, "arithmetic_answer", {}),
    ("mixing.by", mixing, "size", {}),
    ("mixing.temperature", mixing, 3, {"by": "size"}),
    ("rewards.function", rewarded, "think_format", {"function": "gsm8k_answer", "name": "a", "options": {}}),
    ("rewards.name", rewarded, "a", {}),
    ("rewards.weight", rewarded, 0.5, {}),
    ("rewards.requires", rewarded, "arithmetic_answer", {}),
    ("rewards.normalize", rewarded, "group", {}),
    ("rewards.options", rewarded, {"target": 8}, {}),
    ("rewards.on_error", rewarded, "zero", {"function": "fails"}),
    ("evaluation.steps", evaluations, 4, STEPS),
    ("evaluation.metric", evaluations, "reward/mean", STEPS),
    ("evaluation.greater_is_better", evaluations, False, {**STEPS, "keep_best": True}),
    ("evaluation.keep_best", evaluations, True, STEPS),
    ("evaluation.patience", evaluations, 1, STEPS),
    ("evaluation.min_delta", evaluations, 0.1, {**STEPS, "patience": 1}),
    ("evaluation.accuracy", right, "arithmetic_answer", {}),
    ("name", lambda name="tiny": default_output(validate_recipe({**VALUES, "name": name}).name), "other", {}),
    ("hardware.device", planned, "cpu", {"device": "cuda:77"}),
    ("rewards.options.classifier.label", classifier, 2, {}),
    ("rewards.options.classifier.output", classifier, "logit", {}),
    ("rewards.options.classifier.text", classifier, "prompt_and_completion", {}),
    ("rewards.options.similarity.column", similarity, "short", {}),
    *(
        (f"rewards.options.{name}.{key}", seen, value, {})
        for name, seen in (("classifier", classifier), ("similarity", similarity))
        for key, value in (("device", "cpu"), ("dtype", "bfloat16"), ("max_length", 9), ("batch_tokens", 70))
    ),
]
