"""What the coordinator of an elastic run and its workers share: the run's invitation, and the bytes of steps and pairs."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from zoft.errors import UserError, writing
from zoft.ledger_format import Record

if TYPE_CHECKING:
    from torch import Tensor

JOIN = "join.json"  # in the run's folder: where workers connect, and the secret
PAIR = struct.Struct("<II")  # probe, batch; then come the pair's K totals, fp64 (K = 2: loss sum, count)


def invite(folder: Path, where: str, secret: bytes) -> Path:
    """Write the invitation to connect to where (HOST:PORT), for its owner alone; returns its path. Raises UserError."""
    path = folder / JOIN
    draft = path.with_name(f".{JOIN}.new")
    with writing(path):
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps({"address": where, "secret": secret.hex()}) + "\n")
        draft.replace(path)
    return path


def invitation(place: str, secret_file: str | None) -> tuple[str, bytes]:
    """HOST:PORT and secret of the run in folder `place`; of HOST:PORT with a copy of its join.json. Raises UserError."""
    path = Path(secret_file) if secret_file else Path(place) / JOIN
    if not secret_file and not Path(place).is_dir():
        raise UserError(
            f"{place}: no folder of a run; for HOST:PORT give --secret FILE, a copy of its {JOIN}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        secret = bytes.fromhex(found["secret"])
        return (place if secret_file else found["address"]), secret
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = getattr(error, "strerror", None) or "damaged"
        raise UserError(f"{path}: {why}; a run with elastic=true writes it while it goes on") from None


def packed_pair(probe: int, batch: int, totals: Tensor) -> bytes:
    """A pair that a worker answers; totals fp64 [K]."""
    return PAIR.pack(probe, batch) + totals.numpy().tobytes()


def pairs_of(data: bytes, columns: int) -> list[tuple[int, int, Tensor]]:
    """(probe, batch, totals fp64 [K]) of each pair that a worker answers."""
    import torch

    size = PAIR.size + 8 * columns
    assert len(data) % size == 0, (len(data), columns)
    return [
        (
            *PAIR.unpack_from(data, at),
            torch.frombuffer(bytearray(data[at + PAIR.size : at + size]), dtype=torch.float64),
        )
        for at in range(0, len(data), size)
    ]


def packed(record: Record) -> bytes:
    """A step as the ledger keeps it, all fp32 bits: 13 bytes and 12 a direction."""
    q = len(record.multipliers)
    floats = (record.decay, record.lr, *record.multipliers, *record.losses)
    return struct.pack(f"<IB{2 + 3 * q}f", record.step, record.skipped, *floats)


def unpacked(data: bytes) -> Record:
    """The step that `packed` made these bytes of."""
    q = (len(data) - 13) // 12
    step, skipped, decay, lr, *rest = struct.unpack(f"<IB{2 + 3 * q}f", data)
    return Record(step, tuple(rest[:q]), decay, tuple(rest[q:]), bool(skipped), lr)
