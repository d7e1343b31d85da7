"""The algorithms by name: the package's, those that a program registers, and a user's own as ``path.py:SPEC``.

Loads without torch.
"""

from pathlib import Path
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
from lowmem_rlhf.user_code import find_file, import_file, member, no_file, split_reference

_SHIPPED = (GRPO, PPO, RLOO, REINFORCE_PLUS_PLUS, SFT, REWARD_MODEL, CLASSIFIER, *TRL)
DEFAULT = GRPO.name
_specs: dict[str, AlgorithmSpec] = {spec.name: spec for spec in _SHIPPED}
_written: dict[str, AlgorithmSpec] = {}  # a user's own, by what a recipe calls it: path.py:SPEC


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
        UserError: no such file, it cannot be imported, or it has no spec of that name; or it is code of elsewhere
            (see `run.trust`).
    """
    source, name = split_reference(written, "algorithm", "path.py:SPEC", "an algorithm")
    path = find_file(source, (*_start(run), Path()))
    if run is not None:
        from lowmem_rlhf.run.trust import check_code

        check_code(run, {"algorithm": written})
    if path is None and written in _written:  # the recipe was read in another folder
        return _written[written]
    if path is None:
        raise no_file(source, "algorithm")
    module = import_file(path, source, "algorithm")
    own = [key for key, value in vars(module).items() if isinstance(value, AlgorithmSpec)]
    spec = member(module, name, source, "algorithm", own, "spec")
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
