"""Rows of one data file: jsonl, json, csv, tsv, parquet. What a file holds is bounded before it is in memory."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoft.config.schema import Limits
from zoft.errors import UserError
from zoft.limits import COLUMNS, READER_BYTES, READER_TIMES, at_most_memory, parse_json, shortened
from zoft.packages import install

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
CHUNK = 1 << 24  # bytes read at a time
Rows = list[tuple[str, dict[str, Any]]]  # (where it stands, column -> value)


def read_file(key: str, path: Path, limits: Limits, notes: list[str]) -> Rows:
    """Return the rows of a data file, by its suffix; a missing cell is None.

    key: the setting it comes from ("task.train"). notes: gets a line for each thing that was left out. Raises UserError
    that names the line, and the limit where one is passed.
    """
    kind = suffix(key, path)
    if kind == ".parquet":
        return _parquet(key, path, limits)
    if kind in (".csv", ".tsv"):
        return _csv(path, "\t" if kind == ".tsv" else ",", limits, notes)
    if kind == ".json":
        text = whole_text(path, limits)
        if (items := _json_items(path, text)) is not None:
            return _json(path, items, limits)
        return _jsonl(path, iter([text]), limits)
    return _jsonl(path, _texts(path, limits), limits)


def suffix(key: str, path: Path) -> str:
    """Return a data file's suffix, in lower case. Raises UserError for one that is not read."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        more = " (or give its folder: each .txt file is a text)" if kind == ".txt" else ""
        raise UserError(
            f"{key}={path}: unknown format {kind or '(no suffix)'}; use {', '.join(FORMATS)}{more}"
        )
    return kind


def whole_text(path: Path, limits: Limits) -> str:
    """Return the text of a UTF-8 file. Raises UserError."""
    return "".join(_texts(path, limits, whole=True))


def refuse_rows(place: Any, count: int, limits: Limits) -> None:
    """Raise UserError where there are more rows than limits.rows."""
    if count > limits.rows:
        raise UserError(
            f"{place}: more than limits.rows={limits.rows:,} rows; limits.rows=N reads up to N of them"
        )


def _refuse_bytes(path: Path, count: int, limits: Limits, what: str = "bytes") -> None:
    if count > limits.bytes:
        raise UserError(
            f"{path}: more than limits.bytes={limits.bytes:,} {what}; limits.bytes=N reads up to N of them"
        )


def _texts(path: Path, limits: Limits, whole: bool = False) -> Iterator[str]:
    """Yield a UTF-8 file's text in parts that end with a line, without the mark at its beginning.

    whole: as one part, of lines as long as they are.
    """
    line, total, rest = 1, 0, b""
    parts: list[bytes] = []
    most = 4 * limits.cell  # bytes of a character, times characters of a line
    try:
        with path.open("rb") as file:
            _refuse_bytes(path, os.fstat(file.fileno()).st_size, limits)
            while data := file.read(CHUNK):
                if total == 0:
                    _refuse_pointer(path, data)
                    data = data.removeprefix(codecs.BOM_UTF8)
                total += len(data)
                _refuse_bytes(path, total, limits)
                if whole:
                    parts.append(data)
                    continue
                end = data.rfind(b"\n") + 1
                if not end:
                    rest += data
                    if len(rest) > most:
                        _refuse_line(f"{path}:{line}", len(rest), limits)
                    continue
                text = _decoded(path, rest + data[:end], line)
                line += text.count("\n")
                yield text
                rest = data[end:]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if rest := b"".join(parts) if whole else rest:
        yield _decoded(path, rest, line)


def _refuse_line(where: str, length: int, limits: Limits) -> None:
    if length > limits.cell:
        raise UserError(
            f"{where}: {length / 1e6:.0f} million characters in one line, more than limits.cell={limits.cell:,}; a row is "
            "one example, and limits.cell=N reads longer ones"
        )


def _refuse_pointer(path: Path, data: bytes) -> None:
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}:1: a pointer of Git LFS, not the data; `git lfs pull` fetches them")


