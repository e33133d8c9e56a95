"""From text to token ids: where the prompt ends, what is scored, what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoft.data.example import Example, _back, _tokenise, front_of
from zoft.errors import UserError


def encode(
    rows: Sequence[dict], tokenizer: Any, task: Any, max_length: int, *, pack: bool = False
) -> list[Example]:
    """Turn rows of a task into token ids: prompts and candidates, conversations, or pieces of text, as the rows are.

    Conversations (`messages`) are written with the chat template, or plain (zoft.data.chat); text (`pieces`) is cut
    into pieces of max_length, packed if `pack` (zoft.data.texts): several examples a row, or several rows an example.
    Prompts and candidates: see `paired`. Arguments and errors are those of the three.
    """
    if rows and "pair" in rows[0]:
        return encode_pairs(rows, tokenizer, task, max_length)
    if rows and "pieces" in rows[0]:
        from zoft.data import texts as pieces

        return pieces.encode(rows, tokenizer, max_length, pack=pack)
    if rows and "messages" in rows[0] and (kind := turns(tokenizer, rows, task)):
        from zoft.data import chat

        return chat.encode(rows, chat.of(tokenizer, kind), max_length)
    return paired(rows, tokenizer, task, max_length)


def encode_pairs(rows: Sequence[dict], tokenizer: Any, task: Any, max_length: int) -> list[Example]:
    """Turn pairs of answers into token ids: both sides as rows of their own would be, put together as two candidates.

    rows: {pair: [the row of the chosen answer, that of the rejected one], where}. Raises UserError as `encode` does, and where
    both answers are the same tokens.
    """
    sides = [side for row in rows for side in row["pair"]]
    alone = encode(sides, tokenizer, replace(task, objective="lm"), max_length)
    out = []
    for row, chosen, rejected in zip(rows, alone[0::2], alone[1::2], strict=True):
        assert all(all(e.scored or ()) for e in (chosen, rejected)), row["where"]
        if chosen.completions == rejected.completions and chosen.contexts == rejected.contexts:
            raise UserError(f"{row['where']}: both answers are the same; leave the row out")
        contexts = (chosen.contexts[0], rejected.contexts[0])
        completions = (chosen.completions[0], rejected.completions[0])
        cut = max(chosen.cut, rejected.cut)
        out.append(Example(contexts, completions, 0, "choice", cut=cut, paired=True))
    return out


def turns(tokenizer: Any, rows: Sequence[dict], task: Any) -> str:
    """Return how rows with turns are written: "template", "plain" turns, or "" for a prompt and its completion as text."""
    kind = getattr(task, "chat", "auto")
    single = all("candidates" in row and row.get("joins") for row in rows)
    if single and (kind == "plain" or kind == "auto" and not getattr(tokenizer, "chat_template", None)):
        return ""
    return "plain" if kind == "plain" else "template"


def how(tokenizer: Any, data: Any) -> str:
    """Return a line on how the rows of a recognised layout are written for the model."""
    row = data.train[0]
    if "pair" in row:
        one = replace(data, train=[row["pair"][0]])
        return f"both answers of a pair: {how(tokenizer, one)}"
    if "pieces" in row:
        if data.pack:
            return (
                "training texts follow each other in rows of max_length (task.pack); to evaluate, each text has rows "
                "of its own"
            )
        return "one text per row; a long text is cut into rows of max_length"
    kind = turns(tokenizer, data.train, data)
    if not kind:
        seam = "a line break between them" if data.joint else "as they stand"
        ends = ", EOS after it" if tokenizer.eos_token_id is not None else ""
        return f"prompt and completion are one text, {seam}{ends} (task.chat=template writes turns)"
    from zoft.data import chat
    from zoft.data.chat import DATE, ends_turns

    made = chat.of(tokenizer, kind)
    source = "as 'User: …', 'Assistant: …'" if kind == "plain" else "with the tokenizer's chat template"
    ends = "and the token that ends each" if ends_turns(made, row) else "alone (no token ends a turn here)"
    dated = ", under a date that stays the same" if made.template.startswith(DATE) else ""
    other = "" if kind == "plain" else "; task.chat=plain does without it"
    return f"turns are written {source}{dated}; the loss is on the assistant's words {ends}{other}"


def paired(rows: Sequence[dict], tokenizer: Any, task: Any, max_length: int) -> list[Example]:
    """Tokenise rendered rows, finding for each candidate the token at which it begins.

    Prompt and candidate are tokenised together, as the model will read them; the candidate begins where the
    tokens stop agreeing with the prompt's own, so a token that merges the end of a prompt with the start of
    a candidate is the candidate's. Special tokens that the tokenizer puts in front (BOS) are kept, those it
    puts behind (EOS) are not added. A row longer than max_length loses tokens from the left of its prompt
    (after BOS), up to one place for all its candidates. EOS follows the candidate of a row with `joins` (a prompt
    and its completion from a recognised layout), and is scored. Rows that go on behind a mask: see `encode_masked`.

    rows: dicts {prompt: str, candidates: [str], gold: int, where: str, …}, as `zoft.data.tasks` renders them.
    task: anything with `.objective` ("choice" | "lm"); `.joint` stands between the two of a row with `joins`.
    max_length: tokens a row, BOS and candidate included.
    Returns one Example a row, in order.
    Errors: UserError naming the row where a candidate has no token of its own, nothing precedes it, or it
    does not fit in max_length.
    """
    if rows and "after" in rows[0]:
        out = encode_masked(rows, tokenizer, max_length)
        return [replace(e, single=True) for e in out] if _single(out) else out
    front = front_of(tokenizer)
    joint = [getattr(task, "joint", "") if row.get("joins") else "" for row in rows]
    texts = [row["prompt"] + j for row, j in zip(rows, joint)]
    prompts = _tokenise(tokenizer, texts)
    whole = iter(_tokenise(tokenizer, [t + c for row, t in zip(rows, texts) for c in row["candidates"]]))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
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
            pairs.append((ids[:split], ids[split:] + (end if row.get("joins") else [])))
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
        out.append(Example(contexts, completions, row["gold"], task.objective, cut=cut, **extra))
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
    front, back = front_of(tokenizer), _back(tokenizer)
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
        out.append(Example(contexts, completions, row["gold"], masked=True, after=after, cut=over))
    return out


def prompts(rows: Sequence[dict], tokenizer: Any, most: int, task: Any = None) -> list[tuple[int, ...]]:
    """Return the prompts alone as token ids, to write after: at most so many tokens, cut on the left (after BOS).

    Of conversations, what the chat template writes where it asks for the answer, cut as `encode` does.
    rows, task: as for `encode`. Raises UserError naming a row without any token, or of several answers.
    """
    if rows and "messages" in rows[0] and (kind := turns(tokenizer, rows, task)):
        from zoft.data import chat

        return chat.prompts(rows, chat.of(tokenizer, kind), most)
    front = front_of(tokenizer)
    joint = getattr(task, "joint", "")
    found = _tokenise(tokenizer, [row["prompt"] + (joint if row.get("joins") else "") for row in rows])
    out = [front + tuple(ids[max(0, len(ids) + len(front) - most) :]) for ids in found]
    for row, ids in zip(rows, out):
        if not ids:
            raise UserError(f"{row['where']}: there is nothing to write after: lengthen task.prompt")
    return out


def refuse_foreign_ids(
    rows: Sequence[dict], examples: Sequence[Example], tokenizer: Any, size: int | None
) -> None:
    """Raise UserError naming the row where a token has no row in the model's embedding.

    Tokens that were added to a tokenizer alone are harmless until a text holds one. examples: of these rows, as `encode`
    makes them. size: rows of the embedding; None: not known.
    """
    if size is None or max(tokenizer.get_vocab().values(), default=0) < size:
        return
    for number, e in enumerate(examples):
        found = max(max(part, default=0) for part in (*e.contexts, *e.completions, e.after))
        if found < size:
            continue
        token = str(tokenizer.convert_ids_to_tokens(found))
        if len(rows) == len(examples):
            row = rows[number]
        else:  # texts that were cut or packed
            row = next((r for r in rows if token in r["candidates"][0]), rows[0])
        appended = token == tokenizer.eos_token and token not in row["candidates"][e.gold]
        raise UserError(
            f"{row['where']}: token {token!r}{', which ends each text,' if appended else ''} is number {found:,}, and the "
            f"model's embedding has {size:,} rows: save the model with resized embeddings (resize_token_embeddings), take "
            "another tokenizer, or take the token out"
        )


def rows_of(rows: Sequence[dict], examples: Sequence[Example]) -> list[dict]:
    """Return the row of each example: encode() makes one a row, but of text as many as there are pieces."""
    at = [i for i, e in enumerate(examples) if e.part == 0]
    assert len(at) == len(rows), (len(at), len(rows))
    numbers = [n for n, (a, b) in enumerate(zip(at, [*at[1:], len(examples)])) for _ in range(b - a)]
    return [rows[n] for n in numbers]


def _single(examples: Sequence[Example]) -> bool:
    first = examples[0].completions
    if any(len(c) != 1 for c in first) or len(set(first)) != len(first):
        return False
    return all(e.completions == first and len(set(e.contexts)) == 1 for e in examples)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
