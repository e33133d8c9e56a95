"""Runs by rankings: of a score, of files that somebody writes, and what is refused."""

import json
import os
import re

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.cli.rank import RankServer
from zoft.errors import UserError
from zoft.ledger.log import read_ledger
from zoft.train.asked import checked, letters_of

COUNT = "def score(rows, texts):\n    return [{} for t in texts]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny.save(folder / "tiny")
    tiny.write_rows(folder / "my.jsonl")
    for name, formula in {
        "plain": "float(t.count('y'))", "exp": "2.718281828 ** t.count('y')", "cube": "t.count('y') ** 3 - 5.0", "other": "float(len(set(t)))",
    }.items():  # fmt: skip
        (folder / f"{name}.py").write_text(COUNT.format(formula), encoding="utf-8")
    (folder / "my.yaml").write_text(
        "model: tiny\ntask:\n  name: local\n  train: my.jsonl\n  prompt: 'o {text} y:'\n  label: label\n"
        "  choices: {a: ' no', b: ' yes'}\nsteps: 4\nbatch_size: 2\nq: 3\nmax_length: 48\nmax_new_tokens: 8\nthreads: 1\n"
        "lr: 1.0e-2\neps: 0.05\nnoise: rank1\nobjective: rank\neval_limit: 4\n",
        encoding="utf-8",
    )
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def zoft(*words, code=0):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, (done.output, done.exception)
    return done


def answer(question, worth):
    """Rank a question's texts by what each is worth, ties in one tier."""
    rankings = []
    for asked in question["questions"]:
        tiers: dict = {}
        for letter, text in asked["texts"].items():
            tiers.setdefault(worth(text), []).append(letter)
        rankings.append({"order": [tiers[v] for v in sorted(tiers, reverse=True)]})
    return {"rankings": rankings}


def test_monotone_scores_give_one_ledger(place):
    for name in ("plain", "exp", "cube", "other"):
        zoft("train", "--config", "my.yaml", "--reward", f"{name}.py:score", f"output_dir={name}")
    found = {n: read_ledger(place / n / "ledger")[1] for n in ("plain", "exp", "cube", "other")}
    facts = {n: [(r.multipliers, r.losses, r.decay, r.skipped) for r in rs] for n, rs in found.items()}
    assert facts["plain"] == facts["exp"] == facts["cube"] != facts["other"]
    assert any(any(r.multipliers) for r in found["plain"])
    weights = [(place / n / "model/model.safetensors").read_bytes() for n in ("plain", "exp")]
    assert weights[0] == weights[1]
    result = json.loads((place / "plain/result.json").read_text())
    assert "reward" in result["after"]


def test_a_step_is_the_weighted_sum_of_ordered_pairs(place):
    """From the losses in the ledger: -w_i/(N(P-1)), so c_k = -(w₊ - w₋)/|E|, up to |E| which one number tells."""
    zoft(
        "train",
        "--config",
        "my.yaml",
        "--reward",
        "other.py:score",
        "output_dir=pairs",
        "steps=3",
        "save_model=false",
    )
    for r in read_ledger(place / "pairs/ledger")[1]:
        w = -np.array(r.losses) * 2 * 5
        assert np.allclose(w, np.round(w), atol=1e-4) and abs(w.sum()) < 1e-3
        step = -(w[0::2] - w[1::2])
        got = -np.array(r.multipliers) / 1e-2
        ratio = step[step != 0] / got[step != 0]
        assert np.allclose(ratio, ratio[0], rtol=1e-4) and 0 < ratio[0] <= 2 * 15 + 1e-3


def test_answers_in_files_are_what_a_score_gives(place):
    keys = ["--config", "my.yaml", "rank_by=file", "output_dir=filed"]
    done = zoft("train", *keys, code=75)
    assert (
        "step 0: waits for a ranking, by `zoft rank filed`" in done.stderr and "--resume filed" in done.stderr
    )
    zoft("train", "--resume", "filed", code=75)  # nothing was answered
    for step in range(4):
        path = place / f"filed/rank/{step:06d}.json"
        question = json.loads(path.read_text())
        assert question["step"] == step and len(question["questions"]) == 2
        assert not re.search("member|probe|reward", path.read_text())
        reply = answer(question, lambda text: text.count("y"))
        if step % 2:  # through the page's server
            server = RankServer(place / "filed", f"{step:06d}")
            server.take(json.dumps({"step": step, "at": 0, **reply}).encode(), True)
            server.server_close()
        else:
            path.with_suffix(".answer.json").write_text(json.dumps(reply))
        zoft("train", "--resume", "filed", code=75 if step < 3 else 0)
    asked, scored = (read_ledger(place / n / "ledger")[1] for n in ("filed", "plain"))
    assert [(r.multipliers, r.losses) for r in asked] == [(r.multipliers, r.losses) for r in scored]
    assert (place / "filed/model/model.safetensors").read_bytes() == (
        place / "plain/model/model.safetensors"
    ).read_bytes()
    zoft("replay", "filed", "--out", "rebuilt")
    assert (place / "rebuilt/model.safetensors").read_bytes() == (
        place / "filed/model/model.safetensors"
    ).read_bytes()


