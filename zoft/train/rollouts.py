"""Steps whose losses are rewards of written text: many members in one batch, their rewards shaped, what they wrote counted."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.ledger.log import Ledger, Record
from zoft.method.estimators.estimator import Probe, finite
from zoft.method.estimators.named import estimator_of, probes_per_step
from zoft.method.ranking import Order, order_of, rank_coefficients, weights
from zoft.method.shaping import shape_rewards
from zoft.models.calls import cache_name
from zoft.models.kind import refuse_longer_rows
from zoft.noise.spec import Update
from zoft.objectives import text
from zoft.objectives.decode import decode
from zoft.objectives.objectives import Prompts, Scored, Texts
from zoft.parallel.world import STOP, this_world
from zoft.probe.axis import ProbeAxis
from zoft.probe.inplace import InPlace
from zoft.probe.members import Members, why_alone
from zoft.probe.nodes import NodeAxis
from zoft.probe.rows import Unfit
from zoft.signals import Stopped
from zoft.train.asked import Rollouts, answered, ask, place_of, question_name
from zoft.train.axis import memory_left
from zoft.train.parts import say
from zoft.train.trainer import Settings, Trainer

PROVED = 5  # tokens; on a GPU the third and later ones come of a captured forward
MANY_FLAT = 20  # steps without spread in a row after which a line says what helps


@dataclass(frozen=True)
class Seen:
    """Hold what a step's members wrote [P, N]: rewards, tokens, and a number for each text that equal texts share."""

    rewards: Tensor
    tokens: Tensor
    marks: Tensor


