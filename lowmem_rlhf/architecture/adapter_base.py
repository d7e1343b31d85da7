"""Whether a saved adapter's base is the model that it is to lie on. No torch here.

The content of both models' files decides, where it is known: base.json beside an adapter tells it, or its base is a
folder or a snapshot of the Hub on this machine. Otherwise the last parts of their names must agree, which is said.
"""

import logging
import re
from functools import lru_cache
from pathlib import Path

from lowmem_rlhf.architecture.fingerprint import fingerprint
from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.base_file import BASE, Fingerprint, full_precision, read_base

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
SHOWN = 12


def check_adapter_base(
    reference: str, folder: Path, base: str, base_revision: str | None, model: str, revision: str | None
) -> None:
    """Check that an adapter was trained on this model; say once what is not known for certain.

    Args:
        reference: the adapter's, for messages.
        folder: where its files are.
        base, base_revision: the name of its base as adapter_config.json has it; may be empty.
        model, revision: as in a recipe.

    Raises:
        UserError: it was trained on another one.
    """
    current, recorded = fingerprint(model, revision), read_base(folder)
    if recorded is None and (not base or same_place(base, model)):
        return
    base_name, trained_on = recorded or (base, fingerprint(base, base_revision) if current else None)
    if current and trained_on and trained_on.kind == current.kind:
        _compare(reference, folder, base_name, base, trained_on, model, current)
    elif base and not same_place(base, model):
        _check_name(reference, folder, base, model)


def _compare(
    reference: str, folder: Path, base: str, named: str, trained_on: Fingerprint, model: str, current: Fingerprint
) -> None:
    differing = trained_on.differing(current)
    if "weights" in differing:
        elsewhere = named and not same_place(named, model)
        remedy = f"give model={full_precision(named)}" if elsewhere else "give the model that it was trained on"
        beside = f"{folder / BASE} tells" if (folder / BASE).is_file() else f"{folder / CONFIG} names"
        raise UserError(
            f"adapter {reference!r} was trained on other weights than the recipe's model has: on {base!r} "
            f"({trained_on.weights[:SHOWN]}, as {beside}), and {model!r} has {current.weights[:SHOWN]}; {remedy}"
        )
    if "config" in differing:
        _say(f"adapter {reference} was trained on the weights of {model}, but with another config.json")


def _check_name(reference: str, folder: Path, base: str, model: str) -> None:
    model_name, base_name, unquantized = _short(model), _short(base), full_precision(base)
    if model_name == base_name:
        resolve_model(model)  # a model that is not there is the trouble then
        _say(
            f"adapter {reference} was trained on {base}, and the model is {model}: only the names agree, whether the "
            "weights do is not known"
        )
    elif model_name == _short(unquantized):
        _say(f"adapter {reference} was trained on {base}, a quantized copy of {unquantized}; it is put on {model}")
    elif base_name != _short(unquantized):
        raise UserError(
            f"adapter {reference!r} belongs to {base!r}, a quantized copy, and the recipe's model is {model!r}; give "
            f"its 16-bit model, {unquantized} or the same of its first owner (model={unquantized})"
        )
    else:
        raise UserError(
            f"adapter {reference!r} belongs to {base!r} and the recipe's model is {model!r}; give model={base}, or if "
            f"both are the same weights, put the name into {folder / CONFIG}"
        )


def same_place(base: str, model: str) -> bool:
    """Whether two names of models are the same one, or lead to the same folder or file."""
    if base == model:
        return True
    model_path, base_path = Path(model).expanduser(), Path(base).expanduser()
    return model_path.exists() and base_path.exists() and model_path.samefile(base_path)


def _short(model: str) -> str:
    """Return a model's name without its owner or folder."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()


@lru_cache(maxsize=256)
def _say(text: str) -> None:
    logger.warning(text)
