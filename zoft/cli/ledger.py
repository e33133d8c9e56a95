"""Show a run's ledger: a summary, a plot, and whether everything in the folder agrees with it. Loads no model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoft.config.digest import changed, digests
from zoft.console import escaped
from zoft.errors import UserError
from zoft.ledger.check import header_faults, plan_of, trained_faults
from zoft.ledger.format import Log, Record, decode
from zoft.ledger.log import ledger_bytes
from zoft.noise import spec
from zoft.pictures import pyplot, refuse_other_ends, write_picture
from zoft.replay.snapshot import FOLDER, NAME, fault_of, file_of

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # columns of a text plot
LISTED = 12  # events of a kind whose steps are named


def open_run(run: str | Path) -> tuple[Path, Log, int, int]:
    """Return (ledger's path, its content, bytes of whole records, bytes of the file) of a run's folder or a ledger's file.

    A run that another process is training is read up to its last whole step. Raises UserError on any damage.
    """
    path = Path(run) / "ledger" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder (it has no ledger), nor a ledger")
    data = ledger_bytes(path)
    log, size, _ = decode(data, path)
    return path, log, size, len(data)


def ledger_summary(run: str | Path) -> dict[str, Any]:
    """Return the ledger in numbers, ready for JSON; NaN where nothing finite was seen."""
    path, log, size, _ = open_run(run)
    header, records = log.header, log.records
    trained = header.get("trained", {})
    losses = loss_curve(records)
    # The largest of a step's; a skipped step moved nothing.
    multipliers = [0.0 if r.skipped else max(map(abs, r.multipliers)) for r in records]
    tail = max(len(losses) // 10, 1)
    return {
        "ledger": str(path),
        "bytes": size,
        "steps": len(records),
        "planned": plan_of(header).get("steps"),
        "finished": (path.parent / "result.json").exists(),
        "skipped": sum(r.skipped for r in records),
        "loss": {"first": mean(losses[:tail]), "last": mean(losses[-tail:]), "steps_each": tail if losses else 0},
        "multiplier": {"rms": math.sqrt(mean([m * m for m in multipliers])), "largest": max(multipliers, default=math.nan)},
        "lr": {"first": records[0].lr, "last": records[-1].lr} if records else {},
        "events": [{"kind": e.kind, "step": e.step} | about(path.parent, e) for e in log.events],
        "tensors": len(trained) if isinstance(trained, (dict, list)) else 0,
        "numbers": None if trained_faults(trained) else sum(math.prod(shape) for _, shape, _ in trained.values()),
        "curves": {"loss": squeezed(losses), "multiplier": squeezed(multipliers)},
        "header": {k: v for k, v in header.items() if k not in ("trained", "config")},
    }  # fmt: skip


def about(folder: Path, event: Any) -> dict[str, Any]:
    """Return what an event left: the digest that the ledger has, and the file if it is still there."""
    found: dict[str, Any] = {"digest": event.digest.hex()} if any(event.digest) else {}
    file = file_of(folder, event.step)
    if event.kind == "snapshot":
        found["file"] = str(file) if file.exists() else None
    return found


def ledger_text(found: Mapping[str, Any]) -> str:
    """Return the summary for the eye."""
    header, plan = found["header"], plan_of(found["header"])
    done, planned = found["steps"], found["planned"]
    state = "finished" if found["finished"] else "not finished: it was stopped, or is still going on"
    rows = [
        ("ledger", f"{found['ledger']}, {found['bytes']:,} bytes, format {header['format']}, by zoft {header.get('zoft')}"),
        ("steps", f"{done}{f' of {planned}' if planned else ''}, {found['skipped']} skipped; {state}"),
    ]  # fmt: skip
    if done:
        loss, m, lr = found["loss"], found["multiplier"], found["lr"]
        n = loss["steps_each"]
        rows += [
            ("loss", f"{loss['first']:.4g} over the first {n}, {loss['last']:.4g} over the last {n}"),
            ("", found["curves"]["loss"]),
            ("multiplier", f"rms {m['rms']:.3g}, largest {m['largest']:.3g}"),
            ("", found["curves"]["multiplier"]),
            ("lr", f"{lr['first']:.4g} at first, {lr['last']:.4g} at last"),
        ]
    rows += [
        ("noise", f"{header.get('noise')}, version {header.get('noise_version')}, seed {header.get('seed')}"),
        ("trained", f"{found['tensors']} tensors, {found['numbers']:,} numbers, stored in {header.get('storage')}, "
         f"computed in {header.get('compute')}" if found["numbers"] is not None else f"{found['tensors']} tensors"),
        ("base", str(header.get("base"))),
        ("method", ", ".join(f"{k} {header[k]}" for k in ("estimator", "update", "page", "eps", "q", "momentum", "perturb") if k in header)),
        ("plan", ", ".join(f"{k} {v}" for k, v in plan.items() if k != "steps")),
    ]  # fmt: skip
    for kind in dict.fromkeys(e["kind"] for e in found["events"]):
        some = [e for e in found["events"] if e["kind"] == kind]
        after = ", ".join(str(e["step"]) for e in some[-LISTED:])
        rows.append((kind, f"{len(some)}, after {'…, ' * (len(some) > LISTED)}{after} steps"))
        rows += [("", e["file"]) for e in some if e.get("file")]
    return escaped("\n".join(f"{name:11}{value}" for name, value in rows if value))


def verify_ledger(run: str | Path) -> list[str]:
    """Check all that can be checked without the base; returns a line a check. Raises UserError for what is wrong."""
    path, log, size, whole = open_run(run)
    folder, header = path.parent, log.header
    said = [f"chain: {len(log.records)} steps and {len(log.events)} events whole, {size:,} bytes"]
    if whole > size:
        said.append(
            f"tail: {whole - size} bytes of a step that is being written, or never was whole; no step has them"
        )
    if wrong := header_faults(header, log.records):
        raise UserError(f"{run}: {'; '.join(wrong)}")
    said.append(
        f"header: format {header['format']}, noise version {spec.VERSION}, {len(header['trained'])} tensors and their ids"
    )
    if (folder / "config.yaml").is_file():
        from zoft.method.configured import load_run

        other = changed(header["config"], digests(load_run(folder, ["trust_remote_code=true"], trains=False)))
        if "page" in header:  # whose text a resume looks at; without it a run is read under the recipe mezo
            other = [key for key in other if key != "recipe"]
        if other:
            wrong.append(f"config.yaml has another {', '.join(other)} than the run was begun with")
        else:
            said.append("config: config.yaml is what the run was begun with")
    else:
        said.append("config: no config.yaml here to check")
    if (folder / "result.json").exists() and len(log.records) != plan_of(header).get("steps"):
        wrong.append(f"result.json says that the run is finished, the ledger has {len(log.records)} steps")
    known = {e.step: e for e in log.events if e.kind == "snapshot"}
    for file in sorted((folder / FOLDER).glob("step-*.safetensors")):
        step = int(m[1]) if (m := NAME.fullmatch(file.name)) else -1
        if step not in known:
            said.append(f"snapshot: {file.name} is unknown to the ledger and never used")
        elif fault := fault_of(file, header, known[step]):
            wrong.append(f"{file} {fault}")
        else:
            said.append(f"snapshot: {file.name} is what the run wrote")
    if wrong:
        raise UserError(f"{run}: {'; '.join(wrong)}")
    return said


def plot_ledger(run: str | Path, out: str | Path) -> Path:
    """Draw losses and multipliers of all steps, with skipped steps and events marked. Raises UserError."""
    out = Path(out)
    refuse_other_ends("--plot", out)
    if not out.parent.is_dir():
        raise UserError(f"--plot {out}: no such folder")
    _, log, _, _ = open_run(run)
    if not log.records:
        raise UserError(f"--plot {out}: the ledger has no steps yet")
    plt = pyplot("--plot")
    import numpy as np

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), dpi=120, sharex=True, layout="constrained")
    losses = np.array(loss_curve(log.records))  # [steps]
    steps = np.arange(len(losses))
    window = max(len(losses) // 20, 1)
    top.plot(steps, losses, color="0.75", linewidth=0.6)
    smooth = np.convolve(np.nan_to_num(losses), np.ones(window), "valid") / np.maximum(
        np.convolve(np.isfinite(losses), np.ones(window), "valid"), 1
    )
    top.plot(steps[window - 1 :], smooth, color="#1b6ca8", label=f"mean of {window} steps")
    top.set(ylabel="loss, mean of all probes")
    top.legend(frameon=False)
    q = max(len(r.multipliers) for r in log.records)
    for k in range(q):
        values = [r.multipliers[k] if not r.skipped else np.nan for r in log.records]
        bottom.plot(steps, values, ".", markersize=2, color="#d1495b", alpha=max(1 / q, 0.1))
    bottom.set(xlabel="step", ylabel="multiplier of z")
    for panel in (top, bottom):
        for r in log.records:
            if r.skipped:
                panel.axvline(r.step, color="#c98b1b", linewidth=0.8)
        for event in log.events:
            panel.axvline(
                event.step, color="0.4", linestyle=":" if event.kind == "snapshot" else "--", linewidth=0.8
            )
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run}: {len(losses)} steps", fontsize=11)
    write_picture(figure, Path(out))
    plt.close(figure)
    return out


def loss_curve(records: Sequence[Record]) -> list[float]:
    """Return [steps] the mean loss of each step's probes; NaN where one was not finite."""
    means = [sum(r.losses) / len(r.losses) for r in records]
    return [m if math.isfinite(m) else math.nan for m in means]


def mean(values: Sequence[float]) -> float:
    """Return the mean of the finite ones; NaN without any."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def squeezed(values: Sequence[float], width: int = WIDTH) -> str:
    """Return a line of bars: means over equal stretches, from the lowest to the highest of them; a gap where none is finite."""
    n = min(width, len(values))
    means = [mean(values[len(values) * i // n : len(values) * (i + 1) // n]) for i in range(n)]
    finite = [m for m in means if math.isfinite(m)]
    low, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    level = [round((m - low) / span * (len(BARS) - 1)) if span and m == m else 0 for m in means]
    return "".join(BARS[i] if m == m else " " for i, m in zip(level, means))


def ledger_json(found: Mapping[str, Any]) -> str:
    """Return strict JSON: null for what is no number."""
    from zoft.console import finite

    return json.dumps(finite(found))
