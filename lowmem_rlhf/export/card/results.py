"""Held-out results of an exported policy as the Hub reads them: the `model-index` of a model card.

No ``.eval_results/*.yaml`` is written: such a file is a score on a registered benchmark, under the benchmark's own task
name, and the held-out rows of a run are a part of a data set that its recipe chose.
"""

from typing import Any

from lowmem_rlhf.display.outcome import about
from lowmem_rlhf.export.card.facts import data_by_task, hub_datasets
from lowmem_rlhf.export.local_paths import without_folders
from lowmem_rlhf.run.held_out import ACCURACY, AFTER, LOSS, MEAN_REWARD, Row, during, headline, number, part

SHOWN = (ACCURACY, MEAN_REWARD, LOSS, "perplexity")  # beside the headline
POLICY, LM_EVAL = "policy", "lm-eval"


def model_index(
    name: str, task: str, recipe: dict[str, Any], evaluation: dict[str, Any], later: list[Row], step: int | None
) -> list[dict[str, Any]]:
    """Return the `model-index` of a card; empty where nothing was measured of the exported policy.

    Args:
        name: of the model.
        task: the Hub's name of what the model does, such as ``text-generation``.
        recipe: values of the run's recipe.
        evaluation: evaluation.json.
        later: outcomes of `eval` on the finished policy.
        step: the checkpoint that was exported; None: the finished policy.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    sets = {name: _data_set(data) for name, data in data_by_task(recipe).items()}
    found = _held_out(evaluation, sets, step)
    for outcome in later if step is None else ():
        found += _outcome(outcome, sets)
    results = [
        EvalResult(task_type=task, metric_type=metric, metric_name=said, metric_value=value, metric_args=args, **data)
        for data, metric, said, value, args in found
    ]
    return eval_results_to_model_index(name, results) if results else []


def _data_set(data: dict[str, Any]) -> dict[str, Any]:
    """Return what names the held-out rows of a task; a set of the Hub by its id, configuration and split."""
    source = data.get("eval") or data.get("train")
    shown = str(without_folders({"data": {"eval": source}})[0]["data"]["eval"])
    named: dict[str, Any] = {"dataset_type": shown, "dataset_name": shown}
    if source in hub_datasets({"eval": source}):
        named |= {"dataset_config": data.get("config"), "dataset_split": data.get("eval_split")}
    return named


def _held_out(evaluation: dict[str, Any], sets: dict[str, dict[str, Any]], step: int | None) -> list[tuple[Any, ...]]:
    """Return data set, metric, its name, value and circumstances of evaluation.json's row of the exported policy."""
    row = part(evaluation, AFTER)
    if step is not None:
        row = next((one for one in [*during(evaluation), row] if one.get("step") == step), {})
    rows = part(row, "tasks") or {"": row}
    first = headline(evaluation)
    return [
        (sets[task], metric, f"held-out {metric}", value, _circumstances(own, metric))
        for task, own in rows.items()
        if task in sets
        for metric in dict.fromkeys((own.get("headline") or first, *SHOWN))
        if (value := number(own.get(metric))) is not None
    ]


def _circumstances(row: Row, metric: str) -> dict[str, Any]:
    args: dict[str, Any] = {"measured": "on the policy that this export reproduces"}
    args |= {key: row[key] for key in ("problems", "samples", "temperature") if number(row.get(key)) is not None}
    bounds = part(row, "intervals").get(metric)
    if isinstance(bounds, list) and len(bounds) == 2:
        args |= {"interval_95": bounds}
    return args


def _outcome(outcome: Row, sets: dict[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the same of an outcome of `eval`: of held-out data, by task where it has some, or of lm-eval's tasks."""
    shown = str(without_folders({"data": {"eval": outcome.get("data", "?")}})[0]["data"]["eval"])
    said = {"measured": about({**outcome, "data": shown})}
    tasks = outcome.get("tasks")
    found: list[tuple[Any, ...]] = []
    for task, own in (tasks if isinstance(tasks, dict) else {"": outcome}).items():
        for name, got in (part(own, "results").get(POLICY) or {}).items():
            value = number(got.get("value")) if isinstance(got, dict) else None
            if value is None:
                continue
            args = said if number(got.get("low")) is None else {**said, "interval_95": [got["low"], got.get("high")]}
            group, _, metric = name.partition("/")
            if shown == LM_EVAL and metric:
                data = {"dataset_type": group, "dataset_name": f"{group} (lm-eval)"}
                found.append((data, metric, f"{metric} of lm-eval", value, args))
            else:
                data = sets.get(task) or {"dataset_type": shown, "dataset_name": shown}
                found.append((data, name, f"{name}, measured after training", value, args))
    return found
