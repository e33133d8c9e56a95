"""Greedy generation: texts after contexts, many rows at a time, the same ones whatever is drawn elsewhere.

The model's own `generate` runs the loop, for it knows each architecture's cache and positions, peft's prefixes and
prompts included; what a checkpoint's generation_config asks for (sampling, penalties, lengths) is left out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from zoft.config.schema import Config
from zoft.data.example import front_of
from zoft.errors import UserError
from zoft.models.calls import one_cache_name, puts_before, takes
from zoft.models.kind import quiet, refuse_longer_rows
from zoft.objectives.decode import Written, decode

TOKENS = 8192  # a batch's rows × (width + max_new_tokens) at most: what its key-value cache holds
_TOLERANCE = 1e-3, 0.1  # of logits, in their own spread, that padding may change: fp32 and wider, 16 bits
_sees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # models whose prefix or prompt is seen
_pads: WeakKeyDictionary[nn.Module, bool] = (
    WeakKeyDictionary()
)  # models, and whether padding leaves them alone


def generate(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: str | None = None,
    context: Callable[[int], AbstractContextManager] | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[str]:
    """Append the most probable token, again and again, until `stop`, an end-of-text token or max_new_tokens.

    Rows are batched by length, padded on the left where the model shows, on these very rows, that this leaves their
    logits alone; else only rows of one length go together.
    contexts: token ids of each row, none empty. stop: text that ends a row and is left out. context(rows): entered
    around each batch. progress(rows done): called after each batch. Returns a text a row, without special tokens and
    outer white space. Raises UserError for a model that cannot generate.
    """
    how: Any = {"max_new_tokens": max_new_tokens, "stop": stop, "context": context, "progress": progress}
    return [made.text for made in texts(model, tokenizer, contexts, **how)]


@torch.no_grad()
def texts(
    model: Any, tokenizer: Any, contexts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: str | None,
    context: Callable[[int], AbstractContextManager] | None, progress: Callable[[int], Any],
) -> list[Written]:  # fmt: skip
    """Do as `generate`, and return each text with its tokens and whether its logits were numbers throughout."""
    assert all(map(len, contexts)), "an empty context"
    refuse_longer_rows(model, max(map(len, contexts), default=0), max_new_tokens)
    ends, pad = _special(model, tokenizer)
    around = context or (lambda rows: nullcontext())
    made = [Written("", 0, False)] * len(contexts)
    with _plain(model):
        _refuse_unseen(model, contexts, pad, around)
        mixed = _pads_well(model, contexts, pad, around)
        for chosen in _batches(contexts, max_new_tokens, mixed):
            stopped, watch = _Stop(tokenizer, stop, ends), _Watch()
            with around(len(chosen)):
                new = _run(
                    model, [contexts[i] for i in chosen], pad, max_new_tokens=max_new_tokens, eos_token_id=ends or None,
                    stopping_criteria=[stopped], logits_processor=[watch],
                ).tolist()  # fmt: skip
            for i, row, bad in zip(chosen, new, watch.bad.tolist(), strict=True):
                made[i] = stopped.written(row, not bad)
            progress(len(chosen))
    return made


@torch.no_grad()
def texts_of_members(
    model: Any, tokenizer: Any, contexts: Sequence[Sequence[int]], members: Any, count: int, *, mixed: bool, max_new_tokens: int,
    stop: str | None, temperature: float = 0.0, u: Tensor | None = None, progress: Callable[[int], Any] = lambda done: None,
) -> list[Written]:  # fmt: skip
    """Return the texts of `count` members after each context, member-major [P·R], in one batch where rows may be padded.

    members: probe.Members, inside their `at`; None: the model as it is, count 1. mixed: whether rows of unequal length go
    together. u: [R, max_new_tokens], the dice of each row.
    """
    assert all(map(len, contexts)), "an empty context"
    refuse_longer_rows(model, max(map(len, contexts)), max_new_tokens)
    ends, pad = _special(model, tokenizer)
    ended = _Stop(tokenizer, stop, ends)
    lengths = [0] if mixed else sorted({len(c) for c in contexts}, reverse=True)
    made = [Written("", 0, False)] * (count * len(contexts))
    with _plain(model):
        for n in lengths:
            chosen = [i for i, c in enumerate(contexts) if mixed or len(c) == n]
            if n != lengths[0] and members is not None:
                members.again()
            rows, sound = decode(
                model, [contexts[i] for i in chosen], members, count=count, pad=pad, ends=ends, max_new_tokens=max_new_tokens,
                temperature=temperature, u=None if u is None else u[chosen], done=lambda i, row: ended.holds(row),
            )  # fmt: skip
            for k, (row, good) in enumerate(zip(rows, sound, strict=True)):
                p, r = divmod(k, len(chosen))
                made[p * len(contexts) + chosen[r]] = ended.written(row, good)
            progress(count * len(chosen))
    return made


def _run(model: Any, rows: Sequence[Sequence[int]], pad: int, **how: Any) -> Any:
    """The new tokens [R, n] of rows padded on the left, or whatever `generate` returns where it is asked for more."""
    width = max(map(len, rows))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    extra = {k: how.pop(k) for k in ("stopping_criteria", "logits_processor") if k in how}
    asked = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=pad, disable_compile=True, **how)
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=asked, **extra)
    except (AttributeError, NotImplementedError) as error:
        if hasattr(model, "generate") and "generate" not in str(error):
            raise
        raise UserError(f"{type(model).__name__}: this model cannot generate text") from None
    return out[:, width:] if isinstance(out, Tensor) else out


class _Stop(StoppingCriteria):
    """Ends a row whose new tokens hold the stop text."""

    def __init__(self, tokenizer: Any, stop: str | None, ends: Sequence[int]) -> None:
        self.tokenizer, self.stop, self.ends = tokenizer, stop, set(ends)
        self.tail = 0 if stop is None else len(stop.encode()) + 4  # tokens that a stop text can lie in
        self.done: list[bool] = []
        self.width = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.stop is None:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if not self.done:
            self.done, self.width = [False] * len(input_ids), input_ids.shape[1] - 1
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :].tolist()
        for i, row in enumerate(tails):
            self.done[i] = self.done[i] or self.stop in self._decode(row)
        return torch.tensor(self.done, device=input_ids.device)

    def holds(self, row: list[int]) -> bool:
        """Say whether new tokens hold the stop text."""
        return self.stop is not None and self.stop in self._decode(row)

    def written(self, row: list[int], sound: bool) -> Written:
        """Return what a row of new tokens says, up to its end, and how many tokens it took, one that ends it among them."""
        end = next((n for n, token in enumerate(row) if token in self.ends), len(row))
        text, tokens = self._decode(row[:end]), min(end + 1, len(row))
        if self.stop is not None and self.stop in text:
            text = text.partition(self.stop)[0]
            low, tokens = 0, end
            while low + 1 < tokens:  # the fewest tokens that hold it
                middle = (low + tokens) // 2
                low, tokens = (low, middle) if self.holds(row[:middle]) else (middle, tokens)
        return Written(text.strip(), tokens, sound)

    def _decode(self, row: list[int]) -> str:
        return self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Watch(LogitsProcessor):
    """Notes rows whose logits hold a NaN; argmax would hide it."""

    bad: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        nan = scores.isnan().any(-1)
        self.bad = self.bad | nan if hasattr(self, "bad") else nan
        return scores


def _special(model: Any, tokenizer: Any) -> tuple[list[int], int]:
    """(ids that end a text, the id written into padding)."""
    found: list[int] = []
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    pad = getattr(tokenizer, "pad_token_id", None)
    return list(dict.fromkeys(found)), (found or [0])[0] if pad is None else pad


def writing_digest(model: Any, tokenizer: Any) -> str:
    """Return a hash of what turns tokens into texts: the ids that end one, and what all ids together say."""
    said = tokenizer.decode(sorted(tokenizer.get_vocab().values()), clean_up_tokenization_spaces=False)
    made = json.dumps([sorted(_special(model, tokenizer)[0]), said])
    return f"blake2b:{hashlib.blake2b(made.encode(), digest_size=16).hexdigest()}"


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """For the time of a generation no generation_config asks for anything, and no block's outputs come from memory."""
    kept = model.__dict__.get("keeps_rows")
    holders = [m for m in (model, *model.modules()) if "generation_config" in m.__dict__]
    before = [m.generation_config for m in holders]
    try:
        for m in holders:
            m.generation_config = GenerationConfig()
        with quiet(), warnings.catch_warnings(), kept.aside() if kept else nullcontext(), \
                one_cache_name(model):  # fmt: skip
            warnings.simplefilter("ignore")  # peft's, about positions that it makes itself
            yield
    finally:
        for m, own in zip(holders, before, strict=True):
            m.generation_config = own


