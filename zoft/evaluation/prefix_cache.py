"""Scoring candidates with what their rows share computed once: a key-value cache under continuations.

The rows of one example differ in its candidates only, and with demonstrations in front all examples begin alike. So a
batch takes up to three forwards: what all rows of all examples begin with, [1, L]; the rest of each example's prompt,
[E, H]; the candidates, [E·C, K]. H is padded on the left, K on the right, positions are given, so that each token
sees what it sees in a row of its own. Whether a model's cache does this is not guessed: it is tried (`fault`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoft.data.example import Example
from zoft.models.calls import cache_bytes, cache_length, cache_name, new_cache, puts_before, takes
from zoft.models.head import _gathering, _narrowed, _narrows, head_of
from zoft.objectives.losses import target_logprobs

Context = Callable[[int], AbstractContextManager] | None
COMMON = 32  # tokens that all rows begin with, from which on they get a forward of their own
GAIN = 0.85  # share of the tokens of plain rows that sharing must not exceed to be worth it
CACHE_BYTES = 1 << 30  # keys and values of one batch


@dataclass(frozen=True)
class Cut:
    """Mark where an example's rows part.

    head: tokens that all its rows begin with. tails[c]: what the row of candidate c reads after them, one token at
    least. starts[c]: index in tails[c] that scores the first token of the candidate.
    """

    head: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]


def cut(e: Example) -> Cut:
    """Split an example's rows at the last token that they share, every scored position behind it."""
    if e.single:  # one row scores all candidates
        return Cut(e.contexts[0][:-1], (e.contexts[0][-1:],), (0,))
    rows = [context + completion[:-1] for context, completion in zip(e.contexts, e.completions)]
    h = min(_alike(rows), min(map(len, e.contexts)) - 1)
    return Cut(rows[0][:h], tuple(r[h:] for r in rows), tuple(len(c) - 1 - h for c in e.contexts))


def common(examples: Sequence[Example]) -> int:
    """Return tokens that all rows of all examples begin with, 0 where they are too few to matter."""
    heads = [cut(e).head for e in examples]
    n = min(_alike(heads), min(map(len, heads)) - 1)  # something stays in front of each candidate
    return n if n >= COMMON and len(examples) > 1 else 0


def pays(examples: Sequence[Example], front: int) -> bool:
    """Say whether sharing leaves enough fewer tokens to compute than rows of their own."""
    if any(e.objective != "choice" or e.masked for e in examples):
        return False
    cuts = [cut(e) for e in examples]
    if min(len(c.head) for c in cuts) < 1:
        return False
    plain = sum(len(c.head) * len(c.tails) + sum(map(len, c.tails)) for c in cuts)
    shared = front + sum(len(c.head) - front + len(c.tails) * max(map(len, c.tails)) for c in cuts)
    return shared <= GAIN * plain


class Unusable(Exception):
    """Signal that this model's cache cannot be used, with the reason."""


@torch.no_grad()
def totals(
    model: nn.Module, examples: Sequence[Example], front: Any, context: Context = None
) -> tuple[Tensor, Tensor]:
    """Return Σ log p over the tokens of each candidate, and their number: [E, C] each, 0 where there is no candidate.

    As objective's, up to rounding; single-token candidates get logits, which differ by a constant of the example.
    front: what prepare() gave.
    """
    device = next(model.parameters()).device
    cuts = [cut(e) for e in examples]
    length, cache = front
    cache = copy.deepcopy(cache) if length else _new(model)
    seen = torch.ones(len(cuts), length, dtype=torch.int64)  # [E, L] mask of what the cache has
    if length:
        cache.batch_select_indices(torch.zeros(len(cuts), dtype=torch.int64, device=device))
    single = examples[0].single and all(
        e.single and e.completions == examples[0].completions for e in examples
    )
    rest = [c.head[length:] for c in cuts]
    if single and length:  # the prompt's last token with the rest of it: nothing comes after
        rest, tails = [()] * len(cuts), [[r + c.tails[0]] for r, c in zip(rest, cuts)]
        starts = [[len(t[0]) - 1] for t in tails]
    else:
        tails, starts = [list(c.tails) for c in cuts], [list(c.starts) for c in cuts]
    if any(rest):
        ids, mask = _padded(rest, left=True)
        seen = torch.cat([seen, mask], 1)
        _forward(model, ids.to(device), seen.to(device), cache, torch.tensor([0]), None, context)
    owner = torch.tensor([i for i, t in enumerate(tails) for _ in t])  # [R]
    if len(owner) > len(cuts):
        cache.batch_select_indices(owner.to(device))
    ids, mask = _padded([t for tail in tails for t in tail], left=False)  # [R, K]
    seen = torch.cat([seen[owner], mask], 1)
    at = [s for start in starts for s in start]
    if single:
        tokens = torch.tensor([c[0] for c in examples[0].completions], device=device)
        where = torch.tensor([r * ids.shape[1] + s for r, s in enumerate(at)], device=device)
        logits = _forward(model, ids.to(device), seen.to(device), cache, where, tokens, context)  # [E, C]
        found = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return found, torch.ones_like(found)
    done = [c for e in examples for c in e.completions]  # [R]
    where = torch.tensor([r * ids.shape[1] + s + i for r, s in enumerate(at) for i in range(len(done[r]))])
    logits = _forward(model, ids.to(device), seen.to(device), cache, where.to(device), None, context)
    logp = target_logprobs(logits, torch.tensor([t for c in done for t in c], device=device))  # [N]
    sums = torch.stack([part.sum() for part in logp.split([len(c) for c in done])])  # [R]
    total = sums.new_zeros(len(examples), max(len(e.completions) for e in examples))
    count = torch.zeros_like(total)
    row = 0
    for i, e in enumerate(examples):
        n = len(e.completions)
        total[i, :n] = sums[row : row + n]
        count[i, :n] = torch.tensor([float(len(c)) for c in e.completions])
        row += n
    return total, count


