"""What a run minimises, by name: one number a probe, from numbers a row that add up over all of a step's rows.

choice, lm: losses of the rows, as objective.py has them. The others have no gradient; minimised is minus

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft import generate, metrics, objective
from zoft import reward as rewards
from zoft.config import GENERATED, Config
from zoft.encode import Example, prompts
from zoft.errors import UserError
from zoft.objective import Batch
from zoft.tasks import TaskData, subset

if TYPE_CHECKING:
    from zoft.tracking import Tracker


@dataclass
class Goal:
    """An objective as the trainer wants it.

    forward(model, batch) -> K columns, a number an example each. value(totals [P, K]) -> [P], minimised.
    texts: where the model writes them; then a batch is Prompts.
    """

    name: str
    forward: Callable[[nn.Module, Any], tuple[Tensor, ...]] = objective.losses
    value: Callable[[Tensor], Tensor] = objective.mean
    texts: Texts | None = None

    def examples(self, train: Sequence[Example]) -> list[Example]:
        """The examples as training scores them: of `lm` on a task of candidates, the gold one's tokens alone."""
        if self.name == "lm" and train[0].objective == "choice":
            return [replace(e, objective="lm", single=False) for e in train]
        return list(train)

    def header(self) -> dict[str, Any]:
        """What a ledger's header says of it."""
        return {} if self.texts is None else self.texts.header()

    def watched(self, header: Mapping[str, Any], tracker: Tracker) -> None:
        """Let a run's tracker show how far its texts are, and say where its reward is not the one it began with."""
        now, before = self.header().get("reward"), header.get("reward")
        if now != before:
            tracker.note(
                f"reward: {now} is not what this run began with, {before}; steps from here on go by it"
            )
        if self.texts is not None:
            self.texts.progress = tracker.under_way

    def evaluate(self, model: Any, context: Callable[[int], AbstractContextManager]) -> dict[str, float]:
        """Metrics of texts written after the evaluation's prompts; nothing where the objective writes none."""
        return {} if self.texts is None else self.texts.evaluate(model, context)


def resolve(config: Config, data: TaskData) -> Config:
    """The config with its objective named. Raises UserError for one that this task's rows cannot have."""
    name = data.objective if config.objective == "auto" else config.objective
    if name in ("choice", "accuracy", "macro_f1") and data.objective != "choice":
        raise UserError(
            f"objective={name}: task={config.task.name} has text to learn, and no candidates; use lm, f1 or exact_match"
        )
    if name == "macro_f1" and len({len(r["candidates"]) for r in [*data.train, *data.eval]}) > 1:
        raise UserError("objective=macro_f1: rows differ in their number of candidates; use accuracy")
    if name in GENERATED:
        config = replace(config, probes_per_forward=1, cache_frozen=False)
    return replace(config, objective=name)


def make(config: Config, data: TaskData, tokenizer: Any) -> Goal:
    """The objective of a resolved config. Raises UserError for a prompt or a reward that it cannot use."""
    name = config.objective
    if name == "accuracy":
        return Goal(name, accuracy)
    if name == "macro_f1":
        return Goal(name, label_counts, minus_macro_f1)
    if name in GENERATED:
        texts = Texts(config, data, tokenizer)
        return Goal(name, texts.forward, objective.mean, texts)
    return Goal(name)


