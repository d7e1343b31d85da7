"""The model card of an export: README.md with the curve and the resolved recipe beside it. No torch here.

Everything comes from the run directory and from the export's own proof; what was not measured is not mentioned. No
folder of this machine gets into it.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from lowmem_rlhf.algorithms.registry import find_spec
from lowmem_rlhf.display.export import judged_rows
from lowmem_rlhf.display.format import evaluation_table, format_bytes, format_number, format_value, number
from lowmem_rlhf.display.outcome import about, outcome_rows
from lowmem_rlhf.export.card.facts import data_by_task, hub_datasets, is_hub_id, license_of, model_name, versions
from lowmem_rlhf.export.card.markdown import Markdown, code, fenced, link, plain, table
from lowmem_rlhf.export.card.results import model_index
from lowmem_rlhf.export.formats.format import ExportFormat
from lowmem_rlhf.export.formats.table import FORMATS
from lowmem_rlhf.export.local_paths import last_part, without_folders
from lowmem_rlhf.files import atomic_write
from lowmem_rlhf.paths import without_home
from lowmem_rlhf.recipe.field_roles import fields_with
from lowmem_rlhf.recipe.secrets import masked, masked_values
from lowmem_rlhf.recipe.sections import HardwareConfig
from lowmem_rlhf.recipe.yaml_tree import write_yaml
from lowmem_rlhf.report.plots import plot_reward
from lowmem_rlhf.run.directory import RECIPE, RunDirectory
from lowmem_rlhf.run.evaluations import read_evaluations
from lowmem_rlhf.run.held_out import AFTER, BEFORE, part
from lowmem_rlhf.run.start import start_folder

README, CURVE = "README.md", "curve.png"
NUMERIC = fields_with(HardwareConfig, changes_numbers=True)
PROOF = {
    "mean_kl": "mean KL to the live policy (nats a token)",
    "top1_agreement": "same likeliest token",
    "kept_share": "share of the change kept",
}


def write_card(folder: Path, run: RunDirectory, export: dict[str, Any]) -> None:
    """Write README.md, the curve and recipe.yaml of an export.

    Args:
        folder: of the export.
        run: that it was made from.
        export: what was done: ``format``, ``onto``, ``dtype``, ``proof``; any of them may be missing.

    Raises:
        UserError: a file of the run cannot be read.
    """
    original = masked_values(run.recipe_values())
    recipe, local = without_folders(original)
    name = str(recipe.get("name") or run.path.name)
    format = FORMATS.get(str(export.get("format")))
    metrics, evaluation, plan = run.metrics(), run.evaluation(), run.plan()
    later = _later(run, metrics)
    atomic_write(folder / RECIPE, masked(without_home(write_yaml(recipe))))
    sections = [
        f"# {plain(name)}",
        _summary(original, recipe, export),
        _section("Use", _use(folder, original, format, name)),
        _section("Evaluation", _evaluation(evaluation, later)),
    ]
    if metrics:
        plot_reward(metrics, evaluation, folder / CURVE, name)
        sections.append(
            _section("Learning curve", f"![Learning curve of {plain(name)}]({CURVE})\n\n{_training(metrics)}")
        )
    sections += [
        _section("Proof of the export", _proof(export)),
        _section("Data", _data(recipe)),
        _section("Plan", _plan(plan)),
        _section("Recipe", f"The resolved recipe ([{RECIPE}]({RECIPE})):\n\n{fenced(_yaml(recipe), 'yaml')}"),
        _section("Reproduce", _reproduce(recipe, plan, local)),
    ]
    text = "\n\n".join(section.rstrip() for section in sections if section) + "\n"
    front = _front_matter(original, recipe, format)
    step = number(export.get("step"))
    task = front.get("pipeline_tag", "text-classification")
    if index := model_index(name, task, original, evaluation, later, None if step is None else int(step)):
        front["model-index"] = index
    head = f"---\n{_yaml(front)}---\n\n"
    atomic_write(folder / README, masked(without_home(head + _scrubbed(text, run, local))))


def _front_matter(original: dict[str, Any], recipe: dict[str, Any], format: ExportFormat | None) -> dict[str, Any]:
    """Return the metadata that the Hub reads; it can name only a base with a Hub id."""
    model, spec = str(original.get("model", "")), find_spec(original.get("algorithm"))
    algorithm = spec.name if spec else str(recipe.get("algorithm"))
    metadata: dict[str, Any] = {"license": license_of(model)}
    if is_hub_id(model):
        metadata["base_model"] = model
        metadata["base_model_relation"] = format.relation if format else ExportFormat.relation
    if format and format.library:
        metadata["library_name"] = format.library
    if spec is None or spec.output == "text":
        metadata["pipeline_tag"] = "text-generation"
    tags = format.tags if format else ()
    metadata["tags"] = ["lowmem-rlhf", re.sub(r"[^\w.]+|_", "-", algorithm), *tags]
    if sets := [one for data in data_by_task(original).values() for one in hub_datasets(data)]:
        metadata["datasets"] = list(dict.fromkeys(sets))
    return metadata


def _summary(original: dict[str, Any], recipe: dict[str, Any], export: dict[str, Any]) -> str:
    model = str(original.get("model", ""))
    base = (
        link(model, f"https://huggingface.co/{model}")
        if is_hub_id(model)
        else f"{plain(model_name(model))} (a local copy)"
    )
    revision = f", revision {plain(recipe['revision'])}" if recipe.get("revision") else ""
    lines = [
        plain(recipe.get("description") or ""),
        f"{base}{revision}, trained with {plain(recipe.get('algorithm'))} by "
        "lowmem_rlhf: one frozen, quantized base, and a low-rank adapter on it.",
    ]
    if recipe.get("adapter"):
        lines.append(
            f"Training went on from the adapter {code(recipe['adapter'])} of an earlier run, whose own recipe is not "
            "here."
        )
    onto = f"onto the {export['onto']} weights" if export.get("onto") else None
    step = None if export.get("step") is None else f"the checkpoint after step {export['step']}"
    told = ", ".join(plain(fact) for fact in (export.get("format"), onto, export.get("dtype"), step) if fact)
    return "\n\n".join(line for line in [*lines, f"Export: {told}." if told else ""] if line)


def _use(folder: Path, original: dict[str, Any], format: ExportFormat | None, name: str) -> str:
    if format is None:
        return ""
    model = str(original.get("model", ""))
    base = model if is_hub_id(model) else f"PATH/TO/{_word(model_name(model))}"
    return format.usage(folder, _word(name), base, find_spec(original.get("algorithm")))


def _later(run: RunDirectory, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest outcome of `eval` on held-out data, and the newest of lm-eval, of the finished policy."""
    last = max((int(row["step"]) for row in metrics if "step" in row), default=None)
    newest = {one.get("data") == "lm-eval": one for one in read_evaluations(run.path) if one.get("steps") == last}
    return [newest[key] for key in (False, True) if key in newest]


