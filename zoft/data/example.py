"""Hold one example as token ids, and what a tokenizer puts around a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """Hold one example as token ids: a context and a completion for each candidate; nothing padded yet.

    contexts[c] + completions[c] is the row of candidate c; completions[c] is what is scored.
    gold: index of the right candidate. objective: "choice" | "lm" (the gold completion is learned).
    single: every completion is one token, all distinct, and the contexts are one and the same, for every
    example encoded together: then one row an example scores all the candidates.
    answers: texts that count as right where one is generated. golds: all right candidates, where there are several.
    masked: for a masked language model: contexts end with the mask, completions are the tokens that may fill it, and
    the row goes on with `after`, closing tokens ([SEP]) included.
    scored: which tokens of the single completion are scored, the last one among them; None: all.
    paired: the completions are two answers, the first one preferred. reference: log-probabilities of both under the
    weights that a run starts from, where they are known.
    cut: tokens that max_length took away. part: which piece of its row it is, where rows are cut into pieces.
    """

    contexts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    gold: int
    objective: str = "choice"
    single: bool = False
    answers: tuple[str, ...] = ()
    golds: tuple[int, ...] = ()
    masked: bool = False
    after: tuple[int, ...] = ()
    scored: tuple[bool, ...] | None = None
    cut: int = 0
    part: int = 0
    paired: bool = False
    reference: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        """Return tokens of the longest row."""
        rest = len(self.after) - self.masked  # what fills a mask takes no place of its own
        return max(len(a) + len(b) for a, b in zip(self.contexts, self.completions)) + rest


def front_of(tokenizer: Any) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer puts before a text."""
    return _around(tokenizer)[0]


def _back(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts behind a text."""
    return _around(tokenizer)[1]


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bare = _tokenise(tokenizer, ["a"])[0]
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: the rows are cut here, so the warning about long texts would mislead.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
