"""TRL's trainers, found and made: the class, its configuration, and an instance on two roles of the SharedBase.

What is TRL's: the collator, the loss, the metrics. What is this package's: tokens (those of `data.supervised`, so that
a prompt is the one that rollouts and chat know), the model, the loop, the optimizer, checkpoints. Nothing is reported
to anyone.
"""

import copy
import dataclasses
import importlib
import os
import tempfile
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PrinterCallback, TrainingArguments

from lowmem_rlhf.algorithms.trl.model import RoleModel
from lowmem_rlhf.algorithms.trl.settings import max_length
from lowmem_rlhf.algorithms.trl.spec import TRL_TRAINERS
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.load import first_sentence
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.recipe.names import DECIDED
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.suggest import did_you_mean


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep TRL's remarks on experimental trainers, and bars over the two rows it is made with, out of sight."""
    bars = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not bars:
            enable_progress_bars()


def find_trainer(algorithm: str) -> tuple[Any, Any]:
    """Return the trainer's and the configuration's class.

    Raises:
        UserError: the installed TRL has none of that name.
    """
    kind = TRL_TRAINERS[algorithm]
    try:
        with _quiet():
            module = importlib.import_module(kind.module)
            return getattr(module, kind.trainer), getattr(module, kind.config)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"algorithm: the installed TRL has no {kind.module}.{kind.trainer} ({first_sentence(error)}); install trl "
            "1.16, or take another algorithm"
        ) from error


def checked_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's ``trl:`` section, every value of the type that TRL's configuration says.

    Raises:
        UserError: a key or a value that TRL's configuration does not have; all of them in one message.
    """
    _, config = find_trainer(recipe.algorithm)
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    fields = {f.name: f for f in dataclasses.fields(config) if f.name not in theirs and f.name not in DECIDED}
    types = typing.get_type_hints(config)
    found, lines = {}, []
    for key, value in recipe.trl.items():
        if key in theirs:
            lines.append(f"{key}: is one of transformers' training arguments, which this package sets; leave it out")
        elif key not in fields:
            allowed = sorted(fields)
            lines.append(f"{key}: unknown key{did_you_mean(key, allowed)} (allowed: {', '.join(allowed)})")
        else:
            try:
                found[key] = _typed(value, types[key], fields[key].metadata.get("choices"))
            except (ValidationError, ValueError) as error:
                lines.append(f"{key}: got {value!r}; {_expected(error)}")
    if lines:
        raise UserError("\n  ".join([f"the recipe's trl section does not fit TRL's {config.__name__}:", *lines]))
    with tempfile.TemporaryDirectory() as folder:
        configuration(recipe, found, torch.device("cpu"), folder)
    return found


def _typed(value: Any, kind: Any, choices: Sequence[Any] | None) -> Any:
    """Return a value as what a field's type says; a lone text stands for a list of one, as TRL has it."""
    if isinstance(value, str) and typing.get_origin(kind) is list:
        value = [value]
    typed = TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    if choices and typed not in choices:
        raise ValueError(f"it should be one of {', '.join(map(str, choices))}{did_you_mean(str(typed), choices)}")
    return typed


def _expected(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    said = [one["msg"].replace("Input should be", "it should be") for one in error.errors()]
    return " or ".join(dict.fromkeys(said))


def configuration(recipe: Recipe, arguments: dict[str, Any], device: torch.device, folder: str) -> Any:
    """Return TRL's configuration: the section's keys; all else as the package has it.

    It is for one process on ``device``, without mixed precision (the base computes in its own dtype), without
    trackers, and writes nothing but into ``folder``.

    Raises:
        UserError: TRL refuses the values.
    """
    _, config = find_trainer(recipe.algorithm)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        with _quiet():
            made = config(
                output_dir=folder,
                per_device_train_batch_size=recipe.training.prompts_per_step,
                seed=recipe.training.seed,
                bf16=False,
                fp16=False,
                gradient_checkpointing=False,
                use_cpu=capabilities(device).on_cpu,
                report_to="none",
                save_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
                log_level="error",
                **{**arguments, "max_length": max_length(arguments)},
            )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"trl: TRL's {config.__name__} refuses these settings: {first_sentence(error)}") from error
    made._n_gpu = min(made.n_gpu, 1)  # one card, also where several are in sight
    return made


def make_trainer(recipe: Recipe, base: SharedBase, rows: Sequence[dict[str, Any]], tile: int) -> Any:
    """Return an instance of the recipe's trainer whose model is the policy, and whose data are these rows.

    Args:
        rows: as `data.batch_rows` makes them; they are taken as they are.
        tile: positions whose logits exist at once.

    Raises:
        UserError: TRL refuses the settings.
    """
    kind, arguments = TRL_TRAINERS[recipe.algorithm], checked_arguments(recipe)
    trainer, _ = find_trainer(recipe.algorithm)
    policy = RoleModel(base, POLICY, tile)
    given: dict[str, Any] = {"ref_model": RoleModel(base, REFERENCE, tile)} if kind.reference else {}
    tokenizer = copy.deepcopy(base.tokenizer)  # TRL writes into it
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder, _quiet():
        args = configuration(recipe, arguments, base.device, folder)
        try:
            made = _with_own_tokens(trainer)(
                model=policy,
                args=args,
                train_dataset=Dataset.from_list(list(rows)),
                processing_class=tokenizer,
                **given,
            )
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"trl: TRL's {kind.trainer} refuses these settings: {first_sentence(error)}") from error
    for model in (policy, *given.values()):
        model.keep_own_forward()
    made.remove_callback(PrinterCallback)
    # of several processes each has micro-batches of its own, and their number differs: the loop adds up what TRL logs
    made.accelerator.gather = made.accelerator.gather_for_metrics = _as_it_is
    return made


def _as_it_is(values: Any, *_: Any, **__: Any) -> Any:
    return values


def _with_own_tokens(trainer: Any) -> Any:
    """Return a trainer that takes rows of token ids as they are, and that calls nobody."""

    class WithOwnTokens(trainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def tokenize_row(self, feature: dict[str, Any], *args: Any) -> dict[str, Any]:
            return feature

        def _send_telemetry(self) -> None:
            """TRL would tell the Hub which trainer runs on which card."""

    return WithOwnTokens