def _refuse_unseen(model: Any, contexts: Sequence[Sequence[int]], pad: int, around: Any) -> None:
    """Raise UserError where generation leaves out a prefix or a prompt that a plain forward sees.

    Looked at once a model, at two tokens after the shortest context: with some versions of the libraries the first
    token did not see a prefix, with others the second saw its prompt twice.
    """
    if not contexts or model in _sees or not puts_before(model):
        return
    row = list(sorted(contexts, key=len)[0])
    with around(1):
        out = _run(model, [row], pad, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        got = torch.stack([x[0].double() for x in out.logits])  # [2, V]
        ids = torch.tensor([row + [int(got[0].argmax())]], device=got.device)
        extra = {"use_cache": False} if takes(model, "use_cache") else {}
        want = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, -2:].double()
    if not bool(want.isfinite().all()):
        return  # whoever asked for the text looks at that
    if not bool(((got - want).abs() <= _tolerance(model) * want.std()).all()):
        kind = model.active_peft_config.peft_type.value.lower().replace("_tuning", "")
        version = importlib.metadata.version
        raise UserError(
            f"train={kind}: peft {version('peft')} with transformers {version('transformers')} leaves the {kind} out "
            "where text is generated; use train=lora, or the versions that `zoft env` calls tested"
        )
    _sees[model] = True


