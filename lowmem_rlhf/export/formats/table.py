"""The table of export formats, and the check of an export's options. No torch here.

A new format is a subclass of `ExportFormat` whose instance `register_format` puts into the table. From then on
``--format``, ``--dry-run``, the proof, the model card and ``--push`` work with it.
"""

from dataclasses import replace
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.formats.adapter import AdapterFormat
from lowmem_rlhf.export.formats.format import ExportFormat
from lowmem_rlhf.export.formats.gguf import GGUFFormat
from lowmem_rlhf.export.formats.merged import MergedFormat
from lowmem_rlhf.export.formats.ollama import OllamaFormat
from lowmem_rlhf.export.options import FLAGS, ExportOptions
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import MODEL, RunDirectory
from lowmem_rlhf.suggest import did_you_mean, spelled

FORMATS: dict[str, ExportFormat] = {}
DEFAULT, DEFAULT_WITH_SCORES = MergedFormat.name, AdapterFormat.name


def register_format(format: ExportFormat) -> None:
    """Put a format into the table.

    Raises:
        ValueError: another one has its name.
    """
    if format.name in FORMATS:
        raise ValueError(f"an export format {format.name!r} is registered already; give yours another name")
    FORMATS[format.name] = format


for _format in (AdapterFormat(), MergedFormat(), GGUFFormat(), OllamaFormat()):
    register_format(_format)


def check_options(options: ExportOptions, recipe: Recipe, run: RunDirectory) -> ExportOptions:
    """Return an export's options with their defaults.

    Raises:
        UserError: a value is not known, an option does not go with the format, or the run cannot leave as it.
    """
    is_reward_model = recipe.spec.output == "scores"
    default = DEFAULT_WITH_SCORES if is_reward_model else DEFAULT
    name = _known("format", options.format, tuple(FORMATS)) or default
    format = FORMATS[name]
    values: dict[str, Any] = {
        option: _known(option, getattr(options, option), known) for option, known in format.choices.items()
    }
    if recipe.spec.output == "classes":
        raise UserError(f"the run in {run.path} trained a classifier whole: {run.path / MODEL} is the model itself")
    if is_reward_model and not format.holds_scores:
        raise UserError(
            f"--format {name}: the run in {run.path} trained a reward model, whose scores come from an adapter "
            f"and a head; take --format {DEFAULT_WITH_SCORES}"
        )
    for option in ("onto", "dtype", "quantize", "heads", "as_class"):
        if getattr(options, option) not in (None, False) and option not in format.takes:
            usual = "--{option} has no meaning with --format {format}; leave it out"
            raise UserError(format.refusals.get(option, usual).format(option=FLAGS.get(option, option), format=name))
    if options.push:
        from lowmem_rlhf.export.push import check_push

        check_push(options.push)
    options = replace(options, format=name, heads=options.heads or is_reward_model, **values)
    return format.check(options, run)


def _known(option: str, value: str | None, known: tuple[str, ...]) -> str | None:
    """Return an option's value as it is spelled in ``known``.

    Raises:
        UserError: it is not there.
    """
    if value is None:
        return None
    value = spelled(value, known)
    if value not in known:
        flag = FLAGS.get(option, option)
        raise UserError(f"--{flag}: got {value!r}; give {', '.join(known)}{did_you_mean(value, known)}")
    return value
