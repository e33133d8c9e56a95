"""Write the texts of many members in one batch, over one copy of the weights and one static cache.

A member is the model at one probe of a step. Rows are member-major; finished rows leave the batch, a whole grid of members ×
rows at a time, as soon as the grid that is left is a quarter smaller. Prompts of unequal length are padded on the left.

    greedy:          token = argmax(logits)
    temperature T:   token = the first v with Σ_{w ≤ v} softmax(logits / T)_w > u

u is a function of (seed, step, row, token) and never of the member, so that all members roll the same dice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoft.models.calls import cache_bytes, cache_name, keys_values, puts_before, takes
from zoft.models.head import prompt_columns
from zoft.noise.spec import philox

CHECK = 8  # tokens between two looks at which rows are finished
SHRINK = 0.75  # a grid is packed when it gets this much smaller
DICE = 0x64696365  # separates these words from those of the noise


@dataclass(frozen=True)
class Written:
    """Hold one text: what it says, how many tokens it took, and whether all its logits were numbers."""

    text: str
    tokens: int
    sound: bool


def dice(seed: int, step: int, rows: Sequence[int], tokens: int) -> Tensor:
    """Return u fp64 [rows, tokens] in (0, 1): Philox4x32-10, counter (token, row, step, DICE), key (seed's two words).

    rows: which rows of the training set they are.
    """
    word = 1 << 32
    key = seed % word, seed // word % word
    found = [
        [(philox((t % word, r % word, step % word, DICE), key)[0] + 0.5) / word for t in range(tokens)]
        for r in rows
    ]
    return torch.tensor(np.array(found).reshape(len(rows), tokens))


@torch.no_grad()
def decode(
    model: Any,
    contexts: Sequence[Sequence[int]],
    members: Any,
    *,
    count: int,
    pad: int,
    ends: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    u: Tensor | None = None,
    done: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    watch: Callable[[Tensor], Any] | None = None,
    cache_seen: Callable[[int, int], Any] | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """Write after each context, once per member; call it inside `members.at`.

    contexts: token ids of each row [R]. members: probe.Members, of which `count` are in place; or None, for the model as it
    is. u: [R, max_new_tokens] where temperature > 0. done(row, tokens): whether a row's text has ended, asked each CHECK
    tokens. watch(logits): sees the logits [P·R, V] of each token. cache_seen(bytes, tokens): is told what the cache takes.
    Returns (new tokens of each row, up to the end token or the last check; whether all its logits were numbers), [P·R] each,
    member-major.
    """
    device = next(model.parameters()).device
    n, width, front = len(contexts), max(map(len, contexts)), _front(model)
    length = front + width + max_new_tokens
    ids = torch.tensor([[pad] * (width - len(c)) + list(c) for c in contexts], device=device).repeat(count, 1)
    mask = torch.ones(n, length, dtype=torch.int64)
    for r, c in enumerate(contexts):
        mask[r, front : front + width - len(c)] = 0
    mask = mask.to(device).repeat(count, 1)  # [P·R, length]; what is ahead is hidden by causality
    places = (mask.cumsum(1) - 1).clamp(min=0)  # positions as a row has them alone
    call = _Call(model, count * n, length)
    out = torch.full((count * n, max_new_tokens), pad, dtype=torch.int64, device=device)
    sound = torch.ones(count * n, dtype=torch.bool, device=device)
    over = torch.zeros(count * n, dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    chance = None if u is None else u.to(device).repeat(count, 1)
    grid = torch.arange(count * n, device=device)  # of each row of the batch: which text it writes
    here = count  # members in the batch
    finished = [False] * (count * n)
    logits = call.first(ids, mask, places)
    for t in range(max_new_tokens):
        if watch is not None:
            watch(logits)
        sound[grid] &= ~logits.isnan().any(-1)
        token = _chosen(logits, temperature, None if chance is None else chance[grid, t])
        out[grid, t] = token
        over[grid] |= torch.isin(token, stops)
        last = t + 1 == max_new_tokens
        if last or (t + 1) % CHECK == 0:
            rows = sorted(set(grid.tolist()))
            ended, said = over.tolist(), out[:, : t + 1].tolist()
            for i in rows:
                finished[i] = finished[i] or ended[i] or done(i, said[i])
            if last or all(finished[i] for i in rows):
                break
            packed = _packed(grid.view(here, -1).tolist(), finished)
            if len(packed) * len(packed[0]) <= SHRINK * len(grid):
                where = {text: k for k, text in enumerate(grid.tolist())}
                at = torch.tensor([[where[i] for i in row] for row in packed], device=device)
                stay = at[:, 0] // (len(grid) // here)  # members, by where they stand now
                if members is not None:
                    members.keep(stay)
                grid, here = grid[at.flatten()], len(packed)
                token = token[at.flatten()]
                call.keep(at.flatten())
        logits = call.next(token, mask[grid], places[grid, front + width + t])
    if cache_seen is not None:
        cache_seen(call.bytes(), length)
    return out.tolist(), sound.tolist()


def _packed(grid: list[list[int]], finished: list[bool]) -> list[list[int]]:
    """Return the texts that go on, a list per member that has some, all of one length.

    A member with fewer than the most repeats its first one; what is written twice is the same.
    """
    going = [[i for i in dict.fromkeys(row) if not finished[i]] for row in grid]
    most = max(map(len, going))
    return [row + [row[0]] * (most - len(row)) for row in going if row]


def _chosen(logits: Tensor, temperature: float, u: Tensor | None) -> Tensor:
    """Return the next token of each row [N] from its logits [N, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    assert u is not None, "dice"
    total = (logits.float() / temperature).softmax(-1).double().cumsum(-1)  # [N, V]
    return (total < (u * total[:, -1])[:, None]).sum(-1).clamp(max=logits.shape[1] - 1)


def _front(model: Any) -> int:
    """Columns of the cache that a prefix or a prompt takes."""
    return model.active_peft_config.num_virtual_tokens if puts_before(model) else 0


class _Call:
    """The forwards of one generation: the first reads the contexts, each next one a token a row.

    On a GPU the second token's forward is captured as a CUDA graph and replayed for those after it, anew whenever rows leave:
    shapes are static, the place in the cache is a tensor. A cache whose layers slide decides in Python and is not captured, nor
    is a model whose forward cannot be.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        self.model, self.base = model, model.get_base_model() if puts_before(model) else model
        self.name = cache_name(self.base)
        assert self.name, type(model).__name__
        self.rows, self.cache = rows, static_cache(self.base, length)
        self.extra: dict[str, Any] = {"use_cache": True}
        if takes(self.base, "logits_to_keep"):
            self.extra["logits_to_keep"] = 1
        self.captures = next(model.parameters()).is_cuda and _is_static(self.cache)
        self.eager = 0  # forwards of one token since the rows changed
        self.graph: Any = None
        self.held: tuple[Tensor, Tensor, Tensor, Tensor] | None = (
            None  # token, mask, place, logits of the graph
        )

    def first(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Return the logits after the contexts [N, V]."""
        front, inputs = _front(self.model), {"input_ids": ids}
        if front and prompt_columns(self.model):
            embedded = self.base.get_input_embeddings()(ids)
            prompt = self.model.get_prompt(len(ids)).to(embedded.dtype)
            inputs, start = {"inputs_embeds": torch.cat([prompt, embedded], 1)}, 0
        else:
            start = front
            if front:
                dtype = next(p.dtype for p in self.base.parameters() if p.is_floating_point())
                for i, (k, v) in enumerate(keys_values(self.model.get_prompt(len(ids)))):
                    self.cache.update(k.to(dtype).contiguous(), v.to(dtype).contiguous(), i)
        return self._run(inputs, mask, places[:, start : front + ids.shape[1]])

    def next(self, token: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """Return the logits after one more token of each row [N, V]; the next call may overwrite them."""
        if self.captures and self.graph is None and self.eager:
            self._capture(token, mask, place)
        if self.graph is None or self.held is None:
            self.eager += 1
            return self._run({"input_ids": token[:, None]}, mask, place[:, None])
        self.held[0].copy_(token)
        self.held[2].copy_(place)
        self.graph.replay()
        return self.held[3]

    def _capture(self, token: Tensor, mask: Tensor, place: Tensor) -> None:
        """Capture a token's forward; where that fails, all go on one by one."""
        token, mask, place = token.clone(), mask.clone(), place.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits = self._run({"input_ids": token[:, None]}, mask, place[:, None])
        except RuntimeError:
            self.captures = False
            return
        self.graph, self.held = graph, (token, mask, place, logits)

    def _run(self, inputs: dict[str, Tensor], mask: Tensor, places: Tensor) -> Tensor:
        given = {**inputs, "attention_mask": mask, **self.extra, str(self.name): self.cache}
        if takes(self.base, "position_ids"):
            given["position_ids"] = places
        return self.base(**given).logits[:, -1]

    def keep(self, at: Tensor) -> None:
        """Let the rows at these places of the batch stay."""
        self.graph, self.held, self.eager = None, None, 0
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[at], layer.values[at]
            if hasattr(layer, "batch_size"):
                layer.batch_size = len(at)

    def bytes(self) -> int:
        return cache_bytes(self.cache)


def _is_static(cache: Any) -> bool:
    """Say whether all layers of a cache keep their tokens where they are, without a window."""
    from transformers.cache_utils import StaticLayer

    return all(type(layer) is StaticLayer for layer in cache.layers)


def static_cache(model: Any, length: int) -> Any:
    """Return an empty cache of that many tokens per row, whose keys and values never move."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)
