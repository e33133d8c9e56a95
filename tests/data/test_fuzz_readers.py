"""Readers of data against readers of others, on drawn files: the same rows, or one line that refuses them."""

import csv
import io
import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoft.config.schema import Limits
from zoft.data.tasks import local
from zoft.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CASES = int(os.environ.get("FUZZ_CASES", "600"))
drawn = settings(
    max_examples=CASES, derandomize=True, deadline=10_000, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
pytestmark = pytest.mark.slow
SMALL = Limits(rows=50, bytes=20_000, cell=200)

text = st.text(st.characters(exclude_categories=()), max_size=12)  # halves of characters and controls, too
plain = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
names = st.sampled_from(["a", "b", "text", "label", "é", "e\u0301", "", " a"]) | plain
scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | text
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=6
)
rows = st.lists(st.dictionaries(names, values, max_size=4), max_size=6)
# Bytes of which a good part is what a format is made of.
pieces = st.lists(
    st.sampled_from([b'{"a": 1}', b"\n", b"\r", b'"', b",", b";", b"\t", b"a,b", b"x", b"[", b"]", b"{", b"}", b"1e999",
                     b"\xff", b"\0", b"\xef\xbb\xbf", b"\xc3\xa9", b"\\ud800", b"NaN", b":", b'"a"', b"null", b" "])
    | st.binary(max_size=4),
    max_size=30,
).map(b"".join)  # fmt: skip


def same(a, b):
    """Equality that tells 1 from True and knows NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def read(folder, name, data, limits=None):
    """Return the rows that are read, without their places, or the line that refuses them; never anything else."""
    path = folder / name
    path.write_bytes(data)
    began = time.monotonic()
    try:
        found = local.read("task.train", str(path), None, limits)
    except UserError as error:
        assert str(error) and name.partition(".")[0] in str(error), error
        return str(error)
    finally:
        assert time.monotonic() - began < 10
    return [row for _, row in found]


def agrees(found, wanted):
    assert len(found) == len(wanted) and all(map(same, found, wanted)), (found, wanted)


def reference_jsonl(data):
    """Return the rows of an object a line by json alone, or None where a line is none, or names a key twice."""

    def once(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    try:
        lines = [x for x in data.decode("utf-8-sig").split("\n") if x.strip()]
        made = [json.loads(line, object_pairs_hook=once) for line in lines]
        return made if all(isinstance(m, dict) for m in made) else None
    except (ValueError, AssertionError, RecursionError):
        return None


@drawn
@given(rows)
def test_rows_as_jsonl_and_json(tmp_path, made):
    lines = "\n".join(json.dumps(r) for r in made).encode()
    wanted = [json.loads(json.dumps(r)) for r in made]
    for name, data in (("d.jsonl", lines), ("d.json", json.dumps(made, indent=1).encode())):
        found = read(tmp_path, name, data)
        if isinstance(found, str):
            assert not made and "no rows" in found, found
        else:
            agrees(found, wanted)


@drawn
@given(pieces)
def test_any_bytes_as_jsonl(tmp_path, data):
    found, wanted = read(tmp_path, "d.jsonl", data), reference_jsonl(data)
    if wanted:
        agrees(found, wanted)
    else:
        assert isinstance(found, str), found


@drawn
@given(pieces)
def test_any_bytes_as_json(tmp_path, data):
    found = read(tmp_path, "d.json", data)
    if isinstance(found, str):
        return
    try:
        whole = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        whole = reference_jsonl(data)
    agrees(found, whole if isinstance(whole, list) else [whole])


@drawn
@given(pieces, st.sampled_from([("d.csv", ","), ("d.tsv", "\t")]))
def test_any_bytes_as_a_table(tmp_path, data, kind):
    name, delimiter = kind
    found = read(tmp_path, name, data)
    if isinstance(found, str):
        return
    table = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True)
    head, *body = [cells for cells in table if cells]
    head = [h.strip() for h in head]
    assert len({h for h in head if h}) == sum(map(bool, head)) and all(len(b) == len(head) for b in body)
    agrees(found, [{h: c or None for h, c in zip(head, cells) if h} for cells in body])


@drawn
@given(st.integers(1, 4), st.data())
def test_tables_that_the_csv_module_writes(tmp_path, width, data):
    head = [f"c{i}" for i in range(width)]
    cell = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
    body = data.draw(st.lists(st.lists(cell, min_size=width, max_size=width), min_size=1, max_size=6))
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([head, *body])
    agrees(
        read(tmp_path, "d.csv", out.getvalue().encode()),
        [dict(zip(head, [c or None for c in b])) for b in body],
    )


@drawn
@given(st.data())
def test_tables_that_pyarrow_writes(tmp_path, data):
    n = data.draw(st.integers(1, 6))
    kinds = [plain, st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.binary(max_size=5),
             st.lists(plain, max_size=3), st.dates(), st.datetimes()]  # fmt: skip
    columns = {}
    for name in data.draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        kind = data.draw(st.sampled_from(kinds))
        columns[name] = data.draw(st.lists(st.none() | kind, min_size=n, max_size=n))
    table = pyarrow.table(columns)
    out = io.BytesIO()
    how = data.draw(st.sampled_from(["none", "snappy", "zstd"]))
    parquet.write_table(table, out, compression=how, row_group_size=data.draw(st.integers(1, 6)))
    agrees(
        read(tmp_path, "d.parquet", out.getvalue()),
        parquet.read_table(io.BytesIO(out.getvalue())).to_pylist(),
    )


WHOLE = io.BytesIO()
parquet.write_table(pyarrow.table({"text": ["a", "bb", None] * 9, "n": list(range(27))}), WHOLE)


@drawn
@given(st.lists(st.tuples(st.integers(0, len(WHOLE.getvalue()) - 1), st.integers(1, 255)), max_size=4),
       st.integers(0, 40))  # fmt: skip
def test_damaged_parquet(tmp_path, changes, cut):
    data = bytearray(WHOLE.getvalue())
    for at, bits in changes:
        data[at] ^= bits
    data = bytes(data[: len(data) - cut])
    found = read(tmp_path, "d.parquet", data)
    if not isinstance(found, str):
        agrees(found, parquet.read_table(io.BytesIO(data)).to_pylist())


@drawn
@given(pieces, st.sampled_from(["d.jsonl", "d.json", "d.csv", "d.tsv"]), st.integers(0, 300))
def test_small_limits_refuse_or_change_nothing(tmp_path, data, name, times):
    data = data + data[-20:] * times
    free, bounded = read(tmp_path, name, data), read(tmp_path, name, data, SMALL)
    if isinstance(bounded, str):
        assert isinstance(free, str) or "limits." in bounded, bounded
    else:
        assert len(bounded) <= SMALL.rows and len(data) <= SMALL.bytes
        agrees(bounded, free)