def _evaluation(evaluation: dict[str, Any], later: list[dict[str, Any]]) -> str:
    parts = []
    head, rows = evaluation_table(evaluation, ratio=False)
    if rows:
        ends = [part(evaluation, when) for when in (AFTER, BEFORE)]
        problems = next((count for end in ends if (count := end.get("problems"))), None)
        count = f" ({format_number(problems)} problems)" if problems else ""
        told = ", with 95 % intervals over the problems" if any(end.get("intervals") for end in ends) else ""
        parts.append(f"On held-out data{count}, before and after training{told}:")
        parts.append(table(head, rows))
    for outcome in later:
        outcome = {**outcome, "data": without_folders({"eval": outcome.get("data", "?")})[0]["eval"]}
        parts.append(f"Measured on the trained policy and its reference, from one base: {plain(about(outcome))}.")
        parts.append(table(*outcome_rows(outcome)))
        parts.append(f"{plain(outcome.get('method', ''))}.")
    return "\n\n".join(parts)


def _training(metrics: list[dict[str, Any]]) -> str:
    seconds = sum(number(row.get("time/step")) or 0.0 for row in metrics)
    peaks = [p for row in metrics if (p := number(row.get("memory/peak_bytes"))) is not None]
    peak = f", peak memory {format_bytes(max(peaks))}" if peaks else ""
    return f"{format_number(metrics[-1].get('step'))} steps in {format_number(seconds / 60)} minutes{peak}."


