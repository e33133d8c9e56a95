"""Rows from the user's own data: a file, a folder of them or of texts, a folder of the datasets package, or the Hub."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

from zoft.config.schema import Limits
from zoft.data.tasks.files import FORMATS, Rows, read_file, refuse_rows, suffix, whole_text
from zoft.data.tasks.template import near
from zoft.errors import UserError
from zoft.limits import COLUMNS
from zoft.packages import install


def read(
    key: str,
    place: str,
    subset: str | None = None,
    limits: Limits | None = None,
    *,
    held_out: bool = False,
    notes: list[str] | None = None,
) -> Rows:
    """Return the rows of a file, of a folder's files, or of a Hub data set where no such file can be meant.

    key: the setting it comes from ("task.train"). place: a path, or a Hub id with an optional split
    ("stanfordnlp/sst2:validation", "imdb:train[:100]"). subset: configuration of a Hub data set. held_out: without a
    split named, take the validation (else test) split of a folder or the Hub rather than train; [] if that has neither,
    but for a folder that task.eval names: its files. notes: gets a line for each thing that was left out.
    Returns (where, row) pairs, a missing cell being None. Errors: UserError naming the line and the fix.
    """
    path, limits, notes = Path(place).expanduser(), limits or Limits(), [] if notes is None else notes
    if is_file(place) or is_folder(place):
        if subset:
            kind = "file" if is_file(place) else "folder"
            raise UserError(f"task.subset={subset}: {key}={place} is a {kind}; subsets are for Hub data sets")
        collects = gc.isenabled()
        gc.disable()  # rows hold no cycles, and looking for some in millions of them takes longer than reading
        try:
            whole = is_folder(place)
            rows = (
                _folder(key, path, held_out, limits, notes) if whole else read_file(key, path, limits, notes)
            )
        finally:
            if collects:
                gc.enable()
        if not rows and held_out and key == "task.train":
            return []
    elif _means_a_file(place, path):
        raise UserError(f"{key}={place}: {_why_no_file(key, place, path)}")
    else:
        return _hub(key, place, subset, held_out, limits)
    if not rows:
        raise UserError(f"{key}={place}: there are no rows in it")
    _refuse_columns(f"{key}={place}", rows)
    return rows


def _refuse_columns(place: str, rows: Rows) -> None:
    held: set[str] = set()
    for _, row in rows:
        held.update(row)
        if len(held) > COLUMNS:
            raise UserError(f"{place}: more than {COLUMNS:,} columns; its rows have too many different names")


def look(key: str, place: str) -> None:
    """Raise UserError for a file that is not there, cannot be read or is of no known format; a Hub id passes."""
    path = Path(place).expanduser()
    if is_folder(place):
        for file in [] if _is_saved(key, path) else _files(key, path):
            look(key, str(file)) if file.suffix.lower() != ".txt" else None
    elif is_file(place):
        suffix(key, path)
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise UserError(f"{key}={place}: cannot be read: Permission denied")
    elif _means_a_file(place, path):
        raise UserError(f"{key}={place}: {_why_no_file(key, place, path)}")


def is_file(place: str) -> bool:
    return os.path.isfile(Path(place).expanduser())


def is_folder(place: str) -> bool:
    return os.path.isdir(Path(place).expanduser())


def _names(key: str, folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{key}={folder}: cannot be read: {error.strerror}") from None


# Files that the datasets package writes beside the data, of which they hold none.
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def _is_saved(key: str, folder: Path) -> bool:
    """Say whether a folder is one that save_to_disk of the datasets package wrote."""
    names = _names(key, folder)
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= {*names}


def _data_files(folder: Path, names: list[str]) -> tuple[list[Path], list[Path]]:
    """Return (the .txt files, the tables) among the names of a folder."""
    found = [folder / n for n in names if not n.startswith(".") and n not in ABOUT]
    found = [f for f in found if f.suffix.lower() in (*FORMATS, ".txt") and os.path.isfile(f)]
    return [f for f in found if f.suffix.lower() == ".txt"], [f for f in found if f.suffix.lower() != ".txt"]


def _files(key: str, folder: Path) -> list[Path]:
    """Return the data files of a folder, by name: all of one kind, .txt or any of FORMATS.

    A folder without any has them in a folder of its own, as a clone of a data set of the Hub has: in data/, or in the
    only one that holds some.
    """
    names = _names(key, folder)
    if "config.json" in names:
        raise UserError(f"{key}={folder}: is a folder of a model, not of data")
    texts, tables = _data_files(folder, names)
    if not texts and not tables:
        below = [n for n in names if not n.startswith(".") and os.path.isdir(folder / n)]
        below = [n for n in below if any(_data_files(folder / n, _names(key, folder / n)))]
        if len(below) > 1 and "data" not in below:
            raise UserError(
                f"{key}={folder}: is a folder of several data sets ({', '.join(below)}); name one: {key}={folder / below[0]}"
            )
        if below:
            folder = folder / ("data" if "data" in below else below[0])
            texts, tables = _data_files(folder, _names(key, folder))
    if texts and tables:
        raise UserError(
            f"{key}={folder}: is a folder of both {texts[0].name} and {tables[0].name}; give one kind a folder"
        )
    if not texts and not tables:
        raise UserError(f"{key}={folder}: is a folder without data files ({', '.join(FORMATS)}, .txt)")
    return texts or tables


def _folder(key: str, folder: Path, held_out: bool, limits: Limits, notes: list[str]) -> Rows:
    if _is_saved(key, folder):
        return _saved(key, folder, held_out, limits)
    files = _files(key, folder)
    chosen = _split(files, held_out)
    if not chosen and key == "task.eval":  # a folder for evaluation alone
        chosen = [f for f in files if not SPLIT.fullmatch(f.stem)]
    rows: Rows = []
    total = 0
    for file in chosen:
        total += file.stat().st_size
        if total > limits.bytes:
            raise UserError(
                f"{key}={folder}: more than limits.bytes={limits.bytes:,} bytes; limits.bytes=N reads up to N of them"
            )
        text = file.suffix.lower() == ".txt"
        rows += (
            [(str(file), {"text": whole_text(file, limits)})] if text else read_file(key, file, limits, notes)
        )
        refuse_rows(f"{key}={folder}", len(rows), limits)
    return rows


def _saved(key: str, folder: Path, held_out: bool, limits: Limits) -> Rows:
    """Return the rows of a folder that save_to_disk wrote: of a dict of data sets those of its split."""
    try:
        import datasets
        from pyarrow import ArrowException
    except ImportError:
        raise UserError(
            f"{key}={folder}: written by save_to_disk, which the datasets package reads: {install('datasets')}"
        ) from None
    try:
        found: Any = datasets.load_from_disk(str(folder))
        split = ""
        if isinstance(found, datasets.DatasetDict):
            wanted = ("validation", "test") if held_out else ("train",)
            split = next((s for s in wanted if s in found), "")
            if not split and held_out and key == "task.train":
                return []
            if not split:
                raise UserError(
                    f"{key}={folder}: it has no {' or '.join(wanted)} split ({', '.join(found)}); give the folder of one: "
                    f"{key}={folder / next(iter(found), 'train')}"
                )
            found = found[split]
        elif held_out and key == "task.train":
            return []
        return _rows(f"{folder}[{split}]" if split else str(folder), found, limits)
    except (
        ArrowException,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
    ) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"{key}={folder}: not a whole folder of save_to_disk: {said}") from None


SPLIT = re.compile(r"(train|valid|validation|val|dev|eval|test)(?:[-_.]\d.*)?", re.I)
HELD = (("valid", "validation", "val", "dev", "eval"), ("test",))


def _split(files: list[Path], held_out: bool) -> list[Path]:
    """Return the files of a folder that are its training or, else, its validation (else test) split, by their names.

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


