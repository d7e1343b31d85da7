"""Code that a run names, and whether it may be executed: a run from elsewhere is data until its user says otherwise.

A recipe names Python files (rewards, losses, an algorithm), and ``trust_remote_code`` a model's own code. `train` notes
in the user's state folder, for the run's id, the SHA-256 of each; whoever opens the run later is asked unless that note
holds what would be executed. No torch here.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import atomic_write, dumps
from lowmem_rlhf.paths import local_path
from lowmem_rlhf.progress import message
from lowmem_rlhf.run.start import run_id, start_folder
from lowmem_rlhf.user_code import find_file

STATE = "LOWMEM_RLHF_STATE"  # environment variable: the state folder, in place of the platform's
_TEXTS = ("name", "description", "system", "template")  # keys whose values are never paths
_noted: dict[str, dict[str, str]] = {}  # of this process, where the state folder cannot be written


@dataclass(frozen=True)
class Code:
    """Code that opening a run would execute.

    Attributes:
        key: the recipe's key that names it.
        name: a file's path, or a model.
        sha256: of the file and of the files beside it that it imports; of a model on the Hub, of its name.
    """

    key: str
    name: str
    sha256: str


def check_code(run: Path, values: Mapping[str, Any], resumed: bool = False) -> None:
    """Check that the code that a run's values name may be executed.

    Args:
        run: the run directory.
        values: of its recipe, or those of them that are about to be used.
        resumed: its user trains it on: a file that was changed in its place is what he means.

    Raises:
        UserError: it was not trained here with this code, and nobody has said that it is trusted.
    """
    named = code_of(run, values)
    if not named:
        return
    notes = [_read(key) for key in _keys(run)]
    allowed = {sha for noted in notes for sha in noted}
    own = set(notes[0].values()) if resumed and run_id(run) else set()
    strange = [one for one in named if one.sha256 not in allowed and one.name not in own]
    if not strange:
        return
    what = " and ".join(f"{one.name} ({one.key})" for one in strange)
    remedy = (
        "look at it, and if you trust it give --trust-run (train --resume, eval, chat, export), or "
        "lm.open_run(PATH, trust=True)"
    )
    if run_id(run) and notes[0]:
        raise UserError(f"{what} has changed since the run in {run} was trained, and would be executed; {remedy}")
    raise UserError(
        f"the run in {run} was not trained by you on this machine, and its recipe names code that would be executed: "
        f"{what}; {remedy}"
    )


def trust_code(run: Path, values: Mapping[str, Any]) -> None:
    """Note that the code that a run's recipe names, as it is now, may be executed for this run."""
    named = code_of(run, values)
    if not named:
        return
    for key in _keys(run):
        _noted[key] = {**_read(key), **{one.sha256: one.name for one in named}}
    try:
        folder = state_folder() / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        for key in _keys(run):
            content = {"run": str(run.resolve()), "code": _noted[key]}
            atomic_write(folder / f"{key}.json", dumps(content, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        message(
            f"note: that this run's code is yours could not be noted ({error}); eval, chat and export will ask for "
            f"--trust-run. {STATE} names another folder for it"
        )


def state_folder() -> Path:
    """Return the folder in which this package keeps what it knows of its user's runs; it need not exist.

    Raises:
        RuntimeError: this user has no home folder.
    """
    if named := os.environ.get(STATE):
        return Path(named)
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "lowmem_rlhf"
    above = os.environ.get("XDG_STATE_HOME")
    return (Path(above) if above else Path.home() / ".local" / "state") / "lowmem_rlhf"


def code_of(run: Path, values: Mapping[str, Any]) -> list[Code]:
    """Return the code that the values of a run's recipe name, as far as it is there."""
    start = start_folder(run)
    folders = [*([start] if start else []), Path()]
    named = []
    for key, source in _files(values, ""):
        for spelled in dict.fromkeys((source, source.replace("\\", "/"))):
            if path := find_file(spelled, folders):
                named.append(Code(key, str(path), _digest(_with_neighbours(path))))
    if values.get("trust_remote_code") not in (None, False):  # YAML's "yes" and 1 become true in the recipe
        named.append(_of_model(str(values.get("model")), str(values.get("revision")), folders))
    return list(dict.fromkeys(named))


def _files(values: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield by dotted key the files that values name as ``path.py:NAME``."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name not in _TEXTS:
                yield from _files(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _files(value, f"{key}[{index}]")
    elif isinstance(values, str) and ".py" in values:  # however it is spelled: what is no file is none
        for text in dict.fromkeys((values, values.strip())):
            yield key, text.rpartition(":")[0] or text
            yield key, text


def _of_model(model: str, revision: str, folders: list[Path]) -> Code:
    """Return a model's own code: the Python files of a local one, and its config, which may name others."""
    places = [path for folder in folders if (path := folder / local_path(model)).is_dir()]
    if not places:
        return Code("trust_remote_code", model, hashlib.sha256(f"{model}@{revision}".encode()).hexdigest())
    folder = places[0].resolve()
    return Code("trust_remote_code", str(folder), _digest([*sorted(folder.rglob("*.py")), folder / "config.json"]))


def _with_neighbours(path: Path) -> list[Path]:
    """Return a Python file and the files beside it that it imports, and those that these import."""
    found, ahead = [path], [path]
    while ahead:
        for name in _imported(ahead.pop()):
            beside = path.parent / name
            files = [beside.with_suffix(".py"), *(sorted(beside.rglob("*.py")) if beside.is_dir() else [])]
            new = [file for file in files if file.is_file() and file not in found]
            found += new
            ahead += new
    return [path, *sorted(found[1:])]


def _imported(path: Path) -> set[str]:
    """Return the first names of what a file imports."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return set()  # it cannot be imported either
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in whole | parts} - {""}


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{file.name} {len(content)}\n".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def _keys(run: Path) -> list[str]:
    """Return under which names notes of a run are kept: its id, where it has one, and a hash of where it lies.

    An export and a run of an older version have no id.
    """
    place = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:32]
    return [*([known] if (known := run_id(run)) else []), place]


def _read(key: str) -> dict[str, str]:
    """Return what was noted under a name: the names of code by their SHA-256."""
    try:
        noted = json.loads((state_folder() / "runs" / f"{key}.json").read_text(encoding="utf-8"))["code"]
        return {**_noted.get(key, {}), **{str(sha): str(name) for sha, name in noted.items()}}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return dict(_noted.get(key, {}))
