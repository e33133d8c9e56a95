"""Show and write what a run does while it goes: metrics.jsonl always, a live line, wandb when asked."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from zoft.config.schema import NO_GRADIENT
from zoft.console import QUIET_SECONDS, _clock, finite, logged, peak_memory_gb, short
from zoft.errors import UserError, writing
from zoft.folder import write
from zoft.packages import missing

LIVE_SECONDS = 0.1  # between redraws of the live line
RECENT = 50  # steps whose mean time is the speed: a run gets faster once its frozen outputs are all there


def require_tracker(track: str) -> None:
    """Raise UserError when the package that `track` needs is not installed; imports nothing."""
    import importlib.util

    if track == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"{missing('track=wandb', 'wandb')}, or use track=none")


class Tracker:
    """Write a run's metrics; a context manager.

    metrics.jsonl has a line a step, `{"step": s, "loss": …}` for the update from s to s + 1, and a line an
    evaluation, `{"step": s, "eval": {…}}` for the weights after s updates. On resume the lines of steps that
    the ledger does not have are dropped and those that it has more are filled in (without `seconds`), so call `step`
    after the ledger's append, and the file tells what the ledger does.

    run_dir: an existing folder; None keeps nothing. steps: of the whole run. resume_step: the ledger's next step, 0 for a new run.
    known: on resume, the metrics of the steps that the ledger has. config: shown by wandb; of an `objective` that is to grow, the lines show it, not the loss. device: whose peak memory is shown. stream: where the live or plain lines go (stderr).
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        steps: int,
        *,
        track: str = "none",
        config: Mapping[str, Any] | None = None,
        resume_step: int = 0,
        known: Sequence[Mapping[str, Any]] = (),
        device: str = "cpu",
        stream: TextIO | None = None,
    ):
        require_tracker(track)
        self.steps, self.first, self.stream = steps, resume_step, stream or sys.stderr
        self.device = device
        path = Path(os.devnull) if run_dir is None else Path(run_dir) / "metrics.jsonl"
        self.next = resume_step  # the step whose line comes next
        with writing(path):
            if resume_step and run_dir is not None:
                _mend(path, resume_step, known)
            # Unbuffered: what a full disk did not take must not be tried again by close.
            self._file = path.open("ab" if resume_step else "wb", buffering=0)
        self._grows = next((m for m in NO_GRADIENT if m == (config or {}).get("objective")), None)
        self._shown = self._since = time.monotonic()  # since the last step, or what came after it
        self._far = self._since  # since the last word on how far a long step is
        self._took: deque[float] = deque(maxlen=RECENT)  # seconds of a step
        self._paused = 0.0  # seconds of all that was no step, from the first step on
        self._live = _live(self.stream) if self.stream.isatty() else None
        self._wandb = (
            _wandb(Path(run_dir), config or {}) if track == "wandb" and run_dir is not None else None
        )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def step(self, step: int, **metrics: Any) -> None:
        """Log the update from `step` to step + 1: loss, projected_gradient, lr, and whatever else is given."""
        self._write({"step": step, **metrics})
        self.next = step + 1
        now = time.monotonic()
        if step > self.first:  # which compiles kernels
            self._took.append(now - self._since)
        self._since = now
        due = LIVE_SECONDS if self._live else QUIET_SECONDS
        if now - self._shown >= due or step in (self.first, self.steps - 1):
            self._shown = now
            self._show(self._line(step, metrics))

    def paused(self) -> None:
        """Note that what was done since the last step was no step: an evaluation, a snapshot."""
        now = time.monotonic()
        self._paused += (now - self._since) * (self.next > self.first)
        self._since = now

    def fill(self, known: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of steps that the ledger has more than the file: known[s] are the metrics of step s."""
        for row in known[self.next :]:
            self._write(dict(row))
            self.next += 1

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log an evaluation of the weights after `step` updates."""
        self._write({"step": step, "eval": dict(metrics)})
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it decides (early_stop, save_best) outlives a power cut
                os.fsync(self._file.fileno())
        self.note(f"step {step}: " + ", ".join(f"{k} {short(v)}" for k, v in metrics.items()))

    def note(self, text: str) -> None:
        """Print a line for the reader that stays on the screen."""
        with contextlib.suppress(OSError):  # a terminal that is gone does not stop a run
            if self._live:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self.stream, flush=True)

    def under_way(self, text: str) -> None:
        """Show how far a step or evaluation is that takes long; the lines of steps come as they would without it."""
        now = time.monotonic()
        due = LIVE_SECONDS if self._live else QUIET_SECONDS
        if now - self._since >= QUIET_SECONDS and now - self._far >= due:
            self._far = now
            self._show(f"step {self.next + 1}/{self.steps}: {text}")

    def close(self, failed: bool = False) -> None:
        """Flush and close everything; twice does no harm."""
        if self._live:
            self._live.stop()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))
        self._live = self._wandb = None
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN: a skipped step's loss becomes null, so that every reader can read the line.
        with writing(self._file.name):
            data = (json.dumps(finite(row), ensure_ascii=False) + "\n").encode()
            while data:
                data = data[self._file.write(data) :]
        if self._wandb:
            self._wandb.log(row, step=row["step"])

    def _show(self, line: str) -> None:
        with contextlib.suppress(OSError):
            if self._live:
                from rich.text import Text

                self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            else:
                print(line, file=self.stream, flush=True)

    def _line(self, step: int, metrics: Mapping[str, Any]) -> str:
        parts = [f"step {step + 1}/{self.steps}"]
        for name, label in (("loss", "loss"), ("projected_gradient", "pg"), ("lr", "lr")):
            if name == "loss" and name in metrics and self._grows:  # minimised is minus what is to grow
                parts.append(f"{self._grows} {short(0 - metrics[name])}")
            elif name in metrics:
                parts.append(f"{label} {short(metrics[name])}")
        each = sum(self._took) / max(1, len(self._took))
        if each > 0:
            left = (self.steps - step - 1) * (each + self._paused / (step + 1 - self.first))
            parts += [f"{1 / each:.3g} steps/s", f"ETA {_clock(left)}"]
        return "  ".join([*parts, f"{peak_memory_gb(self.device):.2f} GB"])


def _mend(path: Path, next_step: int, known: Sequence[Mapping[str, Any]]) -> None:
    """Keep lines of steps before next_step and evaluations up to it; put in the steps of `known` that are missing."""
    rows = [row for row in logged(path) if row["step"] < next_step + ("eval" in row)]
    have = {row["step"] for row in rows if "eval" not in row}
    rows += [finite(row) for row in known[:next_step] if row["step"] not in have]
    rows.sort(key=lambda row: (row["step"], "eval" not in row))  # stable; an evaluation comes before its step
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _live(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.live import Live

    live = Live(
        console=Console(file=stream), auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )
    live.start()
    return live


def _wandb(run_dir: Path, config: Mapping[str, Any]) -> Any:
    os.environ.setdefault("WANDB_MODE", "offline")  # going on line is the user's choice
    import wandb

    return wandb.init(project="zoft", name=run_dir.resolve().name, dir=str(run_dir), config=dict(config))
