"""Watch a run that goes nowhere, threads that wait for each other, and memory that is not there; advise while it is cheap."""

from __future__ import annotations

import gc
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zoft.config.schema import GENERATED, NO_GRADIENT, Config
from zoft.errors import UserError, is_memory
from zoft.method.advice import known_settings, lr_range, paper_range
from zoft.method.estimators.named import estimator_of
from zoft.method.momentum import buffer_beta
from zoft.method.rules import is_sized, rule_of

if TYPE_CHECKING:
    from zoft.method.space import Trained


ZERO_STEPS = 20  # steps in a row with a projected gradient of exactly 0
CROWDED = 0.6  # share of their CPU time below which threads wait for each other more than they work
LOOK_SECONDS = 60.0  # of steps between two looks at it
WINDOW = 100  # steps whose losses are compared with the first ones'


class Watch:
    """Watch each step's metrics and say, once each, what has gone wrong for long.

    - a loss above its start: the median of WINDOW steps (a tenth of a short run) has been beyond that of the first
      ones, by a tenth of it and by 4 standard errors of the difference, for as many steps on end;
    - a projected gradient of exactly 0 for ZERO_STEPS steps; the first step that is skipped.

    seen: metrics of the steps before, for a resumed run. Raises UserError with on_divergence=stop.
    """

    def __init__(
        self, config: Config, trained: Sequence[Trained], seen: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.config, self.trained = config, trained
        self.window = max(5, min(WINDOW, config.steps // 10))
        self.first: list[float] = []  # the losses of the first window
        self.last: list[float] = []  # of the latest one
        self.zeros = self.above = 0  # steps in a row
        self.said: set[str] = set()
        for metrics in seen:
            self._see(metrics)

    def see(self, metrics: Mapping[str, Any]) -> list[str]:
        """Take a step's metrics; returns lines for the reader."""
        lines = self._see(metrics)
        if self.above >= self.window and self.config.on_divergence == "stop":
            raise UserError(f"on_divergence=stop: {self._diverged()}")
        return lines

    def _see(self, metrics: Mapping[str, Any]) -> list[str]:
        step = metrics["step"]
        if metrics["skipped"]:
            limit = f"max_skipped={self.config.max_skipped} in a row stop the run"
            return self._once(
                "skip",
                f"step {step}: the loss, or the update from it, is not finite; the step is skipped; {limit}",
            )
        self.zeros = self.zeros + 1 if metrics["projected_gradient"] == 0 else 0
        lines = self._once("zero", self._stuck(metrics["loss"])) if self.zeros >= ZERO_STEPS else []
        if len(self.first) < self.window:
            self.first.append(metrics["loss"])
            return lines
        self.last = [*self.last[1 - self.window :], metrics["loss"]]
        start, now = _median(self.first), _median(self.last)
        error = math.sqrt((_variance(self.first) + _variance(self.last)) / self.window)
        far = len(self.last) == self.window and now > start + max(0.1 * abs(start), 4 * error)
        self.above = self.above + 1 if far else 0
        return lines + (self._once("above", self._diverged()) if self.above >= self.window else [])

    def _once(self, what: str, line: str) -> list[str]:
        new = what not in self.said
        self.said.add(what)
        return [line] if new else []

    def _diverged(self) -> str:
        c, k = self.config, known_settings(self.config)
        text = (
            f"the loss has been above its start for {self.above} steps ({_median(self.first):.3g} → "
            f"{_median(self.last):.3g}, medians of {self.window}): start again with a lower lr than {c.lr:g}"
        )
        if k is None or estimator_of(c).sized or is_sized(c):
            return text
        low, high = lr_range(c, k, sum(t.stored.numel() for t in self.trained))
        here = "" if (low, high) == k.lr else f", which means {low:.1g} to {high:.1g} here"
        return f"{text} ({paper_range(k)}{here})"

    def _stuck(self, loss: float) -> str:
        c, text = self.config, f"the projected gradient has been 0 for {self.zeros} steps: "
        if c.objective in NO_GRADIENT:
            return (
                f"{text}both probes of a direction have the same {c.objective} ({0 - loss:.4g}), which changes in steps of one example: "
                f"raise batch_size={c.batch_size}, q={c.q} or eps={c.eps:g}"
                + (
                    "; a model none of whose texts scores has nothing to go by"
                    if c.objective in GENERATED
                    else ""
                )
            )
        if loss == 0:
            return text + "the loss is 0, so nothing is left to learn from these examples"
        fix = f"raise eps={c.eps:g}" + (
            "" if c.compute in ("fp32", "fp64") else f", or compute={c.compute} to fp32"
        )
        return (
            f"{text}both probes of a direction give the same loss: the loss is too coarse to tell them apart ({fix}), "
            f"or train={c.train} does not reach what is scored"
        )


def bias_alone(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return a line where accuracy rose and a metric without label bias did not: AUC of two labels, else calibrated accuracy.

    Such a gain is had without training, by taking each label's bias off (`zoft baseline --method calibrated`).
    """
    name = next((n for n in ("auc", "calibrated_accuracy") if n in before and n in after), None)
    if name is None or "accuracy" not in before or after["accuracy"] <= before["accuracy"]:
        return None
    if after[name] > before[name]:
        return None
    return (
        f"accuracy rose from {before['accuracy']:.3g} to {after['accuracy']:.3g}, and {name} went from {before[name]:.3g} to "
        f"{after[name]:.3g}: the run removed a label bias, which `zoft baseline --method calibrated` does without "
        "training; try a lower lr, more steps or recipe=node"
    )


def crowded(cpu_s: float, wall_s: float, threads: int) -> str | None:
    """Return a line where `threads` had little of the CPU time that so many can use: each barrier then waits for whoever is off the CPU."""
    share = cpu_s / (wall_s * threads)
    if threads == 1 or share >= CROWDED:
        return None
    fewer = min(threads - 1, max(1, int(cpu_s / wall_s)))
    return (
        f"threads={threads}: in the last {wall_s:.0f} s of steps they had {share:.0%} of the CPU time of {threads} cores: other "
        f"programs or a limit take the rest, or they wait for each other; threads={fewer} may be faster"
    )


class Cores:
    """Watch how much CPU time the steps of a run get, and say once where its threads wait for each other.

    threads: 1 looks at nothing. clocks() -> seconds of (the process on all CPUs, the wall).
    """

    def __init__(
        self,
        threads: int,
        clocks: Callable[[], tuple[float, float]] = lambda: (time.process_time(), time.perf_counter()),
    ) -> None:
        self.threads, self.clocks = threads, clocks
        self.cpu = self.wall = 0.0  # seconds of the steps since the last look
        self.paused()

    def paused(self) -> None:
        """Note that what was done since the last step was no step."""
        self.last = self.clocks()

    def step(self) -> list[str]:
        """Note that a step is done; returns lines for the reader."""
        (cpu, wall), self.last = self.last, self.clocks()
        self.cpu, self.wall = self.cpu + self.last[0] - cpu, self.wall + self.last[1] - wall
        if self.threads == 1 or self.wall < LOOK_SECONDS:
            return []
        line = crowded(self.cpu, self.wall, self.threads)
        self.cpu = self.wall = 0.0
        if line is None:
            return []
        self.threads = 1  # said once
        return [line]


def watch_cores(config: Config, processes: int) -> Cores:
    """Return the Cores of a run; none is looked at where steps wait for a GPU, for other processes, or for a reward of the user's."""
    alone = config.device == "cpu" and processes == 1 and not config.elastic and config.reward is None
    return Cores(int(config.threads) if alone and config.threads != "auto" else 1)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


@contextmanager
def explain_memory(config: Config) -> Iterator[None]:
    """Turn memory that runs out in here into one line: what was asked for, what the run takes, what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_memory(error):
            raise
        said = " ".join(str(error).split())
        # The model goes first: room for an estimate.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        gc.collect()
        raise UserError(f"out of memory{_asked(said)}: {_lower(config)}") from None


def _asked(said: str) -> str:
    found = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", said)
    return f" (asked for {found[1]} more)" if found else ""


def _lower(config: Config) -> str:
    """Return what to lower, the figures of the estimate first."""
    figures = ""
    parts: dict[str, float] = {}
    try:
        from zoft.run.estimate import estimate_run

        found = estimate_run(config)
        names = ("weights", "momentum", "state", "base", "scratch", "frozen", "activation", "evaluation")
        parts = {name: found[f"{name}_bytes"] for name in names}
        shown = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in parts.items() if size >= 5e6)
        figures = f"the estimate is {found['peak_bytes'] / 1e9:.3g} GB ({shown}); "
    except Exception:  # an estimate that fails must not hide what happened
        pass
    ways = [f"batch_size={config.batch_size}", f"max_length={config.max_length}"]
    if config.batch_size == 1:
        ways.pop(0)
    elif config.accumulate == 1:
        ways[0] += " (accumulate makes up for it)"
    if config.probes_per_forward != 1:
        ways.append("probes_per_forward to 1")
    if config.storage in ("auto", "fp32", "fp64"):
        ways.append("storage to fp16")
    if buffer_beta(config):
        ways.append("momentum to 0")
    if (rule := rule_of(config)) and rule.state:
        ways.append("update to sgd or sign")
    if config.anchor:
        ways.append("anchor to 0")
    if parts.get("frozen", 0) >= 5e6:
        ways.append("cache_frozen to false")
    return f"{figures}lower {', '.join(ways)}"
