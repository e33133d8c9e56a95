"""Advice while it is cheap: settings far from any that worked, a run that goes nowhere, and memory that is not there."""

from __future__ import annotations

import gc
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.config import GENERATED, NO_GRADIENT, Config
from zoft.errors import UserError

if TYPE_CHECKING:
    from zoft.space import Trained


@dataclass(frozen=True)
class Known:
    """Settings that a paper searched: lowest and highest lr and eps, on models that trained `numbers` and more."""

    what: str
    lr: tuple[float, float]
    eps: tuple[float, float]
    numbers: float
    far: float  # times the highest lr, a run seldom survives


# Malladi et al. 2023 (MeZO), grids of appendix E.3: RoBERTa-large and OPT, q = 1, no momentum. `numbers` are
# RoBERTa-large's: all of it, LoRA of rank 8 on queries and values, prefixes of 5.
# far: SmolLM2's last 2 blocks learn at 1e-3 and are destroyed at 2e-3, 4 times what scaling by numbers gives
# (docs/decisions.md); adapters of small models bear more: LoRA on its last 2 blocks learns at 10 times that.
WEIGHTS = Known("all weights", (1e-7, 1e-5), (1e-3, 1e-3), 3.5e8, 3)
LORA = Known("LoRA", (1e-5, 1e-4), (1e-3, 1e-2), 7.9e5, 30)
PREFIX = Known("prefixes", (1e-3, 1e-1), (1e-1, 1e-1), 2.5e5, 30)
FAR_BELOW, FAR_EPS = 0.1, 10.0  # a tenth of the lowest lr wastes time

ZERO_STEPS = 20  # steps in a row with a projected gradient of exactly 0
CROWDED = 0.6  # share of their CPU time below which threads wait for each other more than they work
LOOK_SECONDS = 60.0  # of steps between two looks at it
WINDOW = 100  # steps whose losses are compared with the first ones'


def known(config: Config) -> Known | None:
    """What is known of training what this config trains; None: nothing."""
    # Prompts, and the scales of a quantisation, are in no grid of that paper.
    if config.recipe == "qzo" or config.train in ("prompt", "scales"):
        return None
    return {"lora": LORA, "prefix": PREFIX}.get(config.train, WEIGHTS)


def lr_range(config: Config, k: Known, numbers: int) -> tuple[float, float]:
    """The range of lr that `k` means for this run.

    The variance of c·z grows with the count of trained numbers, so fewer of them bear a larger lr, in proportion:
    350 M at 1e-5 and 7 M at 5e-4 are the same edge. The mean of q directions bears q times as much; momentum adds
    1/(1 - momentum) steps to each.
    """
    scale = max(1.0, k.numbers / max(numbers, 1)) * config.q * (1 - config.momentum)
    return k.lr[0] * scale, k.lr[1] * scale


def at_start(config: Config, trained: Sequence[Trained]) -> list[str]:
    """A line for each of lr and eps that is far outside of what is known to work, and for what is slow or moves nothing."""
    k, lines = known(config), []
    if config.lr == 0:
        lines.append("lr=0: no step will change a weight")
    if config.device.startswith("cuda") and config.compute == "fp32":  # a GGUF file's weights load as fp32
        lines.append("compute=fp32: the GPU's tensor cores stand idle; compute=bf16 uses them")
    if k is None:
        return lines
    numbers = sum(t.stored.numel() for t in trained)
    low, high = lr_range(config, k, numbers)
    if config.update == "adam" and config.train == "all" and config.q == 1:
        exactly = "" if config.noise == "rademacher" else "nearly "
        lines.append(
            f"update=adam: with q=1 and train=all this is {exactly}momentum divided by one number, and its moments take "
            f"{8 * numbers / 1e9:.2g} GB (8 bytes per trained number); for small trained sets, or a large q"
        )
    # With meazo or an update rule, lr is the size of a step; nobody has searched that.
    if (
        config.lr
        and not config.meazo
        and config.update == "sgd"
        and not FAR_BELOW * low <= config.lr <= k.far * high
    ):
        lines.append(
            f"lr={config.lr:g} is far {'above' if config.lr > high else 'below'} what is known to work: "
            f"{low:.1g} to {high:.1g} for {numbers:,} trained numbers ({_paper(k)})"
        )
    if not k.eps[0] / FAR_EPS <= config.eps <= FAR_EPS * k.eps[1]:
        lines.append(
            f"eps={config.eps:g} is far {'above' if config.eps > k.eps[1] else 'below'} what is known to work: {_paper(k)}"
        )
    return lines


