"""Rows from the user's own data: jsonl, json, csv, tsv, parquet files, folders of them or of texts, or the Hub."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.packages import install

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LINE_MAX = 10_000_000  # characters of a row
Rows = list[tuple[str, dict[str, Any]]]  # (where it stands, column -> value)


def read(key: str, place: str, subset: str | None = None, *, held_out: bool = False) -> Rows:
    """The rows of a file, of a folder's files, or of a Hub data set where no such file can be meant.

    key: the setting it comes from ("task.train"). place: a path, or a Hub id with an optional split
    ("stanfordnlp/sst2:validation"). subset: configuration of a Hub data set. held_out: without a split named,
    take the validation (else test) split of a folder or the Hub rather than train; [] if that has neither, but for
    a folder that task.eval names: its files.
    Returns (where, row) pairs, a missing cell being None. Errors: UserError naming the line and the fix.
    """
    path = Path(place).expanduser()
    if is_file(place) or is_folder(place):
        if subset:
            kind = "file" if is_file(place) else "folder"
            raise UserError(f"task.subset={subset}: {key}={place} is a {kind}; subsets are for Hub data sets")
        rows = _folder(key, path, held_out) if is_folder(place) else _file(key, path)
        if not rows and held_out and key == "task.train":
            return []
    elif _means_a_file(place, path):
        raise UserError(f"{key}={place}: {_why_no_file(path)}")
    else:
        return _hub(key, place, subset, held_out)
    if not rows:
        raise UserError(f"{key}={place}: there are no rows in it")
    return rows


def look(key: str, place: str) -> None:
    """Raise UserError for a file that is not there, cannot be read or is of no known format; a Hub id passes."""
    path = Path(place).expanduser()
    if is_folder(place):
        for file in _files(key, path):
            look(key, str(file)) if file.suffix.lower() != ".txt" else None
    elif is_file(place):
        _suffix(key, path)
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise UserError(f"{key}={place}: cannot be read: Permission denied")
    elif _means_a_file(place, path):
        raise UserError(f"{key}={place}: {_why_no_file(path)}")


def is_file(place: str) -> bool:
    return os.path.isfile(Path(place).expanduser())


def is_folder(place: str) -> bool:
    return os.path.isdir(Path(place).expanduser())


def _files(key: str, folder: Path) -> list[Path]:
    """The data files of a folder, by name: all of one kind, .txt or any of FORMATS."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{key}={folder}: cannot be read: {error.strerror}") from None
    if "config.json" in names:
        raise UserError(f"{key}={folder}: is a folder of a model, not of data")
    found = [folder / n for n in names if not n.startswith(".") and os.path.isfile(folder / n)]
    texts = [f for f in found if f.suffix.lower() == ".txt"]
    tables = [f for f in found if f.suffix.lower() in FORMATS]
    if texts and tables:
        raise UserError(
            f"{key}={folder}: is a folder of both {texts[0].name} and {tables[0].name}; give one kind a folder"
        )
    if not texts and not tables:
        raise UserError(f"{key}={folder}: is a folder without data files ({', '.join(FORMATS)}, .txt)")
    return texts or tables


def _folder(key: str, folder: Path, held_out: bool) -> Rows:
    files = _files(key, folder)
    chosen = _split(files, held_out)
    if not chosen and key == "task.eval":  # a folder for evaluation alone
        chosen = [f for f in files if not SPLIT.fullmatch(f.stem)]
    rows: Rows = []
    for file in chosen:
        text = file.suffix.lower() == ".txt"
        rows += [(str(file), {"text": _decode(file)})] if text else _file(key, file)
    return rows


SPLIT = re.compile(r"(train|valid|validation|val|dev|eval|test)(?:[-_.]\d.*)?", re.I)
HELD = (("valid", "validation", "val", "dev", "eval"), ("test",))


def _split(files: list[Path], held_out: bool) -> list[Path]:
    """Those files of a folder that are its training or, else, its validation (else test) split, by their names.

    Where no name says train, all are for training.
    """
    named: dict[str, list[Path]] = {}
    for file in files:
        match = SPLIT.fullmatch(file.stem)
        named.setdefault(match[1].lower() if match else "", []).append(file)
    if not held_out:
        return named.get("train", files)
    held = ([f for name in names for f in named.get(name, [])] for names in HELD)
    return next((fs for fs in held if fs), [])


def _means_a_file(place: str, path: Path) -> bool:
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:\w+)?", place)
    return path.suffix.lower() in FORMATS or not hub_id


