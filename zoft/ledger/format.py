"""The ledger's bytes: steps to records and back, with every check (layout: docs/ledger.md)."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from zoft.errors import UserError

MAGIC = b"zoft\r\n\x1a\n"  # the line ends show a copy that went through a text mode
FORMAT = 2  # 1 had no events, and less in its header
UPDATE, SKIP = 1, 2  # kinds of record that a step has
EVENTS = {"denoise": 3, "snapshot": 4}  # kinds of record between steps, in the order they take at one step
LAST = 1  # flag: the last direction of its step
SIZE, BODY = 32, 28  # bytes of a record, with and without its crc
DIGEST = 20  # bytes of an event's digest, where a step's record has its floats
MAX_DIRECTIONS = 1 << 16

_RECORD = np.dtype(
    [
        ("step", "<u4"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("direction", "<u2"),
        ("multiplier", "<f4"),
        ("decay", "<f4"),
        ("plus", "<f4"),
        ("minus", "<f4"),
        ("lr", "<f4"),
        ("crc", "<u4"),
    ]
)
assert _RECORD.itemsize == SIZE


@dataclass(frozen=True, slots=True)
class Record:
    """Hold one step, as it happened: θ ← round(decay·θ + Σ_k multipliers[k]·z_k), or nothing where `skipped`.

    step: counts from 0, the step of the noise. multipliers: q fp32 values. decay: fp32 value.
    losses: 2q values, (+, -) of each direction, kept as fp32. lr: the schedule's value, kept as fp32.
    A skipped step keeps what was seen, NaN and infinities included.
    """

    step: int
    multipliers: tuple[float, ...]
    decay: float
    losses: tuple[float, ...]
    skipped: bool = False
    lr: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """Hold what happened to a run between two steps: kind "denoise" (weights were rebuilt) or "snapshot" (and saved).

    step: number of steps done then. digest: of what came of it, zeros where nothing is kept (20 bytes).
    """

    kind: str
    step: int
    digest: bytes = bytes(DIGEST)


class Log(NamedTuple):
    """Hold a ledger's content: its header, one Record per step, and the events between steps, in order."""

    header: dict
    records: list[Record]
    events: list[Event]


def encode_header(header: dict) -> tuple[bytes, int]:
    """Return the first bytes of a ledger, and their crc. Raises UserError for a header that is no JSON."""
    assert header.get("format", FORMAT) == FORMAT, f"header format {header['format']}, not {FORMAT}"
    whole = {**header, "format": FORMAT}
    try:
        payload = json.dumps(whole, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"ledger: the header cannot be written as JSON: {error}") from error
    head = MAGIC + FORMAT.to_bytes(4, "little") + len(payload).to_bytes(4, "little") + payload
    crc = zlib.crc32(head)
    return head + crc.to_bytes(4, "little"), crc


def encode(record: Record, crc: int) -> tuple[bytes, int, Record]:
    """Return the bytes of a step, the chained crc after it, and the record as a reader will see it."""
    q = len(record.multipliers)
    losses = record.losses
    assert 1 <= q <= MAX_DIRECTIONS and len(losses) == 2 * q, f"{q} multipliers, {len(losses)} losses"
    rows = np.zeros(q, _RECORD)
    with np.errstate(over="ignore", invalid="ignore"):
        rows["multiplier"], rows["decay"], rows["lr"] = record.multipliers, record.decay, record.lr
        rows["plus"], rows["minus"] = losses[0::2], losses[1::2]
    rows["step"], rows["direction"] = record.step, np.arange(q)
    rows["kind"] = SKIP if record.skipped else UPDATE
    rows["flags"][-1] = LAST

    kept = _record(rows)
    used, stored = (*record.multipliers, record.decay), (*kept.multipliers, kept.decay)
    same = all(a == b or math.isnan(a) for a, b in zip(used, stored, strict=True))
    assert same, f"step {record.step}: {used} are no fp32 values ({stored})"
    finite = all(map(math.isfinite, stored))
    assert finite or record.skipped, f"step {record.step}: an update with {used}, not skipped"

    data = bytearray(rows.tobytes())
    for start in range(0, len(data), SIZE):
        crc = zlib.crc32(data[start : start + BODY], crc)
        data[start + BODY : start + SIZE] = crc.to_bytes(4, "little")
    return bytes(data), crc, kept


def encode_event(event: Event, crc: int) -> tuple[bytes, int]:
    """Return the bytes of an event, and the chained crc after it."""
    assert event.kind in EVENTS and len(event.digest) == DIGEST, event
    head = event.step.to_bytes(4, "little") + bytes([EVENTS[event.kind], LAST, 0, 0])
    crc = zlib.crc32(head + event.digest, crc)
    return head + event.digest + crc.to_bytes(4, "little"), crc


