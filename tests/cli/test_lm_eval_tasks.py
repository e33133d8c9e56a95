"""lm-evaluation-harness in process, on a task file and data of our own; skipped where the package is not installed."""

import importlib.util
import json

import pytest
import tiny
import torch
from typer.testing import CliRunner

from zoft.cli.main import app

HERE = importlib.util.find_spec("lm_eval") is not None
ROWS = [
    {"text": t, "options": ["no 1", "yes"], "gold": i % 2}
    for i, t in enumerate(("a b:", "d no:", "c c b:", "e:"))
]
TASK = """
task: ours
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: "{{options}}"
doc_to_target: gold
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    tiny.save(tmp_path / "tiny")
    tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "ours.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return tmp_path


def zoft(*words):
    return CliRunner().invoke(app, ["eval", "tiny", "task=reviews", "device=cpu", "threads=1", *words])


@pytest.mark.skipif(not HERE, reason="lm-eval is not installed (pip install lm-eval)")
def test_a_task_file_of_ones_own_scores_as_the_model_does(place):
    done = zoft("--lm-eval", "ours", "--lm-eval-path", "files", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    found = json.loads(done.stdout.splitlines()[-1])["ours"]
    model, tokenizer, hits = tiny.llama(), tiny.tokenizer(), []
    for row in ROWS:
        sums = []
        for text in row["options"]:
            ids, whole = tokenizer(row["text"])["input_ids"], tokenizer(row["text"] + " " + text)["input_ids"]
            logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(logp[i - 1, whole[i]].item() for i in range(len(ids), len(whole))))
        hits.append(sums[row["gold"]] == max(sums))
    assert found["acc"] == sum(hits) / 4
    assert "±" in zoft("--lm-eval", "ours", "--lm-eval-path", "files").stdout
    done = zoft("--lm-eval", "oursx", "--lm-eval-path", "files")
    assert done.exit_code == 2 and "did you mean ours?" in done.stderr


@pytest.mark.parametrize("words, said", [
    (["--lm-eval", " "], "--lm-eval is empty"), (["--lm-eval", "a", "--lm-eval-path", "nowhere"], "nowhere"),
    (["--lm-eval-path", "files"], "without --lm-eval"), (["--lm-eval", "a", "--examples", "x"], "--examples x"),
])  # fmt: skip
def test_mistakes_are_one_line(place, words, said):
    done = zoft(*words)
    assert done.exit_code == 2 and said in done.stderr, (done.stderr, done.exception)


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_without_the_package_one_line_says_what_to_install(place):
    done = zoft("--lm-eval", "ours")
    assert done.exit_code == 2 and "pip install lm-eval" in done.stderr
