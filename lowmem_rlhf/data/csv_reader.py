"""CSV as RFC 4180 has it: every cell is a text. Only an empty cell without quotes is missing. No types are guessed."""

import csv
import io
import re
from collections.abc import Sequence

from lowmem_rlhf.data.text_files import BrokenFile, NoRows
from lowmem_rlhf.data.values import Row

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_SEP_LINE = re.compile(r'"?sep=(.)"?\r?(?:\n|$)', re.IGNORECASE)  # Excel's own first line
_LARGEST_BLOCK = 1 << 30  # bytes; Arrow counts a block in 32 bits
_END = "\x03end of the table\x03"


def read_csv(
    text: str, separator: str = ",", sure: bool = False, names: Sequence[str] | None = None, quote: str = '"'
) -> tuple[list[str], list[Row], str]:
    """Return the columns and rows of CSV text, and what is to be said about how it was read (or an empty text).

    Args:
        text: the whole file. Its first line that is not empty is the header, unless ``names`` are given.
        separator: what separates the cells.
        sure: whether it does in any case; otherwise a header without it that has another one of `SEPARATORS`, or
            Excel's first line ``sep=;``, is taken at its word.
        names: the columns of a file that has no header.
        quote: the character that quotes a cell.

    Raises:
        BrokenFile: a column without a name or with that of another, a row with too many or too few cells, a quote that
            is never closed, or text behind a cell's closing quote.
    """
    note, usual = "", separator
    separator, text, guessed = _separated(text, separator, sure)
    if guessed:
        note = f"its cells are separated by {SEPARATORS[separator]}s, not by {SEPARATORS[usual]}s"
    cells = _cells(text, separator, quote)
    _check_quotes(text, separator, quote, first=0 if names is None else 1)
    if names is None:
        if not cells or not cells[0]:
            raise NoRows("it has no rows")
        names, skipped = _header([column[0] for column in cells], [column[1:] for column in cells])
        cells = [column[1:] for column in cells][skipped:]
        if skipped:
            note = "; ".join(
                [*([note] if note else []), "its first column has no name, counts the rows and is left out"]
            )
    elif cells and len(cells) != len(names):
        raise BrokenFile(f"it has {len(cells)} columns, and its data set names {len(names)}")
    rows = [Row(dict(zip(names, row, strict=True)), number) for number, row in enumerate(zip(*cells, strict=True), 1)]
    return list(names), rows, note


def separator_of(text: str, separator: str = ",", sure: bool = False) -> str:
    """Return what separates the cells of CSV text, given its beginning; see `read_csv`."""
    return _separated(text, separator, sure)[0]


def _separated(text: str, separator: str, sure: bool) -> tuple[str, str, bool]:
    """Return the separator, the text behind Excel's first line, and whether the header has told it."""
    if found := _SEP_LINE.match(text):
        return found[1], text[found.end() :], False
    if not sure and (guessed := _guess(text, separator)) != separator:
        return guessed, text, True
    return separator, text, False


def _guess(text: str, separator: str) -> str:
    header = next((line for line in text.split("\n") if line.strip("\r ")), "")
    bare = re.sub(r'"[^"]*"', "", header)
    if separator in bare:
        return separator
    others = [other for other in SEPARATORS if other in bare]
    return max(others, key=bare.count) if others else separator


def _header(first: list[str | None], columns: list[list[str | None]]) -> tuple[list[str], int]:
    """Return the names of the columns, and how many columns at the left are left out: an index that pandas wrote."""
    skipped = 0
    if not first[0] and len(first) > 1 and columns[0] == [str(place) for place in range(len(columns[0]))]:
        skipped = 1
    names = []
    for number, name in enumerate(first[skipped:], skipped + 1):
        if not name:
            raise BrokenFile(f"column {number} has no name in its first line ({_shown(first)}); give each column one")
        if name in names:
            raise BrokenFile(f"two columns have the name {name!r}; give each column its own")
        names.append(name)
    return names, skipped


def _shown(cells: list[str | None]) -> str:
    line = " ".join(",".join(cell or "" for cell in cells).split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _check_quotes(text: str, separator: str, quote: str, first: int) -> None:
    """Check that a cell ends where its quote is closed: what follows would be read on, and the quotes be lost."""
    if quote not in text:
        return
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quotechar=quote, strict=True)
    number = first
    try:
        for line in lines:
            number += bool(line)
    except csv.Error as error:
        if "expected after" in str(error):
            raise BrokenFile(
                f"row {number} has a cell that begins with a quote and goes on behind the closing one; put the whole "
                "cell in quotes, and double those inside of it"
            ) from error


def _cells(text: str, separator: str, quote: str) -> list[list[str | None]]:
    """Return the columns, header included."""
    import pyarrow as pa
    import pyarrow.csv as arrow

    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quotechar=quote)
    width = len(next((line for line in lines if line), []))
    if not width:
        return []
    # A last row of our own tells whether the table before it was finished: an open quote would swallow it.
    content = f"{text}\n{separator.join([_END] * width)}\n".encode()
    bad: list[tuple[int, int, str]] = []

    def note_bad(row: "arrow.InvalidRow") -> str:
        bad.append((row.number, row.actual_columns, row.text))
        return "skip"

    try:
        table = arrow.read_csv(
            io.BytesIO(content),
            # One block: a row must not be longer than a block.
            read_options=arrow.ReadOptions(
                use_threads=False, block_size=min(len(content), _LARGEST_BLOCK), autogenerate_column_names=True
            ),
            parse_options=arrow.ParseOptions(
                delimiter=separator, quote_char=quote, newlines_in_values=True, invalid_row_handler=note_bad
            ),
            convert_options=arrow.ConvertOptions(
                column_types={f"f{place}": pa.string() for place in range(width)},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise BrokenFile(" ".join(str(error).split())) from error
    columns: list[list[str | None]] = [column.to_pylist() for column in table.columns]
    closed = columns[-1][-1] == _END
    if bad and (closed or len(bad) > 1 or _END not in bad[0][2]):
        number, cells, _ = bad[0]
        raise BrokenFile(
            f"row {number - 1} has {cells} cell{'s' if cells > 1 else ''}, and the header {len(columns)}; a cell that "
            f"holds a {SEPARATORS.get(separator, repr(separator))} or a line break must stand in quotes, and a quote "
            "inside of it is doubled"
        )
    if not closed:
        last = bad[0][0] if bad else len(columns[0])
        raise BrokenFile(f"the quote that opens in row {max(last - 1, 1)} is never closed; close it, or double it")
    return [column[:-1] for column in columns]