SPLIT_OF_HUB = r"(:[\w.+\[\]:%-]+)?"  # validation, train[:100], train+test


def _means_a_file(place: str, path: Path) -> bool:
    hub_id = re.fullmatch(rf"[\w-][\w.-]*(/[\w.-]+)?{SPLIT_OF_HUB}", place)
    return path.suffix.lower() in FORMATS or not hub_id


def _why_no_file(key: str, place: str, path: Path) -> str:
    """Say why a place is none that is read, and what to write."""
    scheme, mark, inner = place.partition("://")
    if mark and scheme == "hf":
        named = inner.removeprefix("datasets/").split("/")
        shown = "/".join(part.partition("@")[0] for part in named[:2])
        return f"no such file; a data set of the Hub is named without {scheme}://, as in {key}={shown or 'stanfordnlp/sst2'}"
    if mark:
        return f"no such file; nothing is fetched from {scheme}:// addresses: download it, and give its path"
    if set("*?[") & set(place):
        folder = next(p for p in path.parents if not set("*?[") & set(str(p)))
        return f"no such file; * and its like are not read here: give a folder, whose data files are all read: {key}={folder}"
    if os.path.lexists(path):
        return (
            "no such file: a pipe, a device, a socket, or a link that leads to none; give a file or a folder"
        )
    if not os.path.isdir(path.parent):
        return f"no such file: there is no folder {path.parent}"
    try:
        # Without their endings, which all are alike by.
        stems = {Path(name).stem: name for name in sorted(os.listdir(path.parent))}
    except OSError as error:
        return f"no such file that can be seen: {error.strerror}"
    return "no such file" + near(path.stem, stems, {stem: path.parent / n for stem, n in stems.items()})


def _hub(key: str, place: str, subset: str | None, held_out: bool, limits: Limits) -> Rows:
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
    return _rows(f"{name}[{split}]", data, limits)


def _rows(place: str, data: Any, limits: Limits) -> Rows:
    """Return the rows of a Dataset, a class of its labels knowing its name."""
    refuse_rows(place, len(data), limits)
    if len(data.features) > COLUMNS:
        raise UserError(f"{place}: {len(data.features):,} columns; at most {COLUMNS:,} are read")
    names = {c: f.names for c, f in data.features.items() if type(f).__name__ == "ClassLabel"}
    return [(f"{place} row {i}", _named(row, names)) for i, row in enumerate(data.with_format(None))]


class Label(int):
    """Represent a class number of the Hub that knows its name: either may be a key of task.choices."""

    name: str


def _named(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    for column, words in names.items():
        if row[column] is not None:
            label = Label(row[column])
            label.name = words[label] if 0 <= label < len(words) else ""
            row[column] = label
    return row
