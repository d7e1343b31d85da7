"""Splits by name and by part: ``train``, ``train[:10%]``, ``train+test``; and the files that belong to none."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from lowmem_rlhf.data.table import JoinedTable, Table
from lowmem_rlhf.recipe.data_sources import FORMATS, ending

logger = logging.getLogger(__name__)


class _Lengths(Mapping[str, int]):
    """The number of rows of each split; a split is read when it is asked for."""

    def __init__(self, tables: Callable[[str], Table], names: list[str]) -> None:
        self._tables, self._names = tables, names

    def __getitem__(self, name: str) -> int:
        return len(self._tables(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)


def read_split(read: Callable[[str], Table], names: list[str], split: str) -> Table:
    """Return the rows of a split, or of what `datasets.ReadInstruction` makes of it.

    Args:
        read: reads a split by name.
        names: the splits there are.
        split: a name, or a specification of parts.

    Raises:
        ValueError: no such split, or nothing that can be understood.
    """
    import datasets

    known: dict[str, Table] = {}

    def table(name: str) -> Table:
        if name not in known:
            known[name] = read(name)
        return known[name]

    if split in names:
        return table(split)
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(_Lengths(table, names))
    return JoinedTable([(table(part.splitname), range(part.from_, part.to)) for part in parts])


@cache  # it is said once, however often the folder is read
def say_unread(folder: Path, read: tuple[str, ...], source: str) -> None:
    """Say which data files of a folder belong to no split: `datasets` takes those of one format, and of one place."""
    taken = {Path(file).resolve() for file in read}
    others = sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if ending(file.name) in FORMATS
        and file.resolve() not in taken
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        and file.name not in ("dataset_info.json", "dataset_infos.json")
    )
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        logger.warning("%s: data files that are in none of its splits are not read: %s", source, shown)
