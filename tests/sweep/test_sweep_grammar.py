"""Expansion of a sweep's command line, beside Hydra's own."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from zoft.config.compose import names, parse
from zoft.errors import UserError
from zoft.sweep.grammar import Interval, as_text, configs, product, split


@pytest.mark.parametrize(
    "line",
    [
        "lr=1e-6,1e-7 seed=range(0,3)",
        "lr=choice(1e-3,0.5,2) q=1,2 noise=gaussian,rademacher",
        "seed=range(10,0,-3) clip=null,100",
        "steps=sort(30,10,20) train=last-2,norms,'bias'",
        "warmup=range(0,0.5,0.25) zero_points=true,false bits=4,8",
        "lora_targets='q_proj v_proj',all-linear\tlr=1e-4",
    ],
)
def test_as_hydra_expands_it_and_as_zoft_reads_it(line):
    """The same values in the same order, as the key's own type reads them."""
    words = line.split("\t") if "\t" in line else line.split()
    single, swept = split(words)
    ours = [[*single, *(f"{k}={v}" for k, v in row.items())] for row in product(swept)]
    parsed = OverridesParser.create().parse_overrides(words)
    theirs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]

    def read(rows):
        return [sorted((k, v) for k, v in map(parse, row)) for row in rows]

    assert read(ours) == read(theirs) and len(ours) > 1


def test_globs_are_over_what_there_is(tmp_path):
    assert split(["task=glob(rev*)"])[1][0].values == tuple(n for n in names("task") if n.startswith("rev"))
    assert split(["recipe=glob(*,exclude=[q*,lora*])"])[1][0].values == ("mezo", "node", "sparse_mezo")
    assert split(["noise=glob(*)"])[1][0].values == ("gaussian", "rademacher", "rank1")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "reviews-mine.yaml").touch()
    assert "reviews-mine" in split(["task=glob(rev*)"], tmp_path)[1][0].values
    assert configs("glob(mezo/rev*)") == ["mezo/reviews"]
    assert configs("mezo/reviews,mezo/trec") == ["mezo/reviews", "mezo/trec"]
    assert configs("mezo/reviews") == configs(None) == []


def test_what_is_no_sweep_stays_as_it_is():
    words = [
        "lr=1e-6",
        "task.prompt=Review: {text}, and\\nS:",
        "task.choices={a: ' x', b: ' y'}",
        "output_dir=a,b",
    ]
    words += ["train='a,b'", "model=~/x", "task.choices.a= x, y", "--lr", "nonsense"]
    assert split(words) == (words, [])


def test_intervals():
    dims = split(["lr=tag(log,interval(1e-6,1e-4))", "q=interval(1,8)", "eps=interval(0,1)"])[1]
    assert [d.interval for d in dims] == [
        Interval(1e-6, 1e-4, log=True), Interval(1, 8, whole=True), Interval(0, 1)
    ]  # fmt: skip
    assert [d.some() for d in dims] == [("1e-6", "0.0001"), ("1", "8"), ("0.0", "1.0")]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("lr=1e-6,", ["lr=1e-6,", "list, choice()"]),
        ("lr=range(", ["lr=range(", "quote"]),
        ("lr=interval(2,1)", ["interval(lowest, highest)"]),
        ("lr=tag(log,interval(0,1))", ["above 0"]),
        ("lr=1,1", ["1 is there twice"]),
        ("lr=glob(*)", ["glob() is for", "recipe"]),
        ("task=glob(x*)", ["matches none of", "reviews"]),
        ("output_dir=choice(a,b)", ["the sweep's folder"]),
        ("model=~/x,~/y", ["quote values"]),
        ("seed=range(3,0)", ["no values"]),
    ],
)
def test_mistakes_are_one_line(text, parts):
    with pytest.raises(UserError) as error:
        split([text])
    assert "\n" not in str(error.value) and all(p in str(error.value) for p in parts), error.value


def test_numbers_read_as_they_are_typed():
    values = (1e-6, 1.5e-7, 0.5, 3, 1e30, None, True, "x")
    assert [as_text(v) for v in values] == ["1e-6", "1.5e-7", "0.5", "3", "1e30", "null", "true", "x"]
    assert all(float(as_text(v)) == v for v in values[:5])
