"""Run a model and keep its logits at the scored positions only."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoft.models.calls import puts_before, takes


def project(
    model: nn.Module, inputs: dict[str, Tensor], positions: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Return the logits at some positions only: hidden states are gathered before they meet the vocabulary.

    The output embedding gets a hook for this call that turns hidden states [R, T, H] into [N, H]. A model
    without an output embedding, or one that does not call it, makes all its logits and they are gathered.
    With tokens, an nn.Linear head with its own forward multiplies by those C rows of its weight only; a
    replaced forward with `accepts_tokens = True` is given `tokens=`; any other makes V columns, C are kept.

    inputs: each [R, T]. positions: int64 [N], row·T + t, in the order of the rows. tokens: int64 [C] or None.
    Returns [N, V] or [N, C] in the dtype of the model's logits.
    """
    rows, width = inputs["input_ids"].shape
    if front := prompt_columns(model):
        positions = positions + (positions // width + 1) * front
        width += front
    head = head_of(model)
    narrow = tokens is not None and head is not None and _narrows(head)
    extra = {"use_cache": False} if takes(model, "use_cache") else {}
    seen = [0]
    with ExitStack() as stack:
        stack.enter_context(uncached(model))
        if puts_before(model):
            # peft makes the mask of a prefix on the default device, and a copy from the CPU cannot be captured.
            stack.enter_context(inputs["input_ids"].device)
        if head is not None:
            stack.enter_context(_gathering(head, seen, rows, width, positions))
        if narrow and tokens is not None:
            stack.enter_context(_narrowed(head, tokens))
        output = model(**inputs, **extra)
    logits = output.logits if hasattr(output, "logits") else output[0]
    if seen[0] == 0:  # nobody gathered
        assert logits.shape[:2] == (rows, width), f"logits {tuple(logits.shape)} for [{rows}, {width}] tokens"
        logits = logits.flatten(0, 1).index_select(0, positions)
    if tokens is not None and not narrow:
        logits = logits.index_select(1, tokens)
    columns = logits.shape[-1] if tokens is None else len(tokens)
    assert logits.shape == (len(positions), columns), (
        f"logits {tuple(logits.shape)}, not ({len(positions)}, {columns}); rows gathered: {seen[0]} of {rows}"
    )
    return logits


@contextmanager
def _gathering(head: nn.Module, seen: list[int], rows: int, width: int, positions: Tensor) -> Iterator[None]:
    """For the time of one forward the head sees [N, H]; seen[0] counts the rows that came by.

    A model that runs its rows in several equal goes (one probe at a time) calls its head once a go, and each
    go has its equal share of the positions.
    """

    def gather(module: nn.Module, args: tuple) -> tuple | None:
        flat = args[0].flatten(0, -2)  # [r·T, H]
        r = flat.shape[0] // width
        if flat.shape[0] != r * width or r == 0 or rows % r or len(positions) * r % rows:
            return None
        start, n = seen[0], len(positions) * r // rows
        seen[0] += r
        mine = positions if r == rows else positions[start * n // r :][:n] - start * width
        return (flat.index_select(0, mine), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _narrowed(head: Any, tokens: Tensor) -> Iterator[None]:
    """For the time of one forward the head makes the columns `tokens` only."""
    replaced = head.__dict__.get("forward")

    def few(x: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias[tokens]
        return F.linear(x, head.weight[tokens], bias)

    # Set in __dict__, as every instance's replaced forward is: nn.Module calls it after its hooks.
    head.__dict__["forward"] = few if replaced is None else functools.partial(replaced, tokens=tokens)
    try:
        yield
    finally:
        if replaced is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = replaced


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Let no config ask for a key-value cache during one forward: not every model's head takes `use_cache`."""
    configs = [m.__dict__["config"] for m in model.modules() if "config" in m.__dict__]
    parts = [
        part
        for c in {id(c): c for c in configs}.values()
        for part in (c, *getattr(c, "__dict__", {}).values())
    ]
    asking = [c for c in parts if getattr(c, "use_cache", None) is True]
    try:
        for c in asking:
            c.use_cache = False
        yield
    finally:
        for c in asking:
            c.use_cache = True


def _narrows(head: nn.Module) -> bool:
    replaced = head.__dict__.get("forward")
    if replaced is not None:
        return getattr(replaced, "accepts_tokens", False)
    return type(head) is nn.Linear


def head_of(model: Any) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def prompt_columns(model: Any) -> int:
    """Return the columns that the model itself puts in front of each row of hidden states: its prompt."""
    settings: Any = getattr(model, "active_peft_config", None)
    return settings.num_virtual_tokens if getattr(settings, "peft_type", "") == "PROMPT_TUNING" else 0
