"""Define what a run minimises, by name: one number per probe, from numbers per row that add up over all of a step's rows.

choice, lm: losses of the rows, as losses.py has them. The others have no gradient; minimised is minus

    accuracy      the share of rows whose candidate of highest score is the gold one
    macro_f1      the mean F1 over labels; hits, predictions and golds of each add up over a step's microbatches
    exact_match   the mean over rows of a score of the text that the model writes after the prompt, against the answers
    f1            the same with the F1 of words
    reward        the same with a function of the user's own

Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes (arXiv 2305.17333), which minimises
-accuracy and -F1 of greedy text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.config.schema import GENERATED, VERIFIED, Config
from zoft.data.encode import prompts
from zoft.data.example import Example
from zoft.data.tasks import TaskData, subset
from zoft.errors import UserError
from zoft.method.estimators.named import forwards_per_step
from zoft.objectives import losses, verify
from zoft.objectives import text as generate
from zoft.objectives.decode import dice
from zoft.objectives.losses import Batch, mean_loss
from zoft.objectives.metrics import exact_match, token_f1
from zoft.objectives.preference import Pairs
from zoft.objectives.reward import Reward, load
from zoft.parallel.world import this_world


class Shows(Protocol):
    """Show lines to a person while a run goes on, as its tracker does."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def under_way(self, text: str) -> None:
        """Show how far what takes long is."""