def accuracy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(-[argmax of the scores = gold] [E], ones): NaN where a score is none."""
    found = objective.scores(model, batch)  # [E, C]
    hit = (found.argmax(1) == batch.gold).to(found.dtype)
    return (0 - hit).masked_fill(found.isnan().any(1), torch.nan), torch.ones_like(hit)


def label_counts(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """3·C columns [E]: whether a row is a hit of label c, is predicted as c, is c; NaN where a score is none."""
    found = objective.scores(model, batch)  # [E, C]
    predicted = F.one_hot(found.argmax(1), found.shape[1])  # [E, C]
    gold = F.one_hot(batch.gold, found.shape[1])
    columns = torch.cat([predicted * gold, predicted, gold], 1).to(found.dtype)  # [E, 3C]
    return columns.masked_fill(found.isnan().any(1, keepdim=True), torch.nan).unbind(1)


def minus_macro_f1(totals: Tensor) -> Tensor:
    """[P] from totals [P, 3C]: minus the mean of 2·TP / (2·TP + FP + FN) over the labels that occur (metrics.macro_f1)."""
    hits, predicted, gold = totals.unflatten(1, (3, -1)).unbind(1)  # [P, C]
    sizes = predicted + gold
    each = torch.where(sizes == 0, 0.0, 2 * hits / sizes)
    return 0 - each.sum(1) / (sizes != 0).sum(1)


@dataclass(frozen=True)
class Prompts:
    """A batch of rows to write after: which of the training rows they are."""

    picks: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.picks)

    examples = rows

    def repeat(self, probes: int) -> Prompts:
        assert probes == 1, f"texts at {probes} probes in one forward"
        return self


class Texts:
    """Texts that the model writes after prompts, and their scores: of training rows at a probe, of held-out ones at θ."""

    def __init__(self, config: Config, data: TaskData, tokenizer: Any) -> None:
        self.name, self.tokenizer = config.objective, tokenizer
        self.how: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "stop": config.stop}
        room = config.max_length - config.max_new_tokens
        self.train, self.held_out = data.train, subset(data.eval, config.eval_limit)
        self.contexts = prompts(self.train, tokenizer, room)
        self.eval_contexts = prompts(self.held_out, tokenizer, room)
        self.reward = None if config.reward is None else rewards.load(config.reward, config.reward_seconds)
        assert (self.reward is None) == (self.name != "reward"), (config.reward, self.name)
        self.progress: Callable[[str], Any] = lambda text: None
        self.done, self.each = 0, 2 * config.q * config.batch_size * config.accumulate  # texts of a step

    def forward(self, model: Any, batch: Prompts) -> tuple[Tensor, Tensor]:
        """(-score of each row's text [E], ones), fp64 on the CPU; NaN throughout where logits were none."""

        def did(rows: int) -> None:
            self.done = self.done % self.each + rows
            self.progress(f"{self.done} of {self.each} texts")

        made = generate.texts(
            model,
            self.tokenizer,
            [self.contexts[i] for i in batch.picks],
            context=None,
            progress=did,
            **self.how,
        )
        ones = torch.ones(batch.rows, dtype=torch.float64)
        if not all(sound for _, sound in made):
            return ones * torch.nan, ones
        scores = self.scores(self.name, [self.train[i] for i in batch.picks], [text for text, _ in made])
        return 0 - torch.tensor(scores, dtype=torch.float64), ones

    def evaluate(self, model: Any, context: Callable[[int], AbstractContextManager]) -> dict[str, float]:
        """{exact_match, f1}, or {reward}, of the held-out rows."""
        done = 0

        def did(rows: int) -> None:
            nonlocal done
            done += rows
            self.progress(f"evaluation, {done} of {len(self.held_out)} texts")

        texts = generate.generate(
            model, self.tokenizer, self.eval_contexts, context=context, progress=did, **self.how
        )
        names = ("reward",) if self.reward else ("exact_match", "f1")
        return {n: sum(self.scores(n, self.held_out, texts)) / len(texts) for n in names}

    def scores(self, name: str, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[float]:
        """A number a row, the larger the better."""
        if name == "reward":
            assert self.reward is not None
            shown = [{"prompt": r["prompt"], **r.get("columns", {})} for r in rows]
            return self.reward(shown, texts, [r["where"] for r in rows])
        score = metrics.exact_match if name == "exact_match" else metrics.token_f1
        return [score(text, answers(row)) for row, text in zip(rows, texts, strict=True)]

    def header(self) -> dict[str, Any]:
        """What the scores read beside the prompts, and which reward it was."""
        h = hashlib.blake2b(digest_size=16)
        for row in self.train:
            h.update(json.dumps([answers(row), row.get("columns", {})], default=str).encode())
        found = {"rows": f"blake2b:{h.hexdigest()}"}
        return found | ({"reward": f"{self.reward.name} {self.reward.digest}"} if self.reward else {})


def answers(row: Mapping[str, Any]) -> list[str]:
    """The texts that would be right: the row's own answers, or its gold candidate."""
    return list(row.get("answers") or [row["candidates"][row["gold"]]])