def _record(rows: np.ndarray) -> Record:
    """The step held by its q rows [q]."""
    losses = np.stack([rows["plus"], rows["minus"]], axis=1).ravel()  # [2q]
    first = rows[0]
    return Record(
        step=int(first["step"]),
        multipliers=tuple(rows["multiplier"].tolist()),
        decay=float(first["decay"]),
        losses=tuple(losses.tolist()),
        skipped=bool(first["kind"] == SKIP),
        lr=float(first["lr"]),
    )


def decode(data: bytes, path: str | os.PathLike) -> tuple[Log, int, int]:
    """Read whole steps and events, the bytes they fill and the chained crc there; UserError on any damage."""
    header, start, crc = _decode_header(data, path)
    rows = np.frombuffer(data, _RECORD, (len(data) - start) // SIZE, start)  # [records]
    view = memoryview(data)
    chain = [crc]  # [i]: the crc that record i starts from
    bad, what = len(rows), ""
    for i, stored in enumerate(rows["crc"].tolist()):
        at = start + i * SIZE
        chain.append(zlib.crc32(view[at : at + BODY], chain[-1]))
        if chain[-1] != stored:
            bad, what = i, "its checksum does not match"
            break

    # What a checksum cannot see: records that were written wrongly, or by a newer zoft.
    rows = rows[:bad]
    kind = rows["kind"]
    event = np.isin(kind, list(EVENTS.values()))
    closes = rows["flags"] & LAST != 0
    opens = np.ones_like(closes)
    opens[1:] = closes[:-1]
    head = np.maximum.accumulate(np.where(opens, np.arange(len(rows)), 0))  # [records] the first of its group
    begins = opens & ~event  # [records] the first of a step
    step = (np.cumsum(begins) - begins)[head]  # [records] steps before this one or this event
    first = rows[head]
    unlike = kind != first["kind"]
    for name in ("decay", "lr"):
        unlike |= (rows[name] != first[name]) & ~(np.isnan(rows[name]) & np.isnan(first[name]))
    late = np.zeros_like(event)
    late[1:] = event[1:] & event[:-1] & (kind[1:] <= kind[:-1])
    finite = np.isfinite(rows["multiplier"]) & np.isfinite(rows["decay"])
    checks = {
        "its kind is unknown (a newer zoft's?)": ~event & (kind != UPDATE) & (kind != SKIP),
        "its flags are unknown (a newer zoft's?)": (rows["flags"] & ~np.uint8(LAST) != 0) | (event & ~closes),
        "its step is out of order": rows["step"] != step,
        "its direction is out of order": rows["direction"] != np.arange(len(rows)) - head,
        "it disagrees with the first record of its step": unlike & ~event,
        "it is an event inside a step, or out of order": (event & ~opens) | late,
        "it is an update with a value that is not finite": (kind == UPDATE) & ~finite,
    }
    for text, wrong in checks.items():
        if wrong.any() and wrong.argmax() < bad:
            bad, what = int(wrong.argmax()), text

    whole = [0, *(np.flatnonzero(closes[:bad]) + 1).tolist()]  # records before each step or event
    steps = int(np.count_nonzero(closes[:bad] & ~event[:bad]))
    size = start + whole[-1] * SIZE
    if what:
        raise UserError(
            f"ledger: {path} is damaged at byte {start + bad * SIZE}: {what}; "
            f"the {steps} steps before it are whole: restore a copy, or `truncate -s {size}` it"
        )
    records, events, names = [], [], {v: k for k, v in EVENTS.items()}
    for a, b in pairwise(whole):
        if event[a]:
            at = start + a * SIZE + BODY - DIGEST
            events.append(Event(names[int(kind[a])], int(rows["step"][a]), data[at : at + DIGEST]))
        else:
            records.append(_record(rows[a:b]))
    return Log(header, records, events), size, chain[whole[-1]]


def _decode_header(data: bytes, path: str | os.PathLike) -> tuple[dict, int, int]:
    """The header, the byte where records start and its crc."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise UserError(
            f"ledger: {path} is no ledger, or damaged at byte 0: it does not start with {MAGIC!r}"
        )
    version, length = (int.from_bytes(data[at : at + 4], "little") for at in (8, 12))
    end = 16 + length
    if len(data) >= 12 and version != FORMAT:
        raise UserError(
            f"ledger: {path} has format {version} (byte 8), this zoft reads {FORMAT}: "
            + ("use the zoft that wrote it" if version < FORMAT else "update zoft")
        )
    if len(data) < 16 or len(data) < end + 4:
        raise UserError(
            f"ledger: {path} is damaged at byte {len(data)}: it ends inside its header; "
            "restore a copy, or start again"
        )
    crc = zlib.crc32(data[:end])
    if crc != int.from_bytes(data[end : end + 4], "little"):
        raise UserError(
            f"ledger: {path} is damaged before byte {end + 4}: its header's checksum (at byte {end}) "
            "does not match; restore a copy, or start again"
        )
    try:
        header = json.loads(data[16:end])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(
            f"ledger: {path} is no ledger of a run: its header (byte 16) is no JSON object of format {FORMAT}"
        )
    return header, end + 4, crc