def test_the_best_point_of_a_line_is_taken(place):
    """The whole step, a half, a quarter or none; by a score, and by answers in files that say the same."""
    keys = ["--config", "my.yaml", "rank_line=3", "lr=0.3", "steps=5"]
    zoft("train", *keys, "--reward", "other.py:score", "output_dir=line")
    zoft("train", *keys, "rank_by=file", "output_dir=lined", code=75)
    for turn in range(10):
        (path,) = [
            p for p in sorted((place / "lined/rank").glob("*.json"))
            if "." not in p.stem and not p.with_suffix(".answer.json").exists()
        ]  # fmt: skip
        assert path.stem == f"{turn // 2:06d}{'-line' if turn % 2 else ''}"
        reply = answer(json.loads(path.read_text()), lambda text: len(set(text)))
        path.with_suffix(".answer.json").write_text(json.dumps(reply))
        zoft("train", "--resume", "lined", code=75 if turn < 9 else 0)
    scored, asked = (read_ledger(place / n / "ledger")[1] for n in ("line", "lined"))
    assert [(r.multipliers, r.losses) for r in scored] == [(r.multipliers, r.losses) for r in asked]
    taken = set()
    for r in scored:
        w = -np.array(r.losses) * 2 * 5
        whole = w[0::2] - w[1::2]
        top = np.abs(whole).argmax()
        taken.add(round(abs(r.multipliers[top]) / abs(whole[top]) / 0.3 * 30, 1))
    assert len(taken) > 1, taken  # not always the same point
    weights = [(place / n / "model/model.safetensors").read_bytes() for n in ("line", "lined")]
    zoft("replay", "line", "--out", "line-rebuilt")
    assert weights[0] == weights[1] == (place / "line-rebuilt/model.safetensors").read_bytes()
    assert json.loads((place / "line/result.json").read_text())["forwards"] == 5 * 2 * (6 + 4)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no JSON"),
        ("[" * 100000, "is no JSON"),
        ("{}", "holds no list of rankings for 2 questions"),
        ('{"rankings": [{"order": []}]}', "holds 1 rankings for 2 questions"),
        ('{"rankings": [{"order": [["zz"]]}, {"order": []}]}', "ranking 1 names zz; its texts are a"),
        ('{"rankings": [{"order": []}, {"order": [["a"], ["a"]]}]}', "ranking 2 names a twice"),
        ('{"rankings": [{"order": ["a"]}, {"order": []}]}', "ranking 1 has no order of lists"),
        ('{"rankings": [3, {"order": []}]}', "ranking 1 has no order of lists"),
    ],
)
def test_an_answer_that_is_none_stops_with_one_line(place, text, said):
    if not (place / "bad").exists():
        zoft("train", "--config", "my.yaml", "rank_by=file", "output_dir=bad", code=75)
    (place / "bad/rank/000000.answer.json").write_text(text)
    done = zoft("train", "--resume", "bad", code=2)
    assert said in done.stderr and "000000.answer.json" in done.stderr
    assert len(read_ledger(place / "bad/ledger")[1]) == 0


def test_letters_are_dealt_anew_and_shared_by_equal_texts():
    texts = ["x", "y", "x", "z"]
    dealt = [letters_of(3, step, 0, texts) for step in range(40)]
    assert all(d[0] == d[2] and sorted({*d}) == ["a", "b", "c"] for d in dealt)
    assert len({d[0] for d in dealt}) == 3  # no letter stands for a member
    assert letters_of(3, 1, 0, texts) == dealt[1]
    many = letters_of(0, 0, 0, [str(i) for i in range(60)])
    assert len({*many}) == 60 and "aa" in many


def test_partial_answers_are_read():
    texts = [{"a": "1", "b": "2", "c": "3"}]
    tree = {"rankings": [{"order": [["b"], []], "unknown": ["c"]}]}
    assert checked(tree, texts, "x") == [([["b"]], ["c"])]
    with pytest.raises(UserError, match="x: ranking 1 names b twice"):
        checked({"rankings": [{"order": [["b"]], "unknown": ["b"]}]}, texts, "x")


def test_keys_that_do_nothing_are_refused(place):
    for words, said in [
        (["objective=f1", "rank_by=file"], "rank_by=file: is for objective=rank"),
        (["objective=f1", "rank_best=2"], "rank_best=2: is for objective=rank"),
        (["rank_by=file", "rank_best=2"], "rank_best=2: whoever ranks names as many as they like"),
        (["shaping=ranks"], "shaping=ranks: objective=rank has ranks"),
        (["shaping_group=prompt"], "shaping_group=prompt: objective=rank ranks after each prompt"),
        (["clip=1"], "clip=1: objective=rank has no projected gradient"),
        (["rank_line=2", "momentum=0.9"], "momentum=0.9: rank_line=2 ranks plain steps"),
        (["rank_line=2", "noise=gaussian"], "rank_line=2: its points are written at together"),
        (["meazo=0.9"], "meazo=0.9: does not go with objective=rank"),
        (["best_by=rank", "eval_every=2", "early_stop=2"], "best_by=rank"),
    ]:
        done = zoft("train", "--config", "my.yaml", "output_dir=never", *words, code=2)
        assert said in done.stderr, (words, done.stderr)
