"""Adapters and heads as files, copied beside or in place of weights."""

import json
import shutil
from pathlib import Path

from lowmem_rlhf.architecture.adapter_shape import saved_shape
from lowmem_rlhf.architecture.adapters import CONFIG, HEAD, WEIGHTS, adapter_folder
from lowmem_rlhf.architecture.families.wrappers import text_key, wrapper_name
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.export.local_paths import without_folders
from lowmem_rlhf.export.options import WRAPPER
from lowmem_rlhf.run.base_file import BASE

CRITIC, INITIAL = "critic", "start"  # folders of an exported adapter


def copy_heads(job: ExportJob, folder: Path) -> dict[str, list[str]]:
    """Copy the heads that were asked for: a reward model's beside its adapter, a critic's into a folder of its own.

    Returns:
        What export.json says of them.

    Raises:
        UserError: the run has none.
    """
    if not job.options.heads:
        return {}
    if (job.adapter / HEAD).is_file():
        shutil.copyfile(job.adapter / HEAD, folder / HEAD)
        return {"heads": [HEAD]}
    critic = job.adapter / CRITIC
    if not (critic / HEAD).is_file():
        raise UserError(f"--heads: the run in {job.run.path} trained no value or score head; leave it out")
    parts = {CRITIC: critic}
    if job.recipe.adapter and job.recipe.spec.critic(job.recipe) == "adapter":  # it lies above the initial one
        job.opened.check_initial_adapter()
        parts[INITIAL] = adapter_folder(job.recipe.adapter)
    copied = []
    for part, source in parts.items():
        copied += [f"{part}/{name}" for name in copy_adapter(source, folder / part, (WEIGHTS, CONFIG, HEAD))]
    return {"heads": copied}


def name_for(folder: Path, names: str, base_type: str) -> None:
    """Let an adapter's files carry the names of a class of its base, which is a model for images or sound.

    ``target_modules`` lists the adapted layers one by one: the towers for images have layers of the same last names.
    Where there are patterns of ranks and alphas, these do too: a pattern may begin with a name of the other class.

    Args:
        names: ``wrapper`` or ``text``.
        base_type: the base's model type.
    """
    from safetensors.torch import load_file, save_file

    start = "base_model.model."
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    shape = saved_shape(str(folder), folder, config)
    named = {text_key(name).removeprefix(start): x for name, x in load_file(folder / WEIGHTS, device="cpu").items()}
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in named})
    called = {layer: wrapper_name(layer, base_type) if names == WRAPPER else layer for layer in layers}
    if names == WRAPPER:
        named = {wrapper_name(name, base_type): tensor for name, tensor in named.items()}
    save_file({start + name: x.contiguous() for name, x in named.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    config |= {"target_modules": sorted(called.values()), "layers_to_transform": None, "exclude_modules": None}
    if config.get("rank_pattern"):
        config["rank_pattern"] = {to: shape.rank(layer) for layer, to in called.items()}
    if config.get("alpha_pattern"):
        config["alpha_pattern"] = {to: shape.alpha(layer) for layer, to in called.items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def copy_adapter(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy an adapter and the file that identifies its base; the base is named without a folder of this machine.

    Args:
        source, target: folders.
        names: of the files that are wanted.

    Returns:
        The names of those that were copied.
    """
    target.mkdir(exist_ok=True)
    copied = [name for name in names if (source / name).is_file()]
    for name in (*copied, *([BASE] if (source / BASE).is_file() else [])):
        shutil.copyfile(source / name, target / name)
    if CONFIG in copied:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        base = str(config.get("base_model_name_or_path") or "")
        if (local := without_folders({"model": base})[0]["model"]) != base:
            config["base_model_name_or_path"] = local
            (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return copied