def _paper(k: Known) -> str:
    eps = f"{k.eps[0]:g}" if k.eps[0] == k.eps[1] else f"{k.eps[0]:g} to {k.eps[1]:g}"
    return f"MeZO's paper, {k.what}: lr {k.lr[0]:g} to {k.lr[1]:g}, eps {eps}"


class Watch:
    """Looks at each step's metrics and says, once each, what has gone wrong for long.

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
            return self._once("skip", f"step {step}: the loss is not finite, the step is skipped; {limit}")
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
        c, k = self.config, known(self.config)
        text = (
            f"the loss has been above its start for {self.above} steps ({_median(self.first):.3g} → "
            f"{_median(self.last):.3g}, medians of {self.window}): start again with a lower lr than {c.lr:g}"
        )
        if k is None or c.meazo or c.update != "sgd":
            return text
        low, high = lr_range(c, k, sum(t.stored.numel() for t in self.trained))
        here = "" if (low, high) == k.lr else f", which means {low:.1g} to {high:.1g} here"
        return f"{text} ({_paper(k)}{here})"

    def _stuck(self, loss: float) -> str:
        c, text = self.config, f"the projected gradient has been 0 for {self.zeros} steps: "
        if c.objective in NO_GRADIENT:
            return (
                f"{text}both probes of a direction have the same {c.objective} ({0 - loss:.4g}), which moves by whole rows only: "
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


def crowded(cpu_s: float, wall_s: float, threads: int) -> str | None:
    """A line where `threads` had little of the CPU time that so many can use: each barrier then waits for whoever is off the CPU."""
    share = cpu_s / (wall_s * threads)
    if threads == 1 or share >= CROWDED:
        return None
    fewer = min(threads - 1, max(1, int(cpu_s / wall_s)))
    return (
        f"threads={threads}: in the last {wall_s:.0f} s of steps they had {share:.0%} of the CPU time of {threads} cores: other "
        f"programs or a limit take the rest, or they wait for each other; threads={fewer} may be faster"
    )


class Cores:
    """Looks how much CPU time the steps of a run get, and says once where its threads wait for each other.

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
        """What was done since the last step was no step."""
        self.last = self.clocks()

    def step(self) -> list[str]:
        """A step is done; returns lines for the reader."""
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


def cores(config: Config, processes: int) -> Cores:
    """The Cores of a run; none is looked at where steps wait for a GPU, for other processes, or for a reward of the user's."""
    alone = config.device == "cpu" and processes == 1 and not config.elastic and config.reward is None
    return Cores(int(config.threads) if alone and config.threads != "auto" else 1)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


def is_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a CPU or a GPU."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in words)


@contextmanager
def memory(config: Config) -> Iterator[None]:
    """Memory that runs out in here is one line: what was asked for, what the run takes, what to lower."""
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
    """What to lower, the figures of the estimate first."""
    figures = ""
    parts: dict[str, float] = {}
    try:
        from zoft import estimate

        found = estimate.estimate(config)
        names = ("weights", "momentum", "state", "scratch", "frozen", "activation", "evaluation")
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
    if config.momentum:
        ways.append("momentum to 0")
    if config.update == "adam":
        ways.append("update to sgd or sign")
    if parts.get("frozen", 0) >= 5e6:
        ways.append("cache_frozen to false")
    return f"{figures}lower {', '.join(ways)}"