@torch.no_grad()
def prepare(model: nn.Module, examples: Sequence[Example], length: int, context: Context = None) -> Any:
    """Return (length, the cache [1, length] of what all examples begin with), for totals()."""
    if not length:
        return 0, None
    device, cache = next(model.parameters()).device, _new(model)
    ids = torch.tensor([cut(examples[0]).head[:length]], device=device)
    _forward(model, ids, torch.ones_like(ids), cache, torch.tensor([0]), None, context)
    return length, cache


def fault(
    model: nn.Module, examples: Sequence[Example], plain: Callable[[Sequence[Example]], tuple[Tensor, Tensor]],
    front: Any, context: Context = None,
) -> str:  # fmt: skip
    """Return why a model cannot share prefixes; "" where the scores of some examples equal those of plain(examples).

    The longest, the shortest and two between them, in one batch; tolerance 1e-4 of 1 + |score| in fp32, 0.02 for 16 bits.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    some = [examples[order[i]] for i in sorted({0, len(order) // 3, 2 * len(order) // 3, len(order) - 1})]
    try:
        got = _mean(*totals(model, some, front, context))
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a model makes of a cache it does not know
        return str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {str(error)[:100]}"
    want = _mean(*plain(some))
    same = got.isfinite() == want.isfinite()
    worst = max([0.0, *((got - want).abs() / (1 + want.abs()))[got.isfinite() & same].tolist()])
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    tolerance = 1e-4 if weights <= {torch.float32, torch.float64} else 0.02
    return "" if bool(same.all()) and worst <= tolerance else f"scores differ by {worst:.2g}"


def cached_tokens(model: nn.Module, example: Example, context: Context = None) -> int:
    """Return how many tokens' keys and values fit in CACHE_BYTES."""
    _, cache = prepare(model, [example], 1, context)
    return CACHE_BYTES // max(1, cache_bytes(cache))


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Scores as losses.scores gives them, on the CPU."""
    return (total / count.clamp(min=1)).masked_fill(count == 0, -torch.inf).double().cpu()


def _new(model: Any) -> Any:
    if getattr(model, "keeps_rows", False):
        raise Unusable("outputs of frozen blocks are kept by rows")
    if puts_before(model):
        raise Unusable("a prefix or a prompt stands before the text")
    if cache_name(model) is None or not takes(model, "attention_mask"):
        raise Unusable("its forward takes no cache")
    return new_cache(model)


def _forward(
    model: Any, ids: Tensor, mask: Tensor, cache: Any, where: Tensor, tokens: Tensor | None, context: Context
) -> Tensor:
    """Logits [N, V] (or of `tokens` only) at flat positions `where` of ids [R, K], after what the cache has.

    mask: int64 [R, past + K]. The cache takes the K tokens in.
    """
    rows, width = ids.shape
    name = cache_name(model)
    assert name is not None, "a model without a cache"  # _new refuses one
    extra: dict[str, Any] = {name: cache, "use_cache": True}
    if takes(model, "position_ids"):
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
    head, seen = head_of(model), [0]
    narrow = tokens is not None and head is not None and _narrows(head)
    where = where.to(ids.device)
    with ExitStack() as stack:
        stack.enter_context(context(rows) if context else nullcontext())
        if head is not None:
            stack.enter_context(_gathering(head, seen, rows, width, where))
        if narrow and tokens is not None:
            stack.enter_context(_narrowed(head, tokens))
        output = model(input_ids=ids, attention_mask=mask, **extra)
    length = cache_length(cache)
    if length is None:
        raise Unusable("its cache holds states and no tokens")
    if length != mask.shape[1]:
        raise Unusable(f"its cache has {length} tokens after {mask.shape[1]}")
    logits = output.logits if hasattr(output, "logits") else output[0]
    if seen[0] == 0:  # nobody gathered
        logits = logits.flatten(0, 1).index_select(0, where)
    return logits if tokens is None or narrow else logits.index_select(1, tokens)


def _padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [R, widest]."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.int64)
        mask[i, span] = 1
    return ids, mask


def _alike(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with."""
    low, high = min(map(tuple, rows)), max(map(tuple, rows))  # all others lie between them
    n = min(len(low), len(high))
    return next((i for i in range(n) if low[i] != high[i]), n)
