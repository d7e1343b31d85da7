"""The algorithms by name: the package's, those that a program registers, and a user's own as ``path.py:SPEC``.

Loads without torch.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lowmem_rlhf.algorithms.classifier.spec import SPEC as CLASSIFIER
from lowmem_rlhf.algorithms.grpo.spec import SPEC as GRPO
from lowmem_rlhf.algorithms.ppo.spec import SPEC as PPO
from lowmem_rlhf.algorithms.reinforce_plus_plus.spec import SPEC as REINFORCE_PLUS_PLUS
from lowmem_rlhf.algorithms.reward_model.spec import SPEC as REWARD_MODEL
from lowmem_rlhf.algorithms.rloo.spec import SPEC as RLOO
from lowmem_rlhf.algorithms.sft.spec import SPEC as SFT
from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.algorithms.trl.spec import SPECS as TRL
from lowmem_rlhf.algorithms.trl.spec import check_name
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.suggest import did_you_mean, spelled

_SHIPPED = (GRPO, PPO, RLOO, REINFORCE_PLUS_PLUS, SFT, REWARD_MODEL, CLASSIFIER, *TRL)
DEFAULT = GRPO.name
_specs: dict[str, AlgorithmSpec] = {spec.name: spec for spec in _SHIPPED}
_written: dict[str, AlgorithmSpec] = {}  # a user's own, by what a recipe calls it: path.py:SPEC
_files: dict[tuple[Path, int], ModuleType] = {}  # by the time of their last change


def names() -> tuple[str, ...]:
    """Return the algorithms that a recipe may name."""
    return tuple(_specs)


def specs() -> tuple[AlgorithmSpec, ...]:
    """Return all of them."""
    return tuple(_specs.values())


def find_spec(name: Any) -> AlgorithmSpec | None:
    """Return the spec of an algorithm by what a recipe calls it; None for what no recipe of this process named."""
    return _written.get(str(name)) or _specs.get(str(name))


def spec_of(name: str) -> AlgorithmSpec:
    """Return the spec of an algorithm by what a recipe calls it.

    Raises:
        UserError: there is none.
    """
    if (found := find_spec(name)) is None:
        raise UserError(f"algorithm: {_unknown(name)}")
    return found


def register_algorithm(spec: AlgorithmSpec) -> None:
    """Make an algorithm known: recipes may name it, and have its section. One of the same name is replaced.

    Raises:
        UserError: the name is one of this package's own, or the section is a key of every recipe.
    """
    from lowmem_rlhf.recipe.schema import add_section

    if spec.name in {one.name for one in _SHIPPED}:
        raise UserError(f"algorithm: {spec.name!r} is one of this package's own; give the spec another name")
    shared = {one.section for one in _SHIPPED}
    if spec.settings is not None and spec.section not in shared:
        add_section(spec.section, spec.settings)
    elif spec.section not in shared:
        raise UserError(
            f"algorithm: the spec of {spec.name!r} has no settings for its section {spec.section!r}; give it a "
            f"Section, or the section of another algorithm ({', '.join(sorted(shared))})"
        )
    _specs[spec.name] = spec


def known(name: Any) -> str:
    """Return an algorithm's name as a recipe has it, which may be given in other capitals or as its title.

    Raises:
        ValueError: there is no such algorithm.
    """
    if isinstance(name, str):
        if known_own(name):
            return name.strip()
        titles = {spec.title.casefold(): spec.name for spec in specs()}
        name = titles.get(name.strip().casefold()) or spelled(name, names())
    if check_name(name) not in _specs:
        raise ValueError(_unknown(name))
    return str(name)


def _unknown(name: Any) -> str:
    *most, last = (repr(one) for one in names())
    hint = did_you_mean(name, names()) if isinstance(name, str) else ""
    return f"got {name!r}; it should be {', '.join(most)} or {last}{hint}"


def is_own(name: str) -> bool:
    """Whether a name is that of a user's own algorithm, written ``path.py:SPEC``."""
    return ".py" in name


def known_own(name: Any) -> bool:
    """Whether a name is a user's own; its file is loaded unless it was before.

    Raises:
        UserError: as `load_own`.
    """
    if not isinstance(name, str) or not is_own(name):
        return False
    if name.strip() not in _written:
        load_own(name.strip())
    return True


def load_own(written: str, run: Path | None = None) -> AlgorithmSpec:
    """Return a user's own algorithm, which recipes of this process may name from now on; its file is executed.

    Args:
        written: ``path.py:SPEC``.
        run: a run directory, whose paths are relative to the folder that it was started in.

    Raises:
        UserError: no such file, it cannot be imported, or it has no spec of that name.
    """
    source, _, name = written.rpartition(":")
    if not source.endswith(".py") or not name.isidentifier():
        raise UserError(f"algorithm: got {written!r}; an algorithm of your own is written path.py:SPEC")
    places = [folder / Path(source).expanduser() for folder in (*_start(run), Path())]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None and written in _written:  # the recipe was read in another folder
        return _written[written]
    if path is None:
        raise UserError(f"algorithm: there is no file {source}; give its path from the current folder")
    module = _module(path, source)
    own = [key for key, value in vars(module).items() if isinstance(value, AlgorithmSpec)]
    if not hasattr(module, name):
        raise UserError(
            f"algorithm: {source} defines no {name!r}{did_you_mean(name, own)} (it has: {', '.join(own) or 'no spec'})"
        )
    spec = getattr(module, name)
    if not isinstance(spec, AlgorithmSpec):
        raise UserError(f"algorithm: {written} is a {type(spec).__name__}, not an AlgorithmSpec")
    if _written.get(written) is not spec:
        register_algorithm(spec)
        _written[written] = spec
    return spec


def _start(run: Path | None) -> list[Path]:
    from lowmem_rlhf.run.start import start_folder

    start = start_folder(run) if run else None
    return [start] if start else []


def _module(path: Path, source: str) -> ModuleType:
    """Return a file's module; the same one as long as the file does not change."""
    key = (path, path.stat().st_mtime_ns)
    if key in _files:
        return _files[key]
    name = f"lowmem_rlhf_user_{path.stem}_{abs(hash(path))}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look a class's module up there
    sys.path.insert(0, str(path.parent))  # a file may import its neighbours, as a script can
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(f"algorithm: {source} cannot be imported: {type(error).__name__}: {reason}") from error
    finally:
        sys.path.remove(str(path.parent))
    _files[key] = module
    return module
