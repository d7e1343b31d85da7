"""The rows of a source, in memory or in Arrow: their number, their columns, and any of them by place."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.data.values import Row

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


class Table(ABC):
    """Rows by place, from 0. ``origins`` names what they come from: resolved paths, or a split of the Hub."""

    column_names: list[str]
    origins: frozenset[str] = frozenset()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def rows(self, places: Iterable[int]) -> list[Row]:
        """Return the rows at places, in that order."""

    @abstractmethod
    def parts(self, columns: Sequence[str]) -> Iterable[Mapping[str, Any]]:
        """Return every row with at least the columns named (or, of a dotted name, the column that it lies in)."""

    def pieces(self) -> list[tuple[frozenset[str], range]]:
        """Return where the rows come from: origins, and the places there, from 0."""
        return [(self.origins, range(len(self)))]

    def shares_rows(self, other: "Table") -> bool:
        """Whether a row of this table is one of another: of one origin, at one place."""
        return any(
            mine & theirs and max(here.start, there.start) < min(here.stop, there.stop)
            for mine, here in self.pieces()
            for theirs, there in other.pieces()
        )

    def __iter__(self) -> Iterator[Row]:
        """Go through all rows."""
        return iter(self.rows(range(len(self))))


class RowTable(Table):
    """Rows held as Python values."""

    def __init__(
        self, rows: list[Row], column_names: list[str] | None = None, origins: frozenset[str] = frozenset()
    ) -> None:
        """Keep the rows; without names the columns are all keys, in order of appearance."""
        self._rows = rows
        self.column_names = (
            list(dict.fromkeys(key for row in rows for key in row)) if column_names is None else column_names
        )
        self.origins = origins

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def rows(self, places: Iterable[int]) -> list[Row]:
        """Return the rows at places, in that order."""
        return [self._rows[place] for place in places]

    def parts(self, columns: Sequence[str]) -> Iterable[Mapping[str, Any]]:
        """Return every row."""
        return self._rows


class DatasetTable(Table):
    """Rows of a `datasets.Dataset`, made into Python values when they are asked for."""

    def __init__(self, dataset: "Dataset", origins: frozenset[str] = frozenset()) -> None:
        """Keep the data set; its rows are numbered from 1."""
        self._dataset = dataset
        self.column_names = dataset.column_names
        self.origins = origins

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    def rows(self, places: Iterable[int]) -> list[Row]:
        """Return the rows at places, in that order."""
        chosen = list(places)
        return [Row(values, place + 1) for place, values in zip(chosen, self._dataset.select(chosen), strict=True)]

    def parts(self, columns: Sequence[str]) -> Iterable[Mapping[str, Any]]:
        """Return every row with the columns named."""
        return self._dataset.select_columns(_whole(columns, self.column_names))


class ArrowTable(Table):
    """Rows of an Arrow table in memory, made into Python values when they are asked for."""

    def __init__(self, table: "pa.Table", origins: frozenset[str] = frozenset()) -> None:
        """Keep the table; its rows are numbered from 1."""
        self._table = table
        self.column_names = table.column_names
        self.origins = origins

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def rows(self, places: Iterable[int]) -> list[Row]:
        """Return the rows at places, in that order."""
        chosen = list(places)
        selected = self._table.take(chosen) if chosen else self._table.slice(0, 0)
        values = selected.to_pylist(maps_as_pydicts="lossy")
        return [Row(one, place + 1) for place, one in zip(chosen, values, strict=True)]

    def parts(self, columns: Sequence[str]) -> Iterable[Mapping[str, Any]]:
        """Return every row with the columns named."""
        return self._table.select(_whole(columns, self.column_names)).to_pylist(maps_as_pydicts="lossy")


class JoinedTable(Table):
    """Parts of tables, one after another; each row keeps the number that it has in its own table."""

    def __init__(self, pieces: Sequence[tuple[Table, range]]) -> None:
        """Keep (table, places) pairs."""
        self._places = [(table, place) for table, places in pieces for place in places]
        self._tables = [table for table, _ in pieces]
        self.column_names = list(dict.fromkeys(name for table in self._tables for name in table.column_names))
        self._pieces = [(table.origins, places) for table, places in pieces]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._places)

    def pieces(self) -> list[tuple[frozenset[str], range]]:
        """Return where the rows come from."""
        return self._pieces

    def rows(self, places: Iterable[int]) -> list[Row]:
        """Return the rows at places, in that order."""
        chosen = [self._places[place] for place in places]
        by_place: dict[tuple[int, int], Row] = {}
        for table in {id(table): table for table, _ in chosen}.values():
            wanted = [place for owner, place in chosen if owner is table]
            by_place.update(((id(table), place), row) for place, row in zip(wanted, table.rows(wanted), strict=True))
        return [by_place[id(table), place] for table, place in chosen]

    def parts(self, columns: Sequence[str]) -> Iterable[Mapping[str, Any]]:
        """Return every row."""
        return self.rows(range(len(self)))


def _whole(columns: Sequence[str], there: Sequence[str]) -> list[str]:
    """Return the columns that names, dotted perhaps, lie in."""
    return list(dict.fromkeys(name if name in there else name.split(".")[0] for name in columns))