def _why_no_file(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f"no such file: there is no folder {path.parent}"
    try:
        # Without their endings, which all are alike by.
        stems = {Path(name).stem: name for name in sorted(os.listdir(path.parent))}
        close = difflib.get_close_matches(path.stem, list(stems), n=1)
        return "no such file" + (f"; did you mean {path.parent / stems[close[0]]}?" if close else "")
    except OSError as error:
        return f"no such file that can be seen: {error.strerror}"


def _file(key: str, path: Path) -> Rows:
    kind = _suffix(key, path)
    if kind == ".parquet":
        return _parquet(key, path)
    text = _decode(path)
    if kind in (".csv", ".tsv"):
        return _csv(path, text, "\t" if kind == ".tsv" else ",")
    if kind == ".json" and (text.lstrip().startswith("[") or _is_one_object(text)):
        return _json(path, text)
    return _jsonl(path, text)


def _is_one_object(text: str) -> bool:
    """Whether a text is one JSON object of several lines, as objects a line are not."""
    try:
        return "\n" in text.strip() and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _suffix(key: str, path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in FORMATS:
        more = " (or give its folder: each .txt file is a text)" if kind == ".txt" else ""
        raise UserError(
            f"{key}={path}: unknown format {kind or '(no suffix)'}; use {', '.join(FORMATS)}{more}"
        )
    return kind


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        marks = {
            b"\xff\xfe\0\0": "utf-32",
            b"\0\0\xfe\xff": "utf-32",
            b"\xff\xfe": "utf-16",
            b"\xfe\xff": "utf-16",
        }
        kind = next((name for mark, name in marks.items() if raw.startswith(mark)), "latin1")
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); "
            f"convert it: iconv -f {kind} -t utf-8 {path.name} > new{path.suffix}"
        ) from None


def _jsonl(path: Path, text: str) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: text may hold other line separators
        if line.strip():
            rows.append((f"{path}:{number}", _object(f"{path}:{number}", line)))
    return rows


def _object(where: str, line: str) -> dict[str, Any]:
    if len(line) > LINE_MAX:
        raise UserError(
            f"{where}: {len(line) / 1e6:.0f} million characters in one line; a row is one example"
        )
    try:
        value = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        said = f"{error.msg} at column {error.colno}"
        raise UserError(f"{where}: bad JSON: {said}; one object a line is wanted") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a name twice
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: bad JSON: {said}; one object a line is wanted") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: a {type(value).__name__}, not an object; write {{"column": value, …}}')
    return value


def _json(path: Path, text: str) -> Rows:
    try:
        items = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: bad JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: bad JSON: {said}") from None
    items = [items] if isinstance(items, dict) else items
    for i, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{path}: item {i} is a {type(item).__name__}, not an object with columns")
    return [(f"{path}: item {i}", item) for i, item in enumerate(items, 1)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that comes twice JSON would silently keep the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return made


def _csv(path: Path, text: str, delimiter: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Rows = []
    header: list[str] = []
    start = 1
    limit = csv.field_size_limit(LINE_MAX)  # csv's own is 131,072: a cell may hold a whole document
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [c.strip() for c in cells]
                if other := [c for c in ";\t|," if c != delimiter and len(header) == 1 and c in header[0]]:
                    name = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
                    raise UserError(
                        f"{where}: its header is one column, {header[0]!r}: cells are parted by {name[delimiter]} here, not "
                        f"by {name[other[0]]}; write it so"
                        + (", or call it .tsv" if other[0] == "\t" else "")
                    )
                if twice := [c for c in header if header.count(c) > 1]:
                    raise UserError(f"{where}: two columns are called {twice[0]!r}; rename one")
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)}); "
                    f'quote cells that hold a {"tab" if delimiter != "," else "comma"}: "…"'
                )
            rows.append((where, {c: v if v != "" else None for c, v in zip(header, cells)}))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: bad CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet(key: str, path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{key}={path}: reading parquet needs pyarrow: {install('pyarrow')}") from None
    try:
        items = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a whole parquet file: {' '.join(str(error).split())[:160]}") from None
    return [(f"{path}: row {i}", item) for i, item in enumerate(items, 1)]


def _hub(key: str, place: str, subset: str | None, held_out: bool) -> Rows:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{key}={place}: no such file, and for a Hub data set the datasets package is needed: {install('datasets')}"
        ) from None
    name, _, split = place.partition(":")
    if name in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        raise UserError(
            f"{key}={place}: no such file; {name} is a reader of the datasets package, not a data set"
        )
    try:
        if not split:
            offered = datasets.get_dataset_split_names(name, subset)
            wanted = ("validation", "test") if held_out else ("train",)
            split = next((s for s in wanted if s in offered), "")
            if not split and held_out:
                return []
            if not split:
                raise UserError(f"{key}={place}: it has no train split; name one: {place}:{offered[0]}")
        data = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # datasets' and the Hub's errors are all of these
        said = " ".join(str(error).split())
        if "Config name is missing" in said or "pick one among" in said:
            fix = "it has several configurations; name one with task.subset"
        else:
            fix = "give a .jsonl, .csv or .parquet file, or an id that the Hub has and can be reached for"
        raise UserError(
            f"{key}={place}: no such file, nor a data set to be had: {said[:200]}; {fix}"
        ) from None
    names = {c: f.names for c, f in data.features.items() if type(f).__name__ == "ClassLabel"}
    return [(f"{place}[{split}] row {i}", _named(row, names)) for i, row in enumerate(data)]


class Label(int):
    """A class number of the Hub that knows its name: either may be a key of task.choices."""

    name: str


def _named(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    for column, words in names.items():
        if row[column] is not None:
            label = Label(row[column])
            label.name = words[label] if 0 <= label < len(words) else ""
            row[column] = label
    return row
