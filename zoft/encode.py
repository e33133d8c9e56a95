"""From text to token ids: where the prompt ends, what is scored, what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zoft.errors import UserError


@dataclass(frozen=True)
class Example:
    """One example as token ids: a context and a completion for each candidate; nothing padded yet.

    contexts[c] + completions[c] is the row of candidate c; completions[c] is what is scored.
    gold: index of the right candidate. objective: "choice" | "lm" (the gold completion is learned).
    single: every completion is one token, all distinct, and the contexts are one and the same, for every
    example encoded together: then one row an example scores all the candidates.
    answers: texts that count as right where one is generated. golds: all right candidates, where there are several.
    masked: for a masked language model: contexts end with the mask, completions are the tokens that may fill it, and
    the row goes on with `after`, closing tokens ([SEP]) included.
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

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        rest = len(self.after) - self.masked  # what fills a mask takes no place of its own
        return max(len(a) + len(b) for a, b in zip(self.contexts, self.completions)) + rest


def encode(rows: Sequence[dict], tokenizer: Any, task: Any, max_length: int) -> list[Example]:
    """Tokenise rendered rows, finding for each candidate the token at which it begins.

    Prompt and candidate are tokenised together, as the model will read them; the candidate begins where the
    tokens stop agreeing with the prompt's own, so a token that merges the end of a prompt with the start of
    a candidate is the candidate's. Special tokens that the tokenizer puts in front (BOS) are kept, those it
    puts behind (EOS) are not added. A row longer than max_length loses tokens from the left of its prompt
    (after BOS), up to one place for all its candidates. Rows that go on behind a mask: see `encode_masked`.

    rows: dicts {prompt: str, candidates: [str], gold: int, where: str, …}, as `zoft.tasks` renders them.
    task: anything with `.objective` ("choice" | "lm"). max_length: tokens a row, BOS and candidate included.
    Returns one Example a row, in order.
    Errors: UserError naming the row where a candidate has no token of its own, nothing precedes it, or it
    does not fit in max_length.
    """
    if rows and "after" in rows[0]:
        out = encode_masked(rows, tokenizer, max_length)
        return [replace(e, single=True) for e in out] if _single(out) else out
    front = _front(tokenizer)
    prompts = _tokenise(tokenizer, [row["prompt"] for row in rows])
    whole = iter(_tokenise(tokenizer, [row["prompt"] + c for row in rows for c in row["candidates"]]))
    out = []
    for row, prompt in zip(rows, prompts):
        pairs = []
        for text in row["candidates"]:
            ids = next(whole)
            split = _common_prefix(prompt, ids)
            if split == len(ids):
                raise UserError(
                    f"{row['where']}: candidate {text!r} adds no token to its prompt: give it some text"
                )
            if split + len(front) == 0 and task.objective == "lm" and len(ids) > 1:
                split = 1  # plain text: its first token has nothing to be predicted from
            if split + len(front) == 0:
                raise UserError(
                    f"{row['where']}: nothing stands before candidate {text!r}: lengthen task.prompt"
                )
            pairs.append((ids[:split], ids[split:]))
        # One cut for all candidates, so that they are judged after the same words.
        cut = max(0, max(len(head) + len(tail) for head, tail in pairs) + len(front) - max_length)
        shortest = min(len(head) for head, _ in pairs)
        if cut > shortest or shortest - cut + len(front) == 0:
            raise UserError(
                f"{row['where']}: a candidate of {max(len(tail) for _, tail in pairs)} tokens leaves no room "
                f"for its prompt in max_length={max_length}: raise max_length"
            )
        contexts = tuple(front + tuple(head[cut:]) for head, _ in pairs)
        extra: dict[str, Any] = {name: tuple(row.get(name, ())) for name in ("answers", "golds")}
        completions = tuple(tuple(tail) for _, tail in pairs)
        out.append(Example(contexts, completions, row["gold"], task.objective, **extra))
    if out and task.objective == "choice" and _single(out):
        out = [replace(e, single=True) for e in out]
    return out


