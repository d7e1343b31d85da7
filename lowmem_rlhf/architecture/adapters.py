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
from lowmem_rlhf.architecture.adapter_files import (
    CONFIG,
    HEAD,
    WEIGHTS,
    check_fields,
    check_ranks,
    is_scale,
    tensors_of,
)
from lowmem_rlhf.architecture.families.wrappers import text_key
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.paths import local_path, obstacle
from lowmem_rlhf.run.checkpoints import STATE, check_adapter
from lowmem_rlhf.run.directory import ADAPTER, MODEL, RunDirectory
from lowmem_rlhf.run.proof import HASHES
from lowmem_rlhf.run.stages import first_stage, run_of, to_finish
from lowmem_rlhf.suggest import did_you_mean

# what peft can add to a low-rank product and this package does not compute
MORE = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "velora_config"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"),
)
# what peft can choose layers by besides their names
SOME_LAYERS = {
    "layers_to_transform": "the adapter is beside some layers only",
    "layer_replication": "the adapter is of a model with layers that are repeated",
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


def _instead_of_missing(reference: str) -> str:
    """Return what may be done about an adapter that is not there, to be put behind that."""
    if stage := first_stage(reference):
        return stage
    path = Path(reference).expanduser()
    near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", reference) and not path.parent.is_dir():
        fetch = f"fetch one of the Hub with `hf download {reference} --local-dir FOLDER` and give adapter=FOLDER"
        return f" here; give a run's folder or an adapter's, or {fetch}"
    return f"{near}; give a run's folder or one with {CONFIG} and {WEIGHTS}"


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
        reference: a run directory, a checkpoint or the folder itself.
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
    _check_kind(reference, folder, config, model, revision)
    base = str(config.get("base_model_name_or_path") or "")
    check_adapter_base(reference, folder, base, config.get("revision"), model, revision)
    target = config.get("target_modules") or "all-linear"
    if not isinstance(target, str):  # peft lists what it would have taken, also what was excluded
        target = sorted(name for name in target if name.rsplit(".", 1)[-1] not in (config.get("exclude_modules") or ()))
    layers = _layer_names(folder)
    if {text_key(name) for name in layers} != layers:  # the whole model's names, of a base for images or sound
        target = sorted({text_key(name).removeprefix("base_model.model.") for name in layers})
    r, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1 or not is_scale(alpha):
        raise UserError(
            f"adapter {reference!r}: {CONFIG} must have a whole number above 0 as r and a number above 0 as lora_alpha "
            f"(finite); got {r!r} and {alpha!r}"
        )
    check_ranks(reference, folder, r)
    if (folder / HEAD).is_file():
        tensors_of(folder, HEAD)
    return SavedAdapter(
        folder=folder,
        r=r,
        lora_alpha=float(alpha),  # type: ignore[arg-type]
        target_modules=target,
        use_rslora=bool(config.get("use_rslora")),
        base=base,
        head=folder / HEAD if (folder / HEAD).is_file() else None,
    )


def _check_kind(reference: str, folder: Path, config: dict[str, Any], model: str, revision: str | None) -> None:
    """Check that an adapter is one low-rank product of one shape beside every layer that it names.

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
    more = [name for name in MORE if config.get(name)] or _patterns(config, folder)
    if (config.get("bias") or "none") != "none":
        more.append("bias")
    if more:
        raise UserError(
            f"adapter {reference!r} has {more[0]}, more than a low-rank product of one shape; it cannot be used"
        )
    targets = config.get("target_modules") or ()
    beside = [name for name in targets if name.rsplit(".", 1)[-1] in OUTSIDE] if not isinstance(targets, str) else []
    if beside:
        raise UserError(
            f"adapter {reference!r} is beside {beside[0]} too; here only linear layers inside the model carry one: "
            "train one without it, or merge it into its base (peft's merge_and_unload) and give that as the model"
        )
    for name, why in SOME_LAYERS.items():
        if (value := config.get(name)) not in (None, [], "") and not _is_every_layer(value, model, revision):
            raise UserError(
                f"adapter {reference!r}: {name} is not supported ({value}): {why}, and here every layer of a kind "
                "carries one; train one without it, or merge it into its base (peft's merge_and_unload) and give that "
                "as the model"
            )


def _is_every_layer(value: Any, model: str, revision: str | None) -> bool:
    """Whether a choice of layers by their numbers is all of them."""
    if not isinstance(value, list):
        return isinstance(value, str)  # a name for the list of layers, which chooses nothing by itself
    try:
        return set(range(model_dimensions(model, revision).num_layers)) <= {n for n in value if isinstance(n, int)}
    except UserError:
        return False


def _patterns(config: dict[str, Any], folder: Path) -> list[str]:
    """Return which of peft's patterns of other ranks and scalings fit a layer of the adapter; most fit none.

    The same goes for adapters of parameters without a linear layer: peft names them for whole families of models, and
    the adapter has some only where a layer in its file is none of the target modules.
    """
    kinds = [kind for kind in ("rank_pattern", "alpha_pattern") if config.get(kind)]
    parameters, targets = config.get("target_parameters"), config.get("target_modules")
    if not kinds and not parameters:
        return []
    layers = _layer_names(folder)
    fitting = [kind for kind in kinds if any(re.search(f"{p}$", layer) for p in config[kind] for layer in layers)]
    modules = {layer.removesuffix(".base_layer").rsplit(".", 1)[-1] for layer in layers}
    named = {name.rsplit(".", 1)[-1] for name in targets} if isinstance(targets, list) else modules
    return [*fitting, *(["target_parameters"] if parameters and modules - named else [])]


def _layer_names(folder: Path) -> set[str]:
    """Return the layers that an adapter's file has tensors of.

    Raises:
        UserError: it cannot be read.
    """
    return {name.rsplit(".lora_", 1)[0] for name in tensors_of(folder)}