def _decoded(path: Path, data: bytes, line: int) -> str:
    """Return bytes that begin with this line of a file as text. Raises UserError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        marks = {
            b"\xff\xfe\0\0": "utf-32",
            b"\0\0\xfe\xff": "utf-32",
            b"\xff\xfe": "utf-16",
            b"\xfe\xff": "utf-16",
        }
        kind = next((name for mark, name in marks.items() if line == 1 and data.startswith(mark)), "latin1")
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
            f"convert it: iconv -f {kind} -t utf-8 {path.name} > new{path.suffix}"
        ) from None


def _jsonl(path: Path, texts: Iterator[str], limits: Limits) -> Rows:
    rows: Rows = []
    number = 0
    for text in texts:
        lines = text.split("\n")  # not splitlines: text may hold other line separators
        if text.endswith("\n"):
            lines.pop()
        if len(rows) + len(lines) > limits.rows:  # counted before they are parsed
            refuse_rows(path, len(rows) + sum(not x.isspace() for x in lines if x), limits)
        for number, line in enumerate(lines, number + 1):  # noqa: B020
            if line and not line.isspace():
                where = f"{path}:{number}"
                if len(line) > limits.cell:
                    _refuse_line(where, len(line), limits)
                rows.append((where, _object(where, line)))
                if len(rows) > limits.rows:
                    refuse_rows(path, len(rows), limits)
    return rows


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except json.JSONDecodeError as error:
        said = f"{error.msg} at column {error.colno}"
        raise UserError(f"{where}: bad JSON: {said}; give one object per line") from None
    except ValueError as error:  # a number of 5,000 digits, a name twice
        raise UserError(f"{where}: bad JSON: {error}; give one object per line") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: a {type(value).__name__}, not an object; write {{"column": value, …}}')
    return value


def _json_items(path: Path, text: str) -> list[Any] | None:
    """Return the items of a JSON list, or one object of several lines as the only one; None for an object a line."""
    one = not text.lstrip().startswith("[")
    if one and "\n" not in text.strip():
        return None
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if one:
            return None
        raise UserError(f"{path}:{error.lineno}: bad JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise UserError(f"{path}: bad JSON: {error}") from None
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else None


def _json(path: Path, items: list[Any], limits: Limits) -> Rows:
    refuse_rows(path, len(items), limits)
    for i, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{path}: item {i} is a {type(item).__name__}, not an object with columns")
        _refuse_cells(f"{path}: item {i}", item, limits)
    return [(f"{path}: item {i}", item) for i, item in enumerate(items, 1)]


def _refuse_cells(where: str, row: dict[str, Any], limits: Limits) -> None:
    for column, value in row.items():
        if isinstance(value, (str, bytes)) and len(value) > limits.cell:
            raise UserError(
                f"{where}: column {shortened(column)} holds {len(value):,} characters, more than limits.cell={limits.cell:,}; "
                "limits.cell=N reads longer ones"
            )


def _csv(path: Path, delimiter: str, limits: Limits, notes: list[str]) -> Rows:
    lines = (line for text in _texts(path, limits) for line in io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows: Rows = []
    header: list[str] = []
    nameless: list[int] = []
    filled: list[str] = []  # rows that have something in columns without a name
    start = 1
    limit = csv.field_size_limit(limits.cell)  # csv's own is 131,072: a cell may hold a whole document
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(where, [c.strip() for c in cells], delimiter)
                nameless = [i for i, name in enumerate(header) if not name]
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)}); "
                    f'quote cells that hold a {"tab" if delimiter != "," else "comma"}: "…"'
                )
            row = {c: v if v != "" else None for c, v in zip(header, cells)}
            if nameless:
                filled += [where] * any(cells[i].strip() for i in nameless)
                del row[""]
            rows.append((where, row))
            if len(rows) > limits.rows:
                refuse_rows(path, len(rows), limits)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: bad CSV: {error}{_cell_key(error)}") from None
    finally:
        csv.field_size_limit(limit)
    if nameless:
        what = "a column" if len(nameless) == 1 else f"{len(nameless)} columns"
        more = (
            f", though {len(filled):,} rows have something there (the first: {filled[0]})" if filled else ""
        )
        notes.append(f"{path}: {what} without a name left out{more}")
    return rows


def _cell_key(error: csv.Error) -> str:
    return "; limits.cell=N reads longer cells" if "field limit" in str(error) else ""


def _header(where: str, header: list[str], delimiter: str) -> list[str]:
    """Return the names of a table's columns, "" for one without. Raises UserError."""
    if len(header) > COLUMNS:
        raise UserError(f"{where}: a header of {len(header):,} columns; at most {COLUMNS:,} are read")
    if other := [c for c in ";\t|," if c != delimiter and len(header) == 1 and c in header[0]]:
        name = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
        raise UserError(
            f"{where}: its header is one column, {shortened(header[0])!r}: cells are parted by {name[delimiter]} here, not "
            f"by {name[other[0]]}; write it so" + (", or call it .tsv" if other[0] == "\t" else "")
        )
    if twice := [name for name, n in Counter(header).items() if n > 1 and name]:
        raise UserError(f"{where}: two columns are called {shortened(twice[0])!r}; rename one")
    if not any(header):
        raise UserError(f"{where}: its header names no column; the first line holds their names")
    return header


def _parquet(key: str, path: Path, limits: Limits) -> Rows:
    try:
        import pyarrow
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{key}={path}: reading parquet needs pyarrow: {install('pyarrow')}") from None
    pool = pyarrow.default_memory_pool()
    rows: Rows = []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _refuse_bytes(path, size, limits)
            _refuse_pointer(path, file.read(64))
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others reserve more than they use
        with at_most_memory(
            READER_BYTES + READER_TIMES * size,
            f"{path}: its {size:,} bytes unpack to more than {READER_TIMES} times as many; write it anew, or as .jsonl",
        ):
            table = parquet.ParquetFile(path, pre_buffer=False)
            about = table.metadata
            _refuse_table(path, about, size, table.schema_arrow.names, limits)
            for batch in table.iter_batches(1024, use_threads=False):
                for item in batch.to_pylist():
                    where = f"{path}: row {len(rows) + 1}"
                    _refuse_cells(where, item, limits)
                    rows.append((where, item))
    except MemoryError:
        raise
    except (ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise UserError(f"{path}: not a whole parquet file: {' '.join(str(error).split())[:160]}") from None
    finally:
        pyarrow.set_memory_pool(pool)
    if len(rows) != about.num_rows:
        raise UserError(
            f"{path}: not a whole parquet file: {len(rows):,} of {about.num_rows:,} rows are there"
        )
    return rows


def _refuse_table(path: Path, about: Any, size: int, names: list[str], limits: Limits) -> None:
    """Raise UserError for what a parquet file says of itself, before any of it is unpacked."""
    refuse_rows(path, about.num_rows, limits)
    if about.num_rows > size:
        raise UserError(
            f"{path}: {about.num_rows:,} rows in {size:,} bytes, so most of them are alike; keep one of each"
        )
    if about.num_columns > COLUMNS:
        raise UserError(f"{path}: {about.num_columns:,} columns; at most {COLUMNS:,} are read")
    unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    _refuse_bytes(path, unpacked, limits, "bytes unpacked")
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"{path}: two columns are called {shortened(twice[0])!r}; rename one")
