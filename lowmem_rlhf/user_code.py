"""The user's own code, named as ``path.py:NAME``: rewards, losses and algorithms. The file is executed."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.suggest import did_you_mean

_modules: dict[tuple[Path, int, int], ModuleType] = {}  # by path, time of the last change and size


def is_user_code(name: str) -> bool:
    """Whether a name is meant as a path and not as one of this package's own."""
    return ".py" in name or ":" in name


def split_reference(reference: str, key: str, form: str, what: str) -> tuple[str, str]:
    """Return the file and the name in it.

    Args:
        reference: ``path.py:NAME``.
        key: the recipe's key that names it, for messages; so everywhere below.
        form: how it is written, such as ``path.py:function``.
        what: what it is, such as ``a function``.

    Raises:
        UserError: it is not written so.
    """
    source, _, name = reference.rpartition(":")
    if not source.endswith(".py") or not name.isidentifier():
        raise UserError(f"{key}: got {reference!r}; {what} of your own is written {form}")
    return source, name


def find_file(source: str, folders: Iterable[Path] = (Path(),)) -> Path | None:
    """Return the first file of this path, relative to one of the folders; None without one."""
    places = (folder / Path(source).expanduser() for folder in folders)
    return next((place.resolve() for place in places if place.is_file()), None)


def no_file(source: str, key: str) -> UserError:
    """Return the error that says that the file is absent."""
    return UserError(f"{key}: there is no file {source}; give its path from the current folder")


def import_file(path: Path, source: str, key: str) -> ModuleType:
    """Return a file's module: the same one for all that name it, as long as the file does not change.

    A file may import its neighbours, as a script can.

    Args:
        path: absolute.
        source: the path as the recipe has it, for messages.

    Raises:
        UserError: it fails; the message names the line.
    """
    state = path.stat()
    version = (path, state.st_mtime_ns, state.st_size)
    if version in _modules:
        return _modules[version]
    name = f"lowmem_rlhf_user_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = line_in(error, source, path)
        place = source if line is None else f"{source}, line {line},"
        raise UserError(f"{key}: {place} cannot be imported: {describe(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    _modules[version] = module
    return module


def member(module: ModuleType, name: str, source: str, key: str, alike: Iterable[str], kind: str) -> Any:
    """Return what a module has under a name.

    Args:
        alike: the names in it that could have been meant, for messages.
        kind: what they are, such as ``function``.

    Raises:
        UserError: it has nothing of that name.
    """
    if not hasattr(module, name):
        alike = list(alike)
        known = ", ".join(alike) or f"no {kind}"
        raise UserError(f"{key}: {source} defines no {name!r}{did_you_mean(name, alike)} (it has: {known})")
    return getattr(module, name)


def load_function(reference: str, key: str, kind: str, call: str) -> Callable[..., Any]:
    """Return the user's own function that a recipe names.

    Args:
        reference: ``path.py:function``.
        kind, call: what it should be, and how it is called, for messages.

    Raises:
        UserError: it is not written so; the file is absent or fails; or it has no such function.
    """
    source, name = split_reference(reference, key, "path.py:function", "a function")
    if (path := find_file(source)) is None:
        raise no_file(source, key)
    module = import_file(path, source, key)
    functions = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
    function = member(module, name, source, key, functions, "function")
    check_callable(function, reference, key, kind, call)
    return function  # type: ignore[no-any-return]  # it was checked


def check_callable(function: Any, name: str, key: str, kind: str, call: str) -> None:
    """Check that an object can be called as what ``kind`` says.

    Raises:
        UserError: it cannot.
    """
    if not callable(function) or inspect.isclass(function) or not _has_signature(function):
        given = "class" if inspect.isclass(function) else type(function).__name__
        article = "an" if given[0] in "aeiou" else "a"
        raise UserError(f"{key}: {name} is {article} {given}, not {kind}; name something that is called with {call}")


def line_in(error: BaseException, source: str, path: Path | None = None) -> int | None:
    """Return the line of a user's file in which an error arose: of the calls in that file the last; None without one.

    Args:
        source: the file, as a recipe names it; empty for none.
        path: where it lies; by default what ``source`` means in the current folder.
    """
    if not source:
        return None
    file = str(path or Path(source).expanduser().resolve())
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return lines[-1] if lines else None


def describe(error: BaseException) -> str:
    """Return an error of the user's code on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def file_of(function: Callable[..., Any]) -> str:
    """Return the file that a function stands in, for messages; empty where there is none, as in a notebook."""
    try:
        file = inspect.getsourcefile(function) or ""
    except TypeError:  # an object that is called
        return ""
    return file if Path(file).is_file() else ""


def _has_signature(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C
        return False
    return True
