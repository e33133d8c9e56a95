"""Call a model: what its forward takes, and the cache of keys and values that it gives back.

Libraries rename these things from one version to the next (transformers 5.24 takes `cache` where 5.23 took
`past_key_values`). The model at hand is asked, by its signature and attributes and never by a version number,
and it is asked here only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Names that a cache of keys and values goes by, the newest first.
CACHE_NAMES = ("cache", "past_key_values")


def kind_of(model: Any) -> Any:
    """Return the class of the model itself, whatever adapter is around it."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model)


def takes(model: Any, name: str) -> bool:
    """Return whether the model's forward names an argument.

    The class's own forward is asked: an instance's may have been replaced by one that takes anything.
    """
    return name in _parameters(kind_of(model))


def puts_before(model: Any) -> bool:
    """Return whether an adapter puts a prefix or a prompt before the text."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def cache_name(model: Any) -> str | None:
    """Return the argument that the model's forward takes its cache by; None where it takes none."""
    return next((name for name in CACHE_NAMES if takes(model, name)), None)


def new_cache(model: Any) -> Any:
    """Return an empty cache of the kind that the model's layers ask for."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cache_of(output: Any) -> Any:
    """Return the cache in a forward's output; None where the output has none."""
    return next((c for name in CACHE_NAMES if (c := getattr(output, name, None)) is not None), None)


def keys_values(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each layer's keys and values [rows, heads, tokens, dim]. Raises AttributeError where a layer has none."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors in a cache, whatever its layers call them."""
    held = (x for layer in cache.layers for x in vars(layer).values())
    flat = (t for x in held for t in (x.values() if isinstance(x, dict) else (x,)))
    return sum(t.nbytes for t in flat if isinstance(t, torch.Tensor))


def cache_length(cache: Any) -> int | None:
    """Return how many tokens a cache holds; None where it holds recurrent states, which count none."""
    try:
        return cache.get_seq_length()
    except ValueError:  # transformers 5.24's answer for a cache without attention layers
        return None


def misread_prefix(model: Any) -> str:
    """Return a line where peft hands the model other keys and values than its prefix holds; "" where it does not.

    peft 0.19.0 gives Gemma's layers those of the first two layers. A cache of another shape than the prefix's is not
    judged.
    """
    settings, table = model.active_peft_config, model.prompt_encoder["default"].embedding.weight
    if getattr(settings, "prefix_projection", False):  # the table is not what the layers read
        return ""
    heads = settings.num_attention_heads
    own = table.view(table.shape[0], -1, heads, settings.token_dim // heads).permute(
        1, 2, 0, 3
    )  # [2·layers, H, n, D]
    try:
        read = [x[0] for pair in keys_values(model.get_prompt(1)) for x in pair]
    except (AttributeError, TypeError):  # nothing that has layers
        return ""
    if [x.shape for x in read] != [x.shape for x in own] or all(
        torch.equal(x, y.to(x.dtype)) for x, y in zip(read, own)
    ):
        return ""
    return f"peft {importlib.metadata.version('peft')} gives this model's layers each other's keys and values"


@contextmanager
def one_cache_name(model: Any) -> Iterator[None]:
    """Let peft find the cache of a generation under whichever name it looks for.

    peft (0.21.2) puts a prefix or a prompt in front of the text where it finds no filled `past_key_values` among the
    inputs of a step. A model that takes `cache` has none there, so that a prefix is ignored and a prompt is put in
    again at each step. For the time of this context both names mean the one entry.
    """
    prepare = getattr(model, "base_model_prepare_inputs_for_generation", None)
    if prepare is None or not puts_before(model):
        yield
        return

    def prepared(*args: Any, **kwargs: Any) -> Any:
        return _OneCache(prepare(*args, **kwargs))

    model.base_model_prepare_inputs_for_generation = prepared
    try:
        yield
    finally:
        model.base_model_prepare_inputs_for_generation = prepare
        if model.base_model.__dict__.get("prepare_inputs_for_generation") is prepared:  # peft puts it there
            model.base_model.prepare_inputs_for_generation = prepare


class _OneCache(dict):
    """A forward's arguments, of which all names of the cache mean the one that is there."""

    def _named(self, key: Any) -> Any:
        return (
            next((k for k in CACHE_NAMES if dict.__contains__(self, k)), key) if key in CACHE_NAMES else key
        )

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._named(key))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._named(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._named(key), value)

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(self._named(key), default)

    def pop(self, key: Any, *default: Any) -> Any:
        return super().pop(self._named(key), *default)


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
