"""Config trees and command lines, drawn: a checked config that comes back as it was, or one line that refuses it."""

import os
import time
from dataclasses import asdict

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoft.config.compose import to_yaml
from zoft.config.schema import fields
from zoft.errors import UserError
from zoft.method.configured import compose

drawn = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "300")), derandomize=True, deadline=10_000, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
pytestmark = pytest.mark.slow
KEYS = [k for k in fields() if k not in ("output_dir", "reward", "recipe")]
text = st.text(st.characters(exclude_categories=()), max_size=10)
words = st.sampled_from(["auto", "all", "true", "null", "1e-3", "-1", "0", "nan", "inf", "1e999", "${lr}", "${oc.env:HOME}",
                         "[1, 2]", "{a: b}", "!!python/object:os.system", "&a [*a]", "007", "no", "local", "tiny"])  # fmt: skip
scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | words | text
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=5
)
trees = st.dictionaries(st.sampled_from([k for k in KEYS if "." not in k]) | text, values, max_size=4)


def outcome(config, overrides=()):
    """Return the checked config, or the line that refuses it; never anything else, and never after a while."""
    began = time.monotonic()
    try:
        return compose(config, overrides)
    except UserError as error:
        assert str(error)
        return str(error)
    finally:
        assert time.monotonic() - began < 10


def round_trip(config, folder):
    file = folder / "again.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = compose(str(file), [f"output_dir={config.output_dir}"])
    assert repr(asdict(again) | {"output_dir": ""}) == repr(asdict(config) | {"output_dir": ""})


BASE = {"model": "tiny", "task": {"name": "reviews"}}


@drawn
@given(trees)
def test_trees(tmp_path, tree):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(BASE | tree, allow_unicode=False), encoding="utf-8")
    found = outcome(str(file))
    if not isinstance(found, str):
        round_trip(found, tmp_path)


@drawn
@given(st.lists(st.sampled_from(["a: 1", "model: tiny", "task: reviews", "lr: 1", "- x", "  b: 2", "&a", "*a", "!!int", "{", "}",
                                 "[", "? ", "\t", "defaults: [x]", "defaults: [_self_]", "%YAML 1.1", "---", "\0", "task:",
                                 "limits: {rows: 0}", "limits: {rows: 5}", "hydra: 1"]) | text, max_size=8))  # fmt: skip
def test_any_text(tmp_path, lines):
    file = tmp_path / "mine.yaml"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    found = outcome(str(file))
    if not isinstance(found, str):
        round_trip(found, tmp_path)


@drawn
@given(st.lists(st.tuples(st.sampled_from(KEYS) | text, words | text | st.integers().map(str)), max_size=3))
def test_command_lines(tmp_path, pairs):
    found = outcome(None, ["model=tiny", "task=reviews", *(f"{k}={v}" for k, v in pairs)])
    if not isinstance(found, str):
        round_trip(found, tmp_path)