def encode_masked(rows: Sequence[dict], tokenizer: Any, max_length: int) -> list[Example]:
    """Tokenise rows for a masked language model: the whole text with the mask in it, and a token a candidate.

    Blanks before the mask are dropped, as tokenizers of RoBERTa's kind do by themselves; a candidate's own leading blank
    says that a word begins (" great"). A row longer than max_length loses tokens from the left of what stands before the
    mask (after [CLS]), then from the right of what stands after it (before [SEP]); the papers' code cuts the end of a row
    and could lose the mask.

    rows: as for `encode`, each with after: str. Returns one Example a row, contexts ending with the mask.
    Errors: UserError where the tokenizer has no mask, a candidate is not one token, or a text holds a mask of its own.
    """
    mask = tokenizer.mask_token_id
    if mask is None:
        raise UserError(
            "task.prompt: [MASK] is for masked language models (RoBERTa, BERT), and this model's tokenizer has no mask token"
        )
    front, back = _front(tokenizer), _back(tokenizer)
    texts = [row["prompt"].rstrip() + tokenizer.mask_token + row["after"] for row in rows]
    words = sorted({c for row in rows for c in row["candidates"]})
    fillers = dict(zip(words, _tokenise(tokenizer, words)))
    out = []
    for row, ids in zip(rows, _tokenise(tokenizer, texts)):
        completions = tuple(tuple(fillers[c]) for c in row["candidates"])
        for text, filler in zip(row["candidates"], completions):
            if len(filler) != 1 or filler[0] == tokenizer.unk_token_id:
                said = tokenizer.convert_ids_to_tokens(list(filler))
                raise UserError(
                    f"task.choices: {text!r} is {len(filler)} tokens ({' '.join(said)}); a mask is filled by one that exists"
                )
        if ids.count(mask) != 1:
            raise UserError(f"{row['where']}: its text holds {tokenizer.mask_token} itself; take that out")
        at = ids.index(mask)
        over = max(0, len(front) + len(ids) + len(back) - max_length)
        left = min(at, over)
        right = len(ids) - (over - left)
        if right <= at:
            raise UserError(
                f"{row['where']}: no room for [MASK] in max_length={max_length}: raise max_length"
            )
        context = front + tuple(ids[left : at + 1])
        after = tuple(ids[at + 1 : right]) + back
        contexts = (context,) * len(completions)
        out.append(Example(contexts, completions, row["gold"], masked=True, after=after))
    return out


def prompts(rows: Sequence[dict], tokenizer: Any, most: int) -> list[tuple[int, ...]]:
    """The prompts alone as token ids, to write after: at most so many tokens, cut on the left (after BOS).

    rows: as for `encode`. Raises UserError naming a row without any token.
    """
    front = _front(tokenizer)
    found = _tokenise(tokenizer, [row["prompt"] for row in rows])
    out = [front + tuple(ids[max(0, len(ids) + len(front) - most) :]) for ids in found]
    for row, ids in zip(rows, out):
        if not ids:
            raise UserError(f"{row['where']}: there is nothing to write after: lengthen task.prompt")
    return out


def show(example: Example, tokenizer: Any) -> str:
    """What the model reads, decoded: the context, then a line a candidate, its scored tokens in ⟦ ⟧.

    example: as encode() gives it. tokenizer: the one that encoded it. Returns plain text; `*` marks the gold
    candidate.
    """
    lines = []
    shared = len(set(example.contexts)) == 1
    if shared:
        lines.append(tokenizer.decode([*example.contexts[0], *example.after]))
    for c, (context, completion) in enumerate(zip(example.contexts, example.completions)):
        marked = "".join(f"⟦{tokenizer.decode([token])}⟧" for token in completion)
        lead = "" if shared else tokenizer.decode(list(context))
        lines.append(f"{'*' if c == example.gold else ' '} {lead}{marked}")
    return "\n".join(lines)


def _single(examples: Sequence[Example]) -> bool:
    first = examples[0].completions
    if any(len(c) != 1 for c in first) or len(set(first)) != len(first):
        return False
    return all(e.completions == first and len(set(e.contexts)) == 1 for e in examples)


def _front(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text."""
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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