@dataclass
class Goal:
    """Describe an objective as the trainer wants it.

    forward(model, batch) -> K columns, a number an example each, the last of them how many it counts for.
    value(totals [P, K]) -> [P], minimised.
    texts: where the model writes them; then a batch is Prompts.
    """

    name: str
    forward: Callable[[nn.Module, Any], tuple[Tensor, ...]] = losses.losses
    value: Callable[[Tensor], Tensor] = mean_loss
    texts: Texts | None = None
    pairs: Pairs | None = None

    def examples(self, train: Sequence[Example]) -> list[Example]:
        """Return the examples as training scores them: of `lm` the gold candidate's tokens alone, else all candidates'."""
        if self.texts is not None and len(train) != len(self.texts.train):
            raise UserError(
                f"objective={self.name}: writes a text after each row's prompt, and rows of plain text are cut into pieces; use lm"
            )
        if self.texts is not None or train[0].objective == (kind := "lm" if self.name == "lm" else "choice"):
            return list(train)
        return [replace(e, objective=kind, single=False) for e in train]

    def header(self) -> dict[str, Any]:
        """Return what a ledger's header says of it."""
        return {} if self.texts is None else self.texts.header()

    def watched(self, header: Mapping[str, Any], tracker: Shows) -> None:
        """Let a run's tracker show how far its texts are, and say where its reward is not the one it began with."""
        now, before = self.header().get("reward"), header.get("reward")
        if now != before:
            tracker.note(
                f"reward: {now} is not what this run began with, {before}; steps from here on go by it"
            )
        if self.texts is not None:
            self.texts.progress = tracker.under_way

    def evaluate(
        self, model: Any, context: Callable[[int], AbstractContextManager], rows: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Return the metrics of texts written after the prompts of rows, or of pairs; nothing where the objective has neither."""
        if self.pairs is not None:
            return self.pairs.evaluate(model, context, rows)
        return {} if self.texts is None else self.texts.evaluate(model, context, rows)


def objective_keys(config: Config, data: TaskData) -> dict[str, Any]:
    """Return the config's objective by name, and the keys that follow from it. Raises UserError for one that this task's rows cannot have."""
    name = data.objective if config.objective == "auto" else config.objective
    rows = [*data.train, *data.eval]
    if (name == "preference") != (data.objective == "preference"):
        pairs = data.objective == "preference"
        why = (
            "rows are pairs; use preference"
            if pairs
            else f"task={config.task.name} has no pairs of answers; use task=local"
        )
        raise UserError(f"objective={name}: {why}")
    if name == "preference":
        return {"objective": name}
    if name in ("choice", "accuracy", "macro_f1") and min(len(r["candidates"]) for r in rows) < 2:
        raise UserError(
            f"objective={name}: task={config.task.name} has text to learn, and no candidates; use lm, f1 or exact_match"
        )
    if name in ("accuracy", "macro_f1") and any(len(r.get("golds", ())) > 1 for r in rows):
        raise UserError(
            f"objective={name}: rows of task={config.task.name} have several right candidates; use lm or f1"
        )
    if name == "macro_f1" and len({len(r["candidates"]) for r in rows}) > 1:
        raise UserError("objective=macro_f1: rows differ in their number of candidates; use accuracy")
    if name in ("lm", *GENERATED) and any("after" in r for r in rows):
        raise UserError(
            f"objective={name}: task={config.task.name} fills a mask, and writes no text; use choice or accuracy"
        )
    if name in GENERATED and "pieces" in rows[0]:
        raise UserError(f"objective={name}: plain text has no prompt to write after; use lm")
    known = {f.name: f.default for f in fields(Config)}
    for key in ("max_new_tokens", "stop"):
        if (
            name not in GENERATED
            and not any(r.get("answers") for r in rows)
            and getattr(config, key) != known[key]
        ):
            raise UserError(
                f"{key}={getattr(config, key)!r}: task={config.task.name} has no text to write; leave it out"
            )
    if config.stop and any(config.stop in a for r in rows for a in r.get("answers", ())):
        print(
            f"stop={config.stop!r} occurs in the answers of some rows, so generation would end there; use stop=null",
            file=sys.stderr,
        )
    if name in GENERATED:
        return {"objective": name, "probes_per_forward": 1, "cache_frozen": False}
    return {"objective": name}


def reward_of(config: Config) -> Reward | None:
    """Return the reward that the command line names, whose file is run here, or the task's own. Raises UserError."""
    if config.reward is not None:
        return load(config.reward, config.reward_seconds)
    name = config.task.name
    if config.objective not in ("reward", "rank") or name not in VERIFIED:
        return None
    return Reward(
        f"task={name}", Path(verify.__file__), partial(verify.scores, name), config.reward_seconds, "its own"
    )


def make_objective(config: Config, data: TaskData, tokenizer: Any, mine: Reward | None = None) -> Goal:
    """Return the objective of a resolved config; mine: the reward, where it is one. Raises UserError for a prompt it cannot use."""
    name = config.objective
    if name == "preference":
        pairs = Pairs(config.preference_beta, data, tokenizer, config.max_length, config.device)
        return Goal(name, pairs.forward, pairs=pairs)
    if name == "accuracy":
        return Goal(name, accuracy)
    if name == "macro_f1":
        return Goal(name, label_counts, minus_macro_f1)
    if name in GENERATED:
        texts = Texts(config, data, tokenizer, mine)
        return Goal(name, texts.forward, mean_loss, texts)
    return Goal(name)


def accuracy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (-[argmax of the scores = gold] [E], ones): NaN where a score is none."""
    found = losses.scores(model, batch)  # [E, C]
    hit = (found.argmax(1) == batch.gold).to(found.dtype)
    return (0 - hit).masked_fill(found.isnan().any(1), torch.nan), torch.ones_like(hit)


def label_counts(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Return 3·C columns [E]: whether a row is a hit of label c, is predicted as c, is c; NaN where a score is none; and ones."""
    found = losses.scores(model, batch)  # [E, C]
    predicted = F.one_hot(found.argmax(1), found.shape[1])  # [E, C]
    gold = F.one_hot(batch.gold, found.shape[1])
    columns = torch.cat([predicted * gold, predicted, gold], 1).to(found.dtype)  # [E, 3C]
    columns = columns.masked_fill(found.isnan().any(1, keepdim=True), torch.nan)
    return *columns.unbind(1), torch.ones_like(columns[:, 0])


def minus_macro_f1(totals: Tensor) -> Tensor:
    """Return [P] from totals [P, 3C + 1]: minus the mean of 2·TP / (2·TP + FP + FN) over the labels that occur (metrics.macro_f1)."""
    hits, predicted, gold = totals[:, :-1].unflatten(1, (3, -1)).unbind(1)  # [P, C]
    sizes = predicted + gold
    each = torch.where(sizes == 0, 0.0, 2 * hits / sizes)
    return 0 - each.sum(1) / (sizes != 0).sum(1)


@dataclass(frozen=True)
class Prompts:
    """Hold a batch of rows to write after: which of the training rows they are."""

    picks: tuple[int, ...]
    step: int = 0

    @property
    def rows(self) -> int:
        return len(self.picks)

    examples = rows

    def repeat(self, probes: int) -> Prompts:
        assert probes == 1, f"texts at {probes} probes in one forward"
        return self


@dataclass(frozen=True)
class Scored:
    """Hold texts of some members after some rows [P, R]: what they say, their scores, their tokens. Scores are NaN throughout a member
    some of whose logits were none."""

    texts: list[list[str]]
    scores: Tensor  # fp64 [P, R]
    tokens: Tensor  # fp64 [P, R]


class Texts:
    """Generate texts after prompts and score them: of training rows at a probe, of held-out ones at θ."""

    def __init__(self, config: Config, data: TaskData, tokenizer: Any, reward: Reward | None) -> None:
        self.name, self.tokenizer = config.objective, tokenizer
        self.how: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "stop": config.stop}
        self.room, self.data = config.max_length - config.max_new_tokens, data
        self.temperature, self.seed = config.temperature, config.seed
        self.mixed = True  # whether rows of unequal length are written together, where members are
        self.train = data.train
        self.contexts = prompts(self.train, tokenizer, self.room, data)
        prompts(
            subset(data.eval, config.eval_limit), tokenizer, self.room, data
        )  # a mistake shows before training
        self.reward = reward
        assert (self.reward is None) == (self.name != "reward") or self.name == "rank", (
            config.reward,
            self.name,
        )
        self.unscored = self.name == "rank" and config.rank_by == "file" and reward is None  # by people alone
        self.progress: Callable[[str], Any] = lambda text: None
        each = forwards_per_step(config)  # texts of a step
        self.done, self.each = 0, each // this_world().size

    def forward(self, model: Any, batch: Prompts) -> tuple[Tensor, Tensor]:
        """Return (-score of each row's text [E], ones), fp64 on the CPU; NaN throughout where logits were none."""
        scores = self.rollouts(model, batch).scores[0]
        return 0 - scores, torch.ones_like(scores)

    def rollouts(self, model: Any, batch: Prompts, members: Any = None, count: int = 1) -> Scored:
        """Write after a batch's rows at each of `count` members, and score all texts at once.

        members: probe.Members inside their `at`; None: the model as it is, count 1.
        """

        def did(rows: int) -> None:
            self.done = self.done % self.each + rows
            if self.done < self.each:  # after the last one comes the step's own line
                self.progress(f"{self.done} of {self.each} texts")

        contexts = [self.contexts[i] for i in batch.picks]
        if members is None and not self.temperature:
            made = generate.texts(model, self.tokenizer, contexts, context=None, progress=did, **self.how)
        else:
            u = (
                dice(self.seed, batch.step, batch.picks, self.how["max_new_tokens"])
                if self.temperature
                else None
            )
            made = generate.texts_of_members(
                model, self.tokenizer, contexts, members, count, mixed=self.mixed, temperature=self.temperature, u=u,
                progress=did, **self.how,
            )  # fmt: skip
        n = batch.rows
        grid = [made[p * n : (p + 1) * n] for p in range(count)]
        sound = [p for p, row in enumerate(grid) if all(text.sound for text in row)]
        scores = torch.full((count, n), torch.nan, dtype=torch.float64)
        if sound:
            rows = [self.train[i] for i in batch.picks] * len(sound)
            found = self.scores(self.name, rows, [text.text for p in sound for text in grid[p]], len(sound))
            scores[sound] = torch.tensor(found, dtype=torch.float64).view(len(sound), n)
        tokens = torch.tensor([[float(text.tokens) for text in row] for row in grid], dtype=torch.float64)
        return Scored([[text.text for text in row] for row in grid], scores, tokens)

    def evaluate(
        self, model: Any, context: Callable[[int], AbstractContextManager], rows: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Return {exact_match, f1}, or {reward}, of held-out rows."""
        _, found = self.judge(model, context, rows)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def judge(
        self,
        model: Any,
        context: Callable[[int], AbstractContextManager] | None,
        rows: Sequence[dict[str, Any]],
    ) -> tuple[list[str], dict[str, list[float]]]:
        """Return (the text written after each row, {metric: a number per row})."""
        done, contexts = 0, prompts(rows, self.tokenizer, self.room, self.data)

        def did(count: int) -> None:
            nonlocal done
            done += count
            if done < len(rows):
                self.progress(f"evaluation, {done} of {len(rows)} texts")

        texts = generate.generate(model, self.tokenizer, contexts, context=context, progress=did, **self.how)
        names = ("reward",) if self.reward else ("exact_match", "f1")
        return texts, {n: self.scores(n, rows, texts) for n in names}

    def scores(
        self, name: str, rows: Sequence[dict[str, Any]], texts: Sequence[str], members: int = 1
    ) -> list[float]:
        """Return a number per row, the larger the better; a reward may take reward_seconds for each of so many members."""
        if name == "rank" and self.unscored:
            return [0.0] * len(rows)
        if name == "reward" or (name == "rank" and self.reward is not None):
            assert self.reward is not None
            shown = [{"prompt": r["prompt"], **r.get("columns", {})} for r in rows]
            return self.reward(shown, texts, [r["where"] for r in rows], members)
        score = exact_match if name == "exact_match" else token_f1
        return [score(text, answers(row)) for row, text in zip(rows, texts, strict=True)]

    def header(self) -> dict[str, Any]:
        """Return what the scores read beside the prompts, and which reward it was."""
        h = hashlib.blake2b(digest_size=16)
        for row in self.train:
            h.update(json.dumps([answers(row), row.get("columns", {})], default=str).encode())
        found = {"rows": f"blake2b:{h.hexdigest()}"}
        return found | ({"reward": f"{self.reward.name} {self.reward.digest}"} if self.reward else {})


def answers(row: Mapping[str, Any]) -> list[str]:
    """Return the texts that would be right: the row's own answers, or its right candidates."""
    return list(row.get("answers") or [row["candidates"][g] for g in row.get("golds") or [row["gold"]]])
