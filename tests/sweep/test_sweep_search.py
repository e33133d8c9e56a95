"""A search: real trials by Optuna, kept in its journal, gone on with after a stop."""

import json
import math
from pathlib import Path

import pytest
from test_sweep import place  # noqa: F401

from zoft.errors import UserError
from zoft.sweep import job, plan, search

optuna = pytest.importorskip("optuna")


def launch(log, slots=3, stop_after=None):
    """Jobs whose loss is a function of their config: a bowl at lr = 1e-4 and q = 3; q = 5 fails."""

    def run(root, names, extra, say):
        for name in names:
            if stop_after is not None and len(log) == stop_after:
                raise plan.Interrupted
            log.append(name)
            values = plan.read_plan(root)["jobs"][name]
            if values["q"] == "5":
                job.ended(root / name, 1)
                continue
            loss = (math.log10(float(values["lr"])) + 4) ** 2 + (int(values["q"]) - 3) ** 2
            result = {"before": {}, "after": {"loss": loss}}
            (root / name / "result.json").write_text(json.dumps(result))

    return plan.Launch(run, slots)


WORDS = ["lr=tag(log,interval(1e-6,1e-2))", "q=interval(1,5)", "output_dir=s"]


def test_a_search_finds_the_bowl_and_goes_on_where_it_stopped(place):  # noqa: F811
    made = plan.plan("mine.yaml", WORDS, search="loss")
    assert not made.jobs and not Path("s").exists()
    first = []
    with pytest.raises(plan.Interrupted):
        search.search(made, launch(first, stop_after=7), 40, "loss", None, first.append)
    assert len(first) == 7
    second = []
    made = plan.plan("mine.yaml", WORDS, search="loss")
    search.search(made, launch(second), 40, "loss", None, second.append)
    jobs = list(plan.read_plan(made.root)["jobs"])
    done = [n for n in jobs if job.job_state(made.root / n) == "done"]
    failed = [n for n in jobs if job.job_state(made.root / n) == "failed"]
    assert len(done) + len(failed) >= 40 and len(done) + len([n for n in second if n in failed]) >= 40
    assert set(first) & set(second) <= set(
        failed
    )  # nothing ran twice, but what failed in the round that was stopped
    losses = {n: job.result(made.root / n)["after"]["loss"] for n in done}
    drawn = [(math.log10(float(v["lr"])), int(v["q"])) for v in plan.read_plan(made.root)["jobs"].values()]
    assert min(losses.values()) < 0.3
    assert all(-6 <= lr <= -2 and 1 <= q <= 5 for lr, q in drawn) and len({q for _, q in drawn}) > 2
    third = []
    search.search(made, launch(third), 40, "loss", None, third.append)
    assert len(third) <= len([n for n in second if n in failed])  # only what failed is made up for


def test_mistakes(place):  # noqa: F811
    made = plan.plan("mine.yaml", WORDS, search="loss")
    search.search(made, launch([]), 2, "loss", None, print)
    with pytest.raises(UserError, match="is to minimize"):
        search.search(made, launch([]), 3, "loss", "maximize", print)
    with pytest.raises(UserError, match="the results have loss"):
        search.search(made, launch([]), 2, "auc", None, print)
    with pytest.raises(UserError, match="must be ≥ 0"):
        plan.plan("mine.yaml", ["lr=interval(-1,1)"], search="loss")
