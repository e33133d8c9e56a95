"""Read what is swept: `lr=1e-6,1e-7`, choice(), range(), glob(), interval(), in Hydra's override grammar."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.config.compose import GROUPS, names
from zoft.config.schema import fields
from zoft.errors import UserError
from zoft.method import recipes

CONFIG = "config"  # --config with several names is a dimension like any key


@dataclass(frozen=True)
class Interval:
    """Describe numbers from low to high; log: drawn evenly in their logarithms; whole: whole numbers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Dimension:
    """Describe a swept key: its values as they would be typed, or an Interval to search."""

    key: str
    values: tuple[str, ...] = ()
    interval: Interval | None = None

    def some(self) -> tuple[str, ...]:
        """Return values that stand for all of them: an interval's ends."""
        if self.interval is None:
            return self.values
        cast = int if self.interval.whole else float
        return as_text(cast(self.interval.low)), as_text(cast(self.interval.high))


def split(overrides: Sequence[str], own: Path | None = None) -> tuple[list[str], list[Dimension]]:
    """Return (overrides with one value, dimensions) of a sweep's command line.

    own: the folder of the user's config, whose groups glob() looks into. Raises UserError for a broken sweep; what
    is no sweep is left as it is, for `compose` to judge.
    """
    single, swept = [], []
    for text in overrides:
        found = dimension(text, own)
        swept.append(found) if isinstance(found, Dimension) else single.append(found)
    return single, swept


def configs(config: str | None, own: Sequence[str] = ()) -> list[str]:
    """Return the names that `--config a,b` or `--config 'glob(*/reviews)'` means; [] where it is one name, or none."""
    known = names()
    if config is None or config in known or Path(config).is_file() or not re.search(r"[,(]", config):
        return []
    found = dimension(f"{CONFIG}={config}", None)
    if not isinstance(found, Dimension) or found.interval:
        raise UserError(f"--config {config}: give one name, a list, or glob(mezo/*)")
    return list(found.values)


def dimension(text: str, own: Path | None) -> Dimension | str:
    """Return what one `key=…` sweeps over, or the text itself where it has one value."""
    key, equals, raw = text.partition("=")
    if not equals or text.startswith(("-", "+", "~")):
        return text  # compose says what is wrong
    called = re.match(r"(choice|range|interval|glob|shuffle|sort|tag|int|float)\(", raw)
    f = fields().get(key)
    # A template or a mapping holds commas of its own.
    plain = f is not None and ("template" in f.metadata or str(f.type).startswith("dict"))
    if not called and ("," not in raw or plain or key == "output_dir" or key.startswith("task.choices.")):
        return text
    if key == "output_dir":
        raise UserError(f"{text}: is the sweep's folder; each job has one of its own in it")
    value = _parsed(key, raw)
    if value is None:
        return text
    return value if isinstance(value, Dimension) else _of(key, raw, value, own)


def product(swept: Sequence[Dimension]) -> list[dict[str, str]]:
    """Return every combination of values, {key: text}, the last key fastest."""
    return [dict(zip([d.key for d in swept], row)) for row in itertools.product(*(d.values for d in swept))]


def as_text(value: Any) -> str:
    """Return a value as a user would type it: 1e-6, true, null."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", repr(value))
    if isinstance(value, (dict, list)):
        import yaml

        return yaml.safe_dump(value, default_flow_style=True, width=10000, allow_unicode=True).strip()
    return str(getattr(value, "text", value))  # text: of a quoted string


def _parsed(key: str, raw: str) -> Any:
    """Hydra's reading of a swept value; None where it is one value after all (quoted, a list in brackets)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"key={raw}")
    except HydraException as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"{key}={raw}: no list, choice(), range(), glob() or interval() ({said}); quote values that hold such signs"
        ) from None
    return override if override.is_sweep_override() else None


def _of(key: str, raw: str, override: Any, own: Path | None) -> Dimension:
    from hydra.core.override_parser.types import Glob, IntervalSweep, QuotedString

    value = override.value()
    if isinstance(value, Glob):
        return Dimension(key, _globbed(key, raw, value, own))
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high):
            raise UserError(f"{key}={raw}: write interval(lowest, highest)")
        kind = str(fields()[key].type) if key in fields() else ""
        whole = float(low).is_integer() and float(high).is_integer() and "int" in kind
        if "log" in value.tags and low <= 0:
            raise UserError(f"{key}={raw}: a logarithm needs numbers above 0")
        return Dimension(key, interval=Interval(float(low), float(high), "log" in value.tags, whole))
    texts = tuple(
        as_text(_plain(v) if not isinstance(v, QuotedString) else v) for v in override.sweep_iterator()
    )
    if not texts:
        raise UserError(f"{key}={raw}: has no values")
    if len(set(texts)) < len(texts):
        twice = next(t for t in texts if texts.count(t) > 1)
        raise UserError(f"{key}={raw}: {twice} is there twice; keep one")
    return Dimension(key, texts)


def _plain(value: Any) -> Any:
    """Hydra's quoted strings inside lists and maps as plain ones."""
    if isinstance(value, dict):
        return {getattr(k, "text", k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return getattr(value, "text", value)


def _globbed(key: str, raw: str, pattern: Any, own: Path | None) -> tuple[str, ...]:
    if key == CONFIG:
        known = names()
    elif key in GROUPS:
        folder = own / key if own else None
        mine = [p.stem for p in folder.glob("*.yaml")] if folder and folder.is_dir() else []
        known = sorted({*names(key), *mine})
    elif key == "recipe":
        known = recipes.names()
    else:
        field = fields().get(key)
        words = field.metadata.get("one_of", ()) if field and not str(field.type).startswith("float") else ()
        known = [str(w) for w in words]
    if not known:
        raise UserError(
            f"{key}={raw}: glob() is for --config, {', '.join(GROUPS)}, recipe, and keys with a choice of words"
        )
    found = tuple(pattern.filter(known))
    if not found:
        raise UserError(f"{key}={raw}: matches none of {', '.join(known)}")
    return found
