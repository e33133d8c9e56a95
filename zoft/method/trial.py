"""Try a page of the user's own once on made-up numbers, so that a mistake in it shows before anything loads or is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.method.estimators.estimator import Estimator
from zoft.method.estimators.named import base_estimator
from zoft.method.method import Method
from zoft.method.rules import Rule, rule_of

NUMBERS = 8  # of the made-up tensor that a rule moves


def try_page(config: Config, method: Method) -> None:
    """Call a page's estimator on made-up losses and its update rule on a made-up tensor.

    A packaged recipe is not tried. Raises UserError, one line that names the page and what is wrong.
    """
    if not method.digest:
        return
    with _named(config, "estimator"):
        _try_estimator(base_estimator(config), config.q, config.eps)
    if rule := rule_of(config):
        with _named(config, "update rule"):
            _try_rule(rule)


def _try_estimator(e: Estimator, q: int, eps: float) -> None:
    probes, count = e.probes(q, eps), e.count(q)
    assert len(probes) == count, f"probes gives {len(probes)} points and count says {count} with q={q}"
    own: dict[int, int] = {}
    for direction, scale in probes:
        own[direction] = own.get(direction, 0) + bool(scale)
    asked = sorted(k for k, n in own.items() if n)
    assert asked == list(range(q)), (
        f"with q={q} its probes with a scale have directions {asked[:5]}, not 0 to {q - 1}"
    )
    assert max(own.values()) <= 2, "a direction has at most two probes with a scale"
    losses = torch.linspace(1.0, 2.0, count, dtype=torch.float64)
    c, _ = e.run(
        losses, q, torch.tensor(eps, dtype=torch.float64), torch.tensor(e.state, dtype=torch.float64)
    )
    if e.second is not None:
        multipliers = [1e-3] * q
        again = e.second.probes(multipliers)
        assert len(again) == e.second.count(q) > 0, (
            f"its second round has {len(again)} points and count says {e.second.count(q)} with q={q}"
        )
        assert all(p.direction in range(q) for p in again), (
            f"its second round has directions beyond 0 to {q - 1}"
        )
        found = e.second.choose([1.0 + i for i in range(len(again))], multipliers)
        assert len(found) == q, f"its second round chooses {len(found)} multipliers, not {q}"
    assert isinstance(c, torch.Tensor), f"coefficients returns a {type(c).__name__}, not a tensor [{q}]"


def _try_rule(rule: Rule) -> None:
    state: dict = {name: torch.zeros(NUMBERS) for name in rule.state} | {"t": 1}
    moved = rule.step(torch.zeros(NUMBERS), torch.linspace(-1.0, 1.0, NUMBERS), state, 1e-3)
    shape = tuple(moved.shape) if isinstance(moved, torch.Tensor) else type(moved).__name__
    assert shape == (NUMBERS,), f"step returns {shape} of a tensor ({NUMBERS},)"


@contextmanager
def _named(config: Config, what: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"--recipe {config.recipe}: {error}") from None
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        kind = "" if isinstance(error, AssertionError) and said else f"{type(error).__name__}: "
        raise UserError(
            f"--recipe {config.recipe}: its {what} fails on made-up numbers: {kind}{said}; mend the page"
        ) from None