class RolloutTrainer(Trainer):
    """Train with losses that are minus the rewards of texts.

    texts: the objective's. members: where the members of a step write together, settings.members_per_batch at a time.
    """

    def __init__(
        self, model: nn.Module, axis: ProbeAxis | InPlace, batches: Callable[[int], Sequence[Any]], ledger: Ledger | None,
        settings: Settings, texts: Texts, members: Members | None,
    ) -> None:  # fmt: skip
        super().__init__(model, axis, batches, ledger, settings)
        self.texts, self.members = texts, members
        self.seen: Seen | None = None  # of the step's first round
        self.orders: list[Order] = []  # of the step's members, after each prompt, where they are ranked
        self.flat_in_a_row = 0

    def step(self) -> dict[str, Any] | None:
        """Update θ once; the step's metrics have the rewards' mean and spread, the texts' length, and how many differ."""
        self.seen = None
        metrics = super().step()
        return metrics if metrics is None or self.seen is None else metrics | told(self.seen)

    @torch.no_grad()
    def losses_at(self, step: int, probes: Sequence[Probe], batches: Sequence[Any]) -> list[float]:
        """Return minus the mean reward at each probe [len(probes)], over all rows of the step."""
        s, world = self.settings, self.world
        if s.rank_by == "file":
            return self.ranked_by_people(step, probes, batches)
        mine = probes[world.probes(len(probes))]
        group = s.members_per_batch if self.members is not None else 1
        n = s.batch_size * s.accumulate
        own = world.examples(range(s.batch_size))
        totals = torch.zeros(len(mine), n, 3, dtype=torch.float64)  # of other processes' rows: 0
        for i in range(0, len(mine), group):
            here = mine[i : i + group]
            for j, batch in enumerate(batches):
                places = [j * s.batch_size + e for e in own]
                if places:
                    totals[i : i + len(here), places] = numbers(self.rolled(step, here, batch))
        self.axis.settle()
        counts = torch.full((len(mine), 1), float(len(own) * len(batches)), dtype=torch.float64)
        every = torch.cat([totals.flatten(1), counts], 1)
        if world.size > 1:
            every, flags = world.exchange(every)
            self.halted = self.halted or bool(int(flags) & STOP)
        rewards, tokens, marks = every[:, :-1].view(-1, n, 3).unbind(2)
        if self.seen is None:
            self.seen = Seen(rewards, tokens, marks)
        if s.objective == "rank" and finite(rewards.flatten().tolist()):
            self.orders = [order_of(column, s.rank_best) for column in rewards.T.tolist()]
            return losses_of_orders(self.orders, len(probes))
        return (0 - rewards.sum(1) / n).tolist()

    def ranked_by_people(self, step: int, probes: Sequence[Probe], batches: Sequence[Any]) -> list[float]:
        """Do as `losses_at`, with rankings in the run's folder. Raises Stopped (75) where the step's question is not answered yet."""
        group = self.settings.members_per_batch if self.members is not None else 1
        self.orders, wrote = self.asked_people(step, lambda: self.all_rolled(step, probes, batches, group))
        marks = torch.tensor([[mark(text) for text in row] for row in wrote.texts], dtype=torch.float64)
        scores, tokens = (torch.tensor(x, dtype=torch.float64) for x in (wrote.scores, wrote.tokens))
        self.seen = Seen(scores, tokens, marks)
        return losses_of_orders(self.orders, len(probes))

    def asked_people(
        self, step: int, write: Callable[[], Rollouts], line: bool = False
    ) -> tuple[list[Order], Rollouts]:
        """Return the rankings of a step's members (or of its line) and what they wrote; without an answer raise Stopped (75)."""
        assert self.ledger is not None and self.ledger.path is not None, "a run's folder"
        folder, name = self.ledger.path.parent, question_name(step, line)
        found = answered(folder, name)
        if found is not None:
            return found
        if not place_of(folder, name).exists():
            ask(folder, name, step, self.settings.seed, write())
        raise Stopped(
            0, str(folder),
            f"step {step}: waits for a ranking, by `zoft rank {folder}` or in {place_of(folder, name, 'answer')}",
        )  # fmt: skip

    def all_rolled(
        self,
        step: int,
        probes: Sequence[Probe],
        batches: Sequence[Any],
        group: int,
        line: Sequence[float] | None = None,
    ) -> Rollouts:
        """Return what all members write after all rows of a step; line: see Members.at."""
        prompts = [self.texts.train[i]["prompt"] for batch in batches for i in batch.picks]
        texts: list[list[str]] = []
        tokens: list[list[float]] = []
        scores: list[list[float]] = []
        for i in range(0, len(probes), group):
            here = probes[i : i + group]
            parts = [self.rolled(step, here, batch, line) for batch in batches]
            texts += [sum((part.texts[p] for part in parts), []) for p in range(len(here))]
            tokens += torch.cat([part.tokens for part in parts], 1).tolist()
            scores += torch.cat([part.scores for part in parts], 1).tolist()
        self.axis.settle()
        return Rollouts(prompts, texts, tokens, scores)

    def chosen(self, change: Update, batches: Sequence[Any]) -> Update:
        """Return the point of a step's line that is ranked best: its multipliers times 1, 1/2, 1/4, …, or 0.

        Of points that tie the longest step is taken, but for θ itself, which comes last.
        """
        n = self.settings.rank_line
        if not n:
            return super().chosen(change, batches)
        assert self.members is not None, "a line is written at by members"
        factors = [0.5**j for j in range(n)] + [0.0]
        points = [Probe(0, f) for f in factors]
        if self.settings.rank_by == "file":
            orders, _ = self.asked_people(
                change.step,
                lambda: self.all_rolled(change.step, points, batches, len(points), change.multipliers),
                True,
            )
        else:
            found = self.all_rolled(change.step, points, batches, len(points), change.multipliers)
            if not finite([x for row in found.scores for x in row]):
                return replace(change, multipliers=(math.nan,) * len(change.multipliers))
            orders = [order_of(list(column)) for column in zip(*found.scores)]
        w, _ = weights(orders, len(points))
        best = factors[w.index(max(w))]
        return replace(change, multipliers=tuple(float(np.float32(m * best)) for m in change.multipliers))

    def rolled(
        self, step: int, probes: Sequence[Probe], batch: Prompts, line: Sequence[float] | None = None
    ) -> Scored:
        """Return what each of some members writes after a batch's rows, scored."""
        if self.members is None:
            (probe,) = probes
            with self.axis.at(step, [probe], batch.rows):
                found = self.texts.rollouts(self.model, batch)
        else:
            with self.members.at(step, probes, line):
                found = self.texts.rollouts(self.model, batch, self.members, len(probes))
        self.forwards += batch.rows * len(probes)
        return found

    def estimate(self, losses: Sequence[float]) -> tuple[list[float], Tensor]:
        """Return a step's coefficients from its rewards as they are, or shaped."""
        s = self.settings
        self.flat = False
        if s.objective == "rank" and finite(losses):
            w, pairs = weights(self.orders, len(self.probes))
            self.flat = pairs == 0
            directions = self.estimator.directions(s.q)
            found = [0.0] * directions if self.flat else rank_coefficients(w, pairs, self.probes, directions)
            return found, self.state
        if s.shaping == "none" or not finite(losses):
            return super().estimate(losses)
        assert self.seen is not None
        shaped = shape_rewards(self.seen.rewards, s.shaping, s.shaping_group)
        if shaped is None:
            self.flat = True
            return [0.0] * self.estimator.directions(s.q), self.state
        values = (0 - shaped).to(self.state.device)
        coefficients, state = self.estimator.run(values, s.q, torch.ones_like(self.eps), self.state)
        return coefficients.tolist(), state

    def count_skipped(self, record: Record) -> None:
        """Count steps whose rewards were no numbers; those whose members all had one reward are not of them."""
        flat = record.skipped and finite(record.losses)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.skipped and not flat else 0
        self.flat_in_a_row = self.flat_in_a_row + 1 if flat else 0
        if self.flat_in_a_row == MANY_FLAT:
            print(
                f"step {record.step}: {MANY_FLAT} steps in a row were skipped, for all their members had one reward: raise eps "
                "so that texts differ, or q or batch_size, or take a reward that has more than two values",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def numbers(found: Scored) -> Tensor:
    """Return [P, R, 3]: score, tokens and mark of each text."""
    marks = torch.tensor([[mark(text) for text in row] for row in found.texts], dtype=torch.float64)
    return torch.stack([found.scores, found.tokens, marks], -1)


def losses_of_orders(orders: Sequence[Order], members: int) -> list[float]:
    """Return what a ledger keeps of ranked members [P]: minus the mean share of others each is better than, from -1 to 1."""
    w, _ = weights(orders, members)
    return [0.0 - x / (len(orders) * max(1, members - 1)) for x in w]


def mark(text: str) -> float:
    """Return 48 bits of a text's hash: a whole number that fp64 holds."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def told(seen: Seen) -> dict[str, float]:
    """Return what metrics.jsonl says of a step's texts.

    reward: the mean. reward_spread: standard deviation over members of their mean reward. length: mean tokens. differ: share of
    texts that are not what most members wrote after the same prompt.
    """
    means = seen.rewards.mean(1)  # [P]
    same = (
        (seen.marks[None] == seen.marks[:, None]).sum(1).amax(0)
    )  # [N]: members that wrote the commonest text
    return {
        "reward": float(means.mean()),
        "reward_spread": float(means.std(unbiased=False)),
        "length": float(seen.tokens.mean()),
        "differ": float(1 - same.double().mean() / len(seen.marks)),
    }


# ---- how many members write together ---------------------------------------------------------------------------------


def with_members(
    config: Config, model: nn.Module, tokenizer: Any, axis: ProbeAxis | InPlace | NodeAxis, texts: Texts
) -> tuple[Config, Members | None]:
    """Resolve members_per_batch: (the config, the members, or None where they write one after another).

    Raises UserError where more than one member is asked for and cannot be.
    """
    asked, world = config.members_per_batch, this_world()
    for key, idle in (("rank_by", "score"), ("rank_line", 0)):
        if world.size > 1 and getattr(config, key) != idle:
            raise UserError(f"{key}={getattr(config, key)}: one process ranks; leave --nproc out")
    auto = asked == "auto"
    if (asked == 1 and not config.rank_line) or config.elastic or isinstance(axis, NodeAxis):
        return replace(config, members_per_batch=1), None
    why = why_alone(axis, sum(p.numel() for p in model.parameters()))
    members, room = None, 0
    if not why:
        assert isinstance(axis, ProbeAxis)
        copies = Members(axis).copied_bytes()
        members = Members(axis, copies=config.hold_probe is True and copies <= memory_left(config.device))
        why, room = prove(config, model, tokenizer, axis, members, texts)
    if not world.all(not why):
        why = why or "another process of this run cannot"
        if config.rank_line:
            raise UserError(
                f"rank_line={config.rank_line}: its points are written at together, and {why}; leave it out"
            )
        if not auto:
            raise UserError(f"members_per_batch={asked}: {why}; use 1")
        gain = probes_per_step(config)
        if gain > 1 and "noise=" in why:
            say(
                f"text is generated for one member at a time: {why}; with noise=rank1 (or train=lora) the {gain} members of a step write "
                "in one batch over one copy of the weights"
            )
        elif gain > 1:
            say(f"text is generated for one member at a time: {why}")
        return replace(config, members_per_batch=1), None
    probes = probes_per_step(config)
    fit = min(probes, max(1, room)) if auto else min(int(asked), probes)
    fit = world.minimum(math.ceil(probes / math.ceil(probes / fit)) if auto else fit)
    return replace(config, members_per_batch=fit), members


@torch.no_grad()
def prove(
    config: Config, model: Any, tokenizer: Any, axis: ProbeAxis, members: Members, texts: Texts
) -> tuple[str, int]:
    """Compare what members compute together with what each computes alone, on the run's own prompts.

    The logits of the first tokens, at up to three probes of a step, after the shortest and the longest prompt; then of both prompts
    side by side, padded: where only these differ, rows of one length go together (texts.mixed). Returns (why not, or "";
    how many members half of the free memory has room for).
    """
    probes = estimator_of(config).probes(config.q, config.eps)
    some = list(dict.fromkeys([probes[0], probes[-1], probes[len(probes) // 2]]))
    short, long = min(texts.contexts, key=len), max(texts.contexts, key=len)
    refuse_longer_rows(model, len(long), config.max_new_tokens)
    ends, pad = text._special(model, tokenizer)
    tokens, tolerance = min(PROVED, config.max_new_tokens), text._tolerance(model)
    took: list[float] = []

    def together(rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [P, R, V] of each token."""
        found: list[Tensor] = []
        with members.at(0, some):
            decode(
                model, rows, members, count=len(some), pad=pad, ends=[], max_new_tokens=tokens,
                watch=lambda x: found.append(x.double().view(len(some), len(rows), -1).clone()),
                cache_seen=lambda size, length: took.append(size / length / (len(some) * len(rows))),
            )  # fmt: skip
        return found

    def alike(mine: list[Tensor], other: list[Tensor]) -> bool:
        """mine, other: logits [V] of each token; those after a token that differs are of other texts."""
        for x, y in zip(mine, other, strict=True):
            finite_ones = y[y.isfinite()]
            if not bool(((x - y).abs() <= tolerance * finite_ones.std()).logical_or(x == y).all()):
                return False
            if int(x.argmax()) != int(y.argmax()):
                return True
        return True

    if cache_name(model) is None:
        return f"{type(model).__name__} has no cache of keys and values", 0
    try:
        with text._plain(model):
            texts.mixed = True
            for context in dict.fromkeys((short, long)):
                mine = together([context])
                for p, probe in enumerate(some):
                    with axis.at(0, [probe], 1):
                        out = text._run(
                            model,
                            [context],
                            pad,
                            max_new_tokens=tokens,
                            output_logits=True,
                            return_dict_in_generate=True,
                        )
                    alone = [x[0].double() for x in out.logits]
                    if not alike([x[p, 0] for x in mine], alone):
                        return "members that write together have other logits than one alone", 0
            if len(short) != len(long):
                both = together([short, long])
                lone = together([short])
                texts.mixed = all(
                    alike([x[p, 0] for x in both], [x[p, 0] for x in lone]) for p in range(len(some))
                )
                texts.mixed = this_world().all(texts.mixed)
    except Unfit as error:
        return str(error), 0
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        return (
            f"{type(model).__name__} does not write with a static cache ({' '.join(str(error).split())[:80]})",
            0,
        )
    rows = max(1, len(this_world().examples(range(config.batch_size))))
    length = len(long) + config.max_new_tokens
    vocabulary = int(mine[0].shape[-1])
    each = rows * (took[0] * length + 16 * vocabulary) + members.held_bytes(1)
    return "", int(memory_left(config.device) // 2 // max(1, each))
