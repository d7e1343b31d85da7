"""Adapters that other runs made: finding them, and refusing those that cannot lie on a shared base.

A role's adapter must leave the base as it is, since every other role is on the same weights: adapters that came with
changed weights (PiSSA, OLoRA, LoftQ, ...) are refused, and those that are more than a low-rank product beside a layer.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run import ADAPTER, MODEL, RECIPE, RunDirectory

WEIGHTS, CONFIG, HEAD = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
# what peft can add to a low-rank product and this package does not compute
MORE = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"),
)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk, in peft's format.

    Attributes:
        folder: where its files are.
        r, lora_alpha, target_modules: its shape.
        use_rslora: its scaling is alpha over the root of r.
        base: the model it was trained on, as it was named then.
        head: the file of the value or score head beside it, if there is one.
    """

    folder: Path
    r: int
    lora_alpha: float
    target_modules: str | list[str]
    use_rslora: bool
    base: str
    head: Path | None


def adapter_folder(reference: str) -> Path:
    """Return the folder with an adapter's files for a run directory, a checkpoint or the folder itself.

    Raises:
        UserError: there is none.
    """
    path = Path(reference).expanduser()
    for folder in (path / ADAPTER, path):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if not path.exists():
        raise UserError(f"adapter {reference!r} does not exist; give a run's folder or one with {CONFIG} and {WEIGHTS}")
    if (path / RECIPE).is_file():
        if (path / MODEL).is_dir():
            raise UserError(
                f"adapter {reference!r} is a classifier's run, which has no adapter; a reward of the kind classifier "
                f"takes {path / MODEL} as its model"
            )
        latest = RunDirectory(path).latest_checkpoint()
        other = f"take its checkpoint {latest[1]}" if latest else "let it finish first"
        raise UserError(f"adapter {reference!r} is a run without a finished adapter; {other}")
    raise UserError(f"adapter {reference!r} holds no {CONFIG} with {WEIGHTS}; give a run's folder or an adapter's")


def saved_adapter(reference: str, model: str) -> SavedAdapter:
    """Read what a saved adapter is, and check that it can lie on this model's base.

    Raises:
        UserError: there is none, it belongs to another base, or it is not an adapter beside unchanged weights.
    """
    folder = adapter_folder(reference)
    try:
        config: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"adapter {reference!r}: {CONFIG} cannot be read ({error})") from error
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"adapter {reference!r} is of kind {config.get('peft_type')}; only LoRA adapters can be continued"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal"):
        raise UserError(
            f"adapter {reference!r} began as {start}, which changes the base's weights, so that the base without it is "
            "no reference; train one with the usual start (init_lora_weights=true)"
        )
    more = [name for name in MORE if config.get(name)] or _patterns(config, folder)
    if more:
        raise UserError(
            f"adapter {reference!r} has {more[0]}, more than a low-rank product of one shape; it cannot be used"
        )
    base = str(config.get("base_model_name_or_path") or "")
    if base and _short(base) != _short(model):
        raise UserError(
            f"adapter {reference!r} belongs to {base!r} and the recipe's model is {model!r}; give model={base}, or if "
            f"both are the same weights, put the name into {folder / CONFIG}"
        )
    target = config.get("target_modules") or "all-linear"
    if not isinstance(target, str):  # peft lists what it would have taken, also what was excluded
        target = sorted(name for name in target if name.rsplit(".", 1)[-1] not in (config.get("exclude_modules") or ()))
    return SavedAdapter(
        folder=folder,
        r=int(config["r"]),
        lora_alpha=float(config["lora_alpha"]),
        target_modules=target,
        use_rslora=bool(config.get("use_rslora")),
        base=base,
        head=folder / HEAD if (folder / HEAD).is_file() else None,
    )


def _patterns(config: dict[str, Any], folder: Path) -> list[str]:
    """Return which of peft's patterns of other ranks and scalings fit a layer of the adapter; most fit none."""
    kinds = [kind for kind in ("rank_pattern", "alpha_pattern") if config.get(kind)]
    if not kinds:
        return []
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            layers = {name.rsplit(".lora_", 1)[0] for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {folder}: {WEIGHTS} cannot be read ({error})") from error
    return [kind for kind in kinds if any(re.search(f"{p}$", layer) for p in config[kind] for layer in layers)]


def _short(model: str) -> str:
    """Return a model's name without its owner or folder: a local copy is the same model."""
    return Path(model.rstrip("/")).name.lower()
