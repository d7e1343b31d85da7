"""Adapters that other runs made: finding them, and refusing those that cannot lie on a shared base.

A role's adapter must leave the base as it is, since every other role is on the same weights: adapters that came with
changed weights (PiSSA, OLoRA, LoftQ, ...) are refused, and those that are more than a low-rank product beside a layer.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.adapter_base import check_adapter_base
from lowmem_rlhf.architecture.adapter_files import CONFIG, HEAD, WEIGHTS, check_fields, other_tensors, tensors_of
from lowmem_rlhf.architecture.adapter_shape import layers_of, saved_shape
from lowmem_rlhf.architecture.hub import cached_adapter, fetch_adapter
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.paths import local_path, obstacle
from lowmem_rlhf.recipe.lora_shape import LoraShape
from lowmem_rlhf.run.checkpoints import STATE, check_adapter
from lowmem_rlhf.run.directory import ADAPTER, MODEL, RunDirectory
from lowmem_rlhf.run.proof import HASHES
from lowmem_rlhf.run.stages import first_stage, run_of, to_finish
from lowmem_rlhf.suggest import did_you_mean

# what peft can add to a low-rank product, and why it cannot lie on a base that all roles share
MERGE = "merge it into its base (peft's merge_and_unload) and give that as the model"
_MORE_THAN = f"more than a low-rank product beside a linear layer; {MERGE}"
MORE = {
    "use_dora": "which scales each row of a whole weight to a length of its own: no product of low rank, which does "
    f"not add up with another role's adapter; {MERGE}",
    "modules_to_save": "whole weights that were trained in place of the base's; here the base is one for all roles, "
    f"frozen, and its memory is planned as such; {MERGE}",
    **dict.fromkeys(("lora_bias", "trainable_token_indices", "velora_config", "alora_invocation_tokens"), _MORE_THAN),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"), _MORE_THAN),
}
# names of token embeddings and output heads
OUTSIDE = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
# values of init_lora_weights, besides true and false, that leave the base as it is
PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk, in peft's format.

    Attributes:
        folder: where its files are.
        shape: what it is beside, its ranks and how it is scaled.
        base: the model it was trained on, as it was named then.
        head: the file of the value or score head beside it, if there is one.
    """

    folder: Path
    shape: LoraShape
    base: str
    head: Path | None


def adapter_folder(reference: str, fetch: bool = True) -> Path:
    """Return the folder with an adapter's files for a run directory, a checkpoint, the folder itself or a Hub id.

    What is in the Hub's cache on this machine is taken from there.

    Args:
        fetch: what is not there either is fetched.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = local_path(reference)
    if why := obstacle(path):
        raise UserError(f"adapter {reference!r} {why}; give a run's folder or an adapter's")
    for folder in (path / ADAPTER, path):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            check_adapter(folder, f"put that file back; a folder without {HASHES} and {STATE} is taken as it is")
            return folder
    if not path.exists():
        if _is_hub_id(reference):
            if cached := cached_adapter(reference):
                return cached
            if not fetch:
                raise UserError(f"adapter {reference!r} is not on this machine; it is fetched from the Hub then")
            return fetch_adapter(reference)
        raise UserError(f"adapter {reference!r} does not exist{_instead_of_missing(reference)}")
    if path.is_file():
        raise UserError(f"adapter {reference!r} is a file; give the folder that it lies in, adapter={path.parent}")
    if run_of(path):
        if (path / MODEL).is_dir():
            raise UserError(
                f"adapter {reference!r} is a classifier's run, which has no adapter; a reward of the kind classifier "
                f"takes {path / MODEL} as its model"
            )
        latest = RunDirectory(path).latest_checkpoint()
        other = f", or take its checkpoint {latest[1]}" if latest else ""
        raise UserError(f"adapter {reference!r} is a run without a finished adapter; {to_finish(path)}{other}")
    raise UserError(f"adapter {reference!r} {_what_is_there(path)}")


def _is_hub_id(reference: str) -> bool:
    """Whether what is not here may be on the Hub: no folder of that name is begun, and no recipe makes it."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", reference)
    return bool(looks) and not reference.startswith("runs/") and not local_path(reference).parent.is_dir()


def _instead_of_missing(reference: str) -> str:
    """Return what may be done about an adapter that is not there, to be put behind that."""
    if stage := first_stage(reference):
        return stage
    path = Path(reference).expanduser()
    near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    return f"{near}; give a run's folder, one with {CONFIG} and {WEIGHTS}, or a Hub id (org/name)"


