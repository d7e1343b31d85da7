"""What a run was made of, in ``inputs.json``: fingerprints of its rows, its base and what was learned before it; and
what holds them against what is here now. No torch here."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.architecture.fingerprint import fingerprint, weights_fingerprint
from lowmem_rlhf.data.sources import SplitRows
from lowmem_rlhf.data.values import JsonFloat, JsonInt
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.data_sources import is_file, is_generated
from lowmem_rlhf.recipe.python_objects import is_python
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import LEARNED_REWARDS, REWARD_ADAPTER, DataConfig
from lowmem_rlhf.run.base_file import Fingerprint, read_fingerprint

if TYPE_CHECKING:
    from lowmem_rlhf.run.directory import RunDirectory

SHOWN = 12  # digits of a hash in a message
Rows = Sequence[Mapping[str, Any]]


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of rows and the SHA-256 of what they hold, in their order.

    The order of columns does not count; a number counts as it is written.
    """
    digest, count = hashlib.sha256(), 0
    encode = json.JSONEncoder(default=str, separators=(",", ":")).encode
    for row in rows:
        digest.update(encode([[name, _literal(row[name])] for name in sorted(row)]).encode("ascii"))
        digest.update(b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def _literal(value: Any) -> Any:
    if type(value) is str:
        return value
    if isinstance(value, JsonInt | JsonFloat):
        return {"#": value.literal}
    if isinstance(value, dict):
        return {str(key): _literal(part) for key, part in value.items()}
    return [_literal(part) for part in value] if isinstance(value, list) else value


def data_inputs(data: DataConfig, rows: SplitRows) -> dict[str, Any]:
    """Return what inputs.json says of the data: by split the source, its rows, and a Hub data set's commit."""
    inputs = {"train": {"source": data.train, **rows_fingerprint(rows.train), **_revision(data.train)}}
    if rows.held_out:
        source = data.eval or data.train
        inputs["eval"] = {"source": source, **rows_fingerprint(rows.held_out), **_revision(source)}
    if rows.few_shot:
        inputs["few_shot"] = {"source": str(data.few_shot and data.few_shot.file), **rows_fingerprint(rows.few_shot)}
    return inputs


def _revision(source: str) -> dict[str, str]:
    """Return the newest commit of a Hub data set that this machine has seen, where it has."""
    if is_generated(source) or is_python(source) or is_file(source) or Path(source).expanduser().exists():
        return {}
    from huggingface_hub import constants

    ref = Path(constants.HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}" / "refs" / constants.DEFAULT_REVISION
    try:
        return {"revision": ref.read_text(encoding="utf-8").strip()}
    except (OSError, ValueError):
        return {}


def base_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return what inputs.json says of the base: its name, and the fingerprint of its files where they are here."""
    base = fingerprint(recipe.model, recipe.revision)
    return {"model": recipe.model, **(base.to_dict() if base else {})}


def learned_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return what inputs.json says of what was learned before: the adapter that training begins with, and the models
    and adapters of rewards, by the recipe's key or the reward's name."""
    inputs: dict[str, Any] = {}
    if recipe.adapter is not None:
        inputs["adapter"] = {"source": recipe.adapter, "weights": _adapter_weights(recipe.adapter)}
    for task, own in recipe.by_task.items():
        for reward in own.rewards:
            key = f"tasks.{task}.rewards.{reward.name}" if task else f"rewards.{reward.name}"
            if reward.function == REWARD_ADAPTER:
                source = reward.options["adapter"]
                inputs[key] = {"source": source, "weights": _adapter_weights(source)}
            elif reward.function in LEARNED_REWARDS:
                source = reward.options["model"]
                its = fingerprint(source, reward.options.get("revision"))
                inputs[key] = {"source": source, "weights": its.weights if its else None}
    return {key: value for key, value in inputs.items() if value["weights"]}


def _adapter_weights(reference: str) -> str | None:
    from lowmem_rlhf.architecture.adapters import HEAD, WEIGHTS, adapter_folder

    folder = adapter_folder(reference)
    hashes = [weights_fingerprint(folder / name) for name in (WEIGHTS, HEAD) if (folder / name).is_file()]
    return hashlib.sha256(":".join(map(str, hashes)).encode()).hexdigest() if all(hashes) else None


def run_inputs(recipe: Recipe, rows: Mapping[str, SplitRows]) -> dict[str, Any]:
    """Return all that inputs.json holds.

    Args:
        rows: by task.
    """
    by_task = {task: data_inputs(own.data, rows[task]) for task, own in recipe.by_task.items()}
    data, base = {"tasks": by_task} if recipe.tasks else by_task[""], base_inputs(recipe)
    return {"data": data, "base": base, **({"learned": learned} if (learned := learned_inputs(recipe)) else {})}


def rows_differ(recorded: Any, rows: Rows) -> str:
    """Return how rows differ from those that were kept of a split; nothing where they do not or nothing was kept."""
    if not isinstance(recorded, dict) or "sha256" not in recorded:
        return ""
    now = rows_fingerprint(rows)
    if now["sha256"] == recorded["sha256"]:
        return ""
    if now["rows"] != recorded.get("rows"):
        return f"{_count(recorded.get('rows'))} rows, now {_count(now['rows'])}"
    return f"{_count(now['rows'])} rows as then, with other values or in another order"


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else "?"


def recorded_rows(run: "RunDirectory", task: str = "") -> dict[str, Any]:
    """Return what inputs.json says of the rows of a task, by split; nothing where it does not."""
    recorded = run.inputs().get("data") or {}
    return (recorded.get("tasks") or {}).get(task) or {} if task else recorded


def check_resumed_data(run: "RunDirectory", recipe: Recipe, rows: Mapping[str, SplitRows]) -> None:
    """Check that a run goes on with the rows that it began with.

    Args:
        rows: by task.

    Raises:
        UserError: they are others.
    """
    for task, own in recipe.by_task.items():
        _check_same_rows(recorded_rows(run, task), own.data, rows[task])


def _check_same_rows(recorded: Mapping[str, Any], data: DataConfig, own: SplitRows) -> None:
    sources = {"train": data.train, "eval": data.eval or data.train, "few_shot": data.few_shot and data.few_shot.file}
    words = {"train": "rows", "eval": "held-out rows", "few_shot": "examples"}
    for split, rows in {"train": own.train, "eval": own.held_out, "few_shot": own.few_shot}.items():
        if difference := rows_differ(recorded.get(split), rows):
            source, which = str(sources[split]), words[split]
            was, now = recorded[split].get("revision"), _revision(source).get("revision")
            moved = f"; its commit was {was[:SHOWN]}, is now {now[:SHOWN]}" if was and now and now != was else ""
            raise UserError(
                f"--resume: the {which} of {source} are not those that the run began with ({difference}{moved}); put "
                "the data back, or start a new run with another --output"
            )


def other_learned(run: "RunDirectory", recipe: Recipe) -> dict[str, str]:
    """Return by key (see `learned_inputs`) what was learned before the run and is not what it was then, in words."""
    recorded, differences = run.inputs().get("learned") or {}, {}
    for key, now in learned_inputs(recipe).items() if recorded else ():
        was = (recorded.get(key) or {}).get("weights")
        if was and was != now["weights"]:
            differences[key] = (
                f"{key}: {now['source']} is not what the run in {run.path} was trained with: other weights "
                f"({was[:SHOWN]}, now {now['weights'][:SHOWN]})"
            )
    return differences


def check_learned(run: "RunDirectory", recipe: Recipe, resume: bool = False) -> None:
    """Check that the adapter that training began with is the same still; on a resume the models of rewards as well.

    Raises:
        UserError: one is another.
    """
    for key, difference in other_learned(run, recipe).items():
        if resume or key == "adapter":
            remedy = ", or start a new run with another --output" if resume else ""
            raise UserError(f"{'--resume: ' if resume else ''}{difference}; put it back{remedy}")


def check_base(run: "RunDirectory", recipe: Recipe, resume: bool = False) -> str:
    """Check that the recipe's model is the one that the run was trained on, as far as both are known.

    Returns:
        What is to be said of it: that its tokenizer or chat template is another one.

    Raises:
        UserError: its weights or its config are others; on a resume its tokenizer or chat template too.
    """
    values = run.inputs().get("base")
    recorded, now = read_fingerprint(values), fingerprint(recipe.model, recipe.revision)
    if recorded is None or now is None:
        return ""
    parts = recorded.differing(now)
    if recorded.kind != now.kind:
        difference = f"its files were {recorded.kind}, are now {now.kind}"
    elif not parts:
        return ""
    else:
        difference = describe_difference(parts[0], recorded, now)
    if parts == ["tokenizer"] and not resume:
        return f"{recipe.model} has another tokenizer or chat template than the run in {run.path} was trained with"
    head = "--resume: " if resume else ""
    raise UserError(
        f"{head}model {recipe.model!r} is not the base that the run in {run.path} was trained on: {difference}; "
        f"{_base_back(run, recorded, now, resume)}"
    )


def describe_difference(part: str, recorded: Fingerprint, now: Fingerprint) -> str:
    """Return in words that a part of a model is another one."""
    names = {"weights": "weights", "config": "config.json", "tokenizer": "tokenizer or chat template"}
    return f"other {names[part]} ({getattr(recorded, part)[:SHOWN]}, now {getattr(now, part)[:SHOWN]})"


def _base_back(run: "RunDirectory", recorded: Fingerprint, now: Fingerprint, resume: bool) -> str:
    if recorded.commit and now.commit and recorded.commit != now.commit:
        also = f" and give revision={recorded.commit}" if resume else ""
        return f"the Hub has moved on: write `revision: {recorded.commit}` into {run.path / 'recipe.yaml'}{also}"
    return "restore the files that it was trained on"