def _proof(export: dict[str, Any]) -> str:
    proof = export.get("proof") or {}
    told = {key: value for key, value in proof.items() if key != "judged"}
    rows = [(PROOF.get(key, key.replace("_", " ")), format_value(_short(value))) for key, value in told.items()]
    if not rows:
        return ""
    summary = f"{plain(export['summary'])}\n\n" if export.get("summary") else ""
    text = f"{summary}The export was loaded again and compared with the live policy:\n\n"
    text += table(("measure", "value"), rows)
    if verdicts := judged_rows(proof):
        text += "\n\nHeld against each other, with a bound that rounding explains:\n\n"
        text += table(("models", "measured", "allowed"), verdicts)
    return text


def _short(value: Any) -> Any:
    return format_number(value) if number(value) is not None else value


def _data(recipe: dict[str, Any]) -> str:
    rows = [
        (f"{task}: {key}" if task else key, value)
        for task, data in data_by_task(recipe).items()
        for key, value in _data_rows(data)
    ]
    return table(("", "what was learned from"), rows)


def _data_rows(data: dict[str, Any]) -> list[tuple[str, Markdown]]:
    sets = hub_datasets(data)
    rows = []
    for key in ("train", "eval"):
        if source := data.get(key):
            address = f"https://huggingface.co/datasets/{source}"
            rows.append((key, link(source, address) if source in sets else code(source)))
    shown = ("config", "train_split", "eval_split", "train_size", "eval_size", "options", "template", "system")
    return rows + [(key, code(format_value(data[key]))) for key in shown if data.get(key) not in (None, {}, "")]


def _plan(plan: dict[str, Any]) -> str:
    if not plan.get("settings"):
        return ""
    device, reasons = plan.get("device") or {}, plan.get("reasons") or {}
    where = f"{device.get('name', 'unknown device')}, {format_bytes(device.get('total_bytes'))}"
    rows = [(key, format_value(value), reasons.get(key, "")) for key, value in plan["settings"].items()]
    peak = (plan.get("memory") or {}).get("peak_bytes")
    predicted = f", predicted peak {format_bytes(peak)}" if peak else ""
    return f"Trained on {plain(where)}{predicted}.\n\n{table(('setting', 'value', 'why'), rows)}"


def _reproduce(recipe: dict[str, Any], plan: dict[str, Any], local: dict[str, str]) -> str:
    hardware, settings = recipe.get("hardware") or {}, plan.get("settings") or {}
    pinned = [f"hardware.{key}={settings[key]}" for key in NUMERIC if hardware.get(key) == "auto" and key in settings]
    paths = [f"{key}=PATH/TO/{last_part(path)}" for key, path in local.items()]
    command = " ".join(shlex.quote(word) for word in ["lowmem-rlhf", "train", RECIPE, *paths, *pinned])
    note = "\n\n`PATH/TO` stands for where these local files lie on your machine." if paths else ""
    made_with = table(("made with", "version"), list(versions().items()))
    return f"{fenced(command)}{note}\n\n{made_with}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _word(text: str) -> str:
    """Return a name as a word that a shell and a string of Python take as it is."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "model"


def _yaml(values: dict[str, Any]) -> str:
    return write_yaml(values)


def _scrubbed(text: str, run: RunDirectory, local: dict[str, str]) -> str:
    """Remove the folders of this machine from texts of the run (a reason, a placement)."""
    for path in sorted(local.values(), key=len, reverse=True):
        for written in (path, plain(path)):
            text = text.replace(written, plain(last_part(path)))
    folders = {run.path.resolve(), Path.home(), Path.cwd(), start_folder(run.path) or Path.cwd()}
    for folder in sorted(map(str, folders), key=len, reverse=True):
        if len(folder) > 1:
            for written in (folder, plain(folder)):
                text = text.replace(written + "/", "").replace(written, "")
    return text