def _what_is_there(path: Path) -> str:
    """Return what a folder that is no adapter holds, and what to do."""
    has = {name for name in (CONFIG, WEIGHTS, "adapter_model.bin", "config.json") if (path / name).is_file()}
    if WEIGHTS in has:
        return f"holds {WEIGHTS} without its {CONFIG}, which says how the weights are scaled; copy that file there too"
    if "adapter_model.bin" in has:
        return (
            "holds adapter_model.bin, which can only be read by unpickling it; where you trust it, convert it to "
            f"{WEIGHTS}: load it with peft (PeftModel.from_pretrained) and save_pretrained it into a new folder"
        )
    if CONFIG in has:
        return f"holds {CONFIG} without its {WEIGHTS}; copy that file there too"
    if "config.json" in has:
        return f"is a whole model, not an adapter; give it as the model (model={path}) and leave adapter out"
    inside = [p.parent for p in sorted(path.glob(f"*/{CONFIG}")) if (p.parent / WEIGHTS).is_file()]
    hint = f"; did you mean adapter={inside[-1]}?" if inside else ""
    return f"holds no {CONFIG} with {WEIGHTS}; give a run's folder or an adapter's{hint}"


def saved_adapter(reference: str, model: str, revision: str | None = None) -> SavedAdapter:
    """Read what a saved adapter is, and check that it can lie on this model's base.

    Args:
        reference: a run directory, a checkpoint, the folder itself or a Hub id.
        model: as in a recipe; what it was trained on is told by the content of its files where that is known.
        revision: of a model on the Hub.

    Raises:
        UserError: there is none, it belongs to another base, or it is not an adapter beside unchanged weights.
    """
    folder = adapter_folder(reference)
    try:
        config: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"adapter {reference!r}: {CONFIG} cannot be read ({error})") from error
    check_fields(reference, config)
    _check_kind(reference, folder, config)
    base = str(config.get("base_model_name_or_path") or "")
    check_adapter_base(reference, folder, base, config.get("revision"), model, revision)
    shape = saved_shape(reference, folder, config)
    if (folder / HEAD).is_file():
        tensors_of(folder, HEAD)
    return SavedAdapter(folder, shape, base, folder / HEAD if (folder / HEAD).is_file() else None)


def _check_kind(reference: str, folder: Path, config: dict[str, Any]) -> None:
    """Check that an adapter is a low-rank product beside linear layers of an unchanged base, and nothing else.

    Raises:
        UserError: it is not.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"adapter {reference!r} is of kind {config.get('peft_type')}; only LoRA adapters can be continued"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise UserError(
            f"adapter {reference!r} began as {start}, which changes the base's weights, so that the base without it is "
            "no reference; train one with the usual start (init_lora_weights=true)"
        )
    if more := next((name for name in MORE if config.get(name)), None):
        raise UserError(f"adapter {reference!r} has {more}, {MORE[more]}")
    if (bias := config.get("bias") or "none") != "none" and (other := other_tensors(folder)):
        raise UserError(
            f"adapter {reference!r} has bias={bias}, and with it {other[0]}: the base's own biases were trained, which "
            f"all roles share; {MERGE}"
        )
    if parameters := _of_parameters(config, folder):
        raise UserError(f"adapter {reference!r} has target_parameters ({', '.join(parameters)}), {_MORE_THAN}")
    targets = config.get("target_modules") or ()
    beside = [name for name in targets if name.rsplit(".", 1)[-1] in OUTSIDE] if not isinstance(targets, str) else []
    if beside:
        raise UserError(
            f"adapter {reference!r} is beside {beside[0]} too; here only linear layers inside the model carry one: "
            "train one without it, or merge it into its base (peft's merge_and_unload) and give that as the model"
        )
    if repeated := config.get("layer_replication"):
        raise UserError(
            f"adapter {reference!r}: layer_replication is not supported ({repeated}): it is of a model with repeated "
            f"layers; {MERGE}"
        )


def _of_parameters(config: dict[str, Any], folder: Path) -> list[str]:
    """Return what an adapter has beside parameters without a linear layer.

    peft names these for whole families of models, and the adapter has some only where a layer in its file is none of
    the target modules.
    """
    targets = config.get("target_modules")
    if not config.get("target_parameters") or not isinstance(targets, list):
        return []
    modules = {layer.removesuffix(".base_layer").rsplit(".", 1)[-1] for layer in layers_of(folder)}
    return sorted(modules - {name.rsplit(".", 1)[-1] for name in targets})
