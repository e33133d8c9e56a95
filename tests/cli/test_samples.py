"""`zoft samples` and the report of runs that write: against texts written here with the saved weights, and sums of metrics.jsonl."""

import json
import os
import statistics

import pytest
import tiny
import transformers as hf
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.objectives.text import generate

KEYS = ["task=arithmetic", "task.level=1", "model=tiny", "batch_size=2", "q=2", "noise=rank1", "max_length=128", "threads=1",
        "max_new_tokens=5", "eval_limit=4", "lr=1e-2", "shaping=zscore", "stop=null"]  # fmt: skip
SCORE = "def score(rows, texts):\n    return [t.count('s') + len(t) / 9 for t in texts]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    tiny.save(folder / "tiny")
    (folder / "mine.py").write_text(SCORE, encoding="utf-8")
    before = os.getcwd()
    os.chdir(folder)
    for seed in (0, 1):
        done = CliRunner().invoke(
            app,
            [
                "train",
                *KEYS,
                "steps=12",
                f"seed={seed}",
                f"output_dir=runs/{seed}",
                "--reward",
                "mine.py:score",
            ],
        )
        assert done.exit_code == 0, (done.output, done.exception)
    yield folder
    os.chdir(before)


def zoft(*words):
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_samples_are_what_base_and_run_write(place):
    done = zoft("samples", "runs/0", "-n", "3", "--json", "--reward", "mine.py:score")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    names: dict = {}
    exec(SCORE, names)
    tokenizer = tiny.tokenizer()
    for side, folder in (("base", "tiny"), ("run", "runs/0/model")):
        model = hf.AutoModelForCausalLM.from_pretrained(folder)
        contexts = [(1, *tokenizer(s["prompt"], add_special_tokens=False)["input_ids"]) for s in found]
        want = generate(model, tokenizer, contexts, max_new_tokens=5)
        assert [s[side]["text"] for s in found] == want
        assert [s[side]["reward"] for s in found] == names["score"](None, want)
    assert any(s["base"]["text"] != s["run"]["text"] for s in found)


def test_the_page_has_prompts_texts_and_means(place):
    shown = zoft("samples", "runs/0", "-n", "2", "--reward", "mine.py:score").stdout
    assert shown.count("prompt  What is") == 2 and shown.count("Answer:") == 2
    assert "(mean of 2)" in shown and shown.count("[reward ") == 4
    done = zoft("samples", "runs/0", "-n", "1")
    assert "so the task scores texts here" in done.stderr
    assert "[reward 0]" in done.stdout


def test_a_run_of_a_task_with_another_reward_resumes_with_that_alone(place):
    (place / "runs/0/result.json").rename(place / "kept.json")
    done = CliRunner().invoke(app, ["train", "--resume", "runs/0"])
    (place / "kept.json").rename(place / "runs/0/result.json")
    assert done.exit_code == 2 and "its reward runs code; name it again, --reward" in done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (["tiny"], "not a run's folder"),
        (["runs/0", "lr=3"], "lr: does nothing to samples"),
        (["runs/0", "--reward", "none.py:score"], "no such .py file"),
    ],
)
def test_what_cannot_be_shown_is_one_line(place, words, said):
    done = CliRunner().invoke(app, ["samples", *words])
    assert done.exit_code == 2 and said in done.stderr


def test_a_report_has_what_was_written_while_training(place):
    shown = zoft("report", "runs", "--png", "curve.png").output
    assert (place / "curve.png").stat().st_size > 1000
    (line,) = [x for x in shown.splitlines() if "→" in x]
    rows = [
        [json.loads(x) for x in (place / f"runs/{seed}/metrics.jsonl").read_text().splitlines()]
        for seed in (0, 1)
    ]
    steps = [[r for r in some if "eval" not in r] for some in rows]
    first = [some[0]["reward"] for some in steps]
    assert f"{statistics.fmean(first):.4g} ± {statistics.stdev(first):.4g} → " in line
    assert f"→ {statistics.fmean(some[-1]['differ'] for some in steps):.4g} ± " in line