def _tolerance(model: Any) -> float:
    narrow = next(p.dtype for p in model.parameters() if p.is_floating_point()).itemsize < 4
    return _TOLERANCE[narrow]


def _pads_well(model: Any, contexts: Sequence[Sequence[int]], pad: int, around: Any) -> bool:
    """Say whether a row padded on the left has the logits that it has alone; looked at once a model, at two tokens."""
    short, long = min(contexts, key=len, default=()), max(contexts, key=len, default=())
    if len(short) == len(long) or model in _pads:
        return _pads.get(model, True)
    logits = []
    for rows in ([short], [short, long]):
        with around(len(rows)):
            out = _run(model, rows, pad, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        logits.append([x[0].double() for x in out.logits])
    alike = logits[0][0].argmax() == logits[1][0].argmax()  # else the second tokens follow other first ones
    pairs = list(zip(*logits, strict=True))[: 2 if alike else 1]
    _pads[model] = all(
        bool(((a - b).abs() <= _tolerance(model) * a[a.isfinite()].std()).logical_or(a == b).all())
        for a, b in pairs
    )
    return _pads[model]


def _batches(contexts: Sequence[Sequence[int]], new: int, mixed: bool) -> Iterator[list[int]]:
    """Indices by length, the longest first, at most TOKENS a batch; of one length where they cannot be mixed."""
    order = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), i))
    while order:
        width = len(contexts[order[0]])
        most = max(1, TOKENS // (width + new))
        take = next((n for n, i in enumerate(order) if not mixed and len(contexts[i]) != width), len(order))
        yield order[: min(most, take)]
        order = order[min(most, take) :]


def writer(config: Config, model: Any, tokenizer: Any, context: Any = None) -> Any:
    """Return a function from contexts to the text that the model writes after each, by the config's max_new_tokens and stop.

    A context and what is written after it are max_length tokens at most: it loses tokens on its left (after BOS).
    """
    front = len(front_of(tokenizer))
    room = max(front + 1, config.max_length - config.max_new_tokens)

    def fit(context: tuple[int, ...]) -> tuple[int, ...]:
        return context[:front] + context[max(front, front + len(context) - room) :]

    def write(contexts: Sequence[tuple[int, ...]]) -> list[str]:
        return generate(
            model,
            tokenizer,
            [fit(c) for c in contexts],
            max_new_tokens=config.max_new_tokens,
            stop=config.stop,
            context=context,
        )

    return write
