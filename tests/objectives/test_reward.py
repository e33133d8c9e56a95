"""A reward of the user's own: what it gets, what may go wrong in it, and that no config or checkpoint can name one."""

import contextlib
import json
import os
import time

import pytest
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.errors import UserError
from zoft.objectives.reward import load, look

SCORE = "def score(rows, texts):\n    return [len(t) + r['n'] for r, t in zip(rows, texts)]\n"
ROWS, TEXTS, WHERE = [{"n": 1}, {"n": 2}, {"n": 3}], ["a", "bb", ""], ["f:1", "f:2", "f:3"]


def made(tmp_path, text, seconds=5.0, name="score"):
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    return load(f"{tmp_path}/mine.py:{name}", seconds)


def test_a_number_a_row_of_copies(tmp_path):
    reward = made(tmp_path, SCORE)
    assert reward(ROWS, TEXTS, WHERE) == [2.0, 4.0, 3.0]
    body = "def score(rows, texts):\n    for r in rows: r['n'] = 0; texts[0] = 'x'\n    return {}\n"
    for returns in ("[True, 2, 3.5]", "(x for x in [1, 2, 3.5])", "__import__('numpy').array([1, 2, 3.5])",
                    "__import__('torch').tensor([1, 2, 3.5])"):  # fmt: skip
        assert made(tmp_path, body.format(returns))(ROWS, TEXTS, WHERE) == [1.0, 2.0, 3.5]
    assert ROWS[0] == {"n": 1} and TEXTS[0] == "a"


@pytest.mark.parametrize(
    "body,said",
    [
        ("return [1, 2]", r"returned 2 numbers for 3 rows \(f:1 … f:3\); return one per row, 3"),
        ("return None", "returned None for 3 rows .*; a list of 3 numbers is wanted"),
        ("return [1, float('nan'), 3]", "nan is no finite number, for f:2"),
        ("return [1, 2, float('inf')]", "inf is no finite number, for f:3"),
        ("return [1, '2', 3]", "'2' is no finite number, for f:2"),
        ("return [1, None, 3]", "None is no finite number, for f:2"),
        ("return [[1, 2], 3, 3]", r"\[1, 2\] is no finite number, for f:1"),
        (
            "return [1 / (r['n'] - 2) for r in rows]",
            r"ZeroDivisionError: .* \(line 2\), for f:2 and the text 'bb'",
        ),
        ("return [r['m'] for r in rows]", r"KeyError: 'm' \(line 2\), for f:1 and the text 'a'"),
        ("raise SystemExit(3)", r"SystemExit: 3 \(line 2\), for f:1"),
        ("return [1 / (3 - len(rows))] * 3", r"ZeroDivisionError: .*, for 3 rows \(f:1 … f:3\)"),
        ("import time; time.sleep(20)", "no answer in reward_seconds=0.5 for 3 rows"),
        ("while True: pass", "no answer in reward_seconds=0.5 .*; make it faster, or raise reward_seconds"),
    ],
)
def test_what_goes_wrong_in_it_is_one_line_with_the_function_and_the_row(tmp_path, body, said):
    if "while" in body:
        body = "import time; end = time.time() + 3\n    while time.time() < end: pass"
    reward = made(tmp_path, f"def score(rows, texts):\n    {body}\n", seconds=0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^reward mine\.py:score: {said}") as error:
        reward(ROWS, TEXTS, WHERE)
    assert "\n" not in str(error.value) and time.monotonic() - began < 10


@pytest.mark.parametrize(
    "text",
    [
        "from math import *\n",
        "globals()['sco' + 're'] = len\n",
        "import math as score\n",
        "try:\n    score = len\nexcept ValueError:\n    score = max\n",
        "def other(rows, texts): return []\n\nscore, x = other, 1\n",
        "if True:\n    async def score(rows, texts): pass\n",
    ],
)
def test_a_file_that_may_have_the_function_is_not_refused_unrun(tmp_path, text):
    (tmp_path / "mine.py").write_text(f"{text}\nraise SystemExit('run')\n")
    assert look(f"{tmp_path}/mine.py:score")[1] == "score"
    with pytest.raises(UserError, match="SystemExit: run"):
        load(f"{tmp_path}/mine.py:score", 1.0)


@pytest.mark.parametrize(
    "text,name,said",
    [
        ("def score(rows, texts:\n", "score", "line 1: "),
        ("x = 1\nimport no_such_module\n" + SCORE, "score", "line 2: ModuleNotFoundError"),
        (SCORE, "scores", "no function scores in it; did you mean score?"),
        ("score = 3\n", "score", "no function score in it"),
        (SCORE, "", "name a file and a function in it: my_reward.py:score"),
        (SCORE, "1x", "name a file and a function in it"),
    ],
)
def test_a_file_that_has_no_such_function_is_one_line(tmp_path, text, name, said):
    with pytest.raises(UserError, match=r"^reward=.*mine\.py:") as error:
        made(tmp_path, text, name=name)
    assert said in str(error.value) and "\n" not in str(error.value)
    for named in ("mine.py", f"{tmp_path}/none.py:score", f"{tmp_path}:score"):
        with pytest.raises(UserError, match="reward="):
            load(named, 1.0)


# ---- through the command line --------------------------------------------------------------------------------------

COUNTS = "def score(rows, texts):\n    {}\n    return [t.count('s') + len(r['text']) / 100 for r, t in zip(rows, texts)]\n"
BREAKS = "import pathlib; p = pathlib.Path('calls'); n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1)); 1 / (n < 7)"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tiny.save(folder / "tiny")
    tiny.write_rows(folder / "my.jsonl")
    (folder / "mine.py").write_text(COUNTS.format("pass"), encoding="utf-8")
    (folder / "my.yaml").write_text(
        "model: tiny\ntask:\n  name: local\n  train: my.jsonl\n  prompt: 'o {text} y:'\n  label: label\n"
        "  choices: {a: ' no', b: ' yes'}\nsteps: 6\nbatch_size: 2\nmax_length: 48\nmax_new_tokens: 4\nthreads: 1\n"
        "lr: 1.0e-3\neps: 0.03\nobjective: reward\n",
        encoding="utf-8",
    )
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def zoft(*words):
    return CliRunner().invoke(app, list(words))


def refused(*words):
    done = zoft(*words)
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    return line


def test_a_run_whose_reward_broke_goes_on_with_the_mended_one_to_the_same_bits(place):
    done = zoft("train", "--config", "my.yaml", "--reward", "mine.py:score", "output_dir=whole")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((place / "whole/result.json").read_text())
    assert 0 <= result["before"]["reward"] <= 4.5 and result["after"]["reward"] != result["before"]["reward"]
    assert {"accuracy", "loss"} <= set(result["after"])

    (place / "breaks.py").write_text(COUNTS.format(BREAKS), encoding="utf-8")
    said = refused("train", "--config", "my.yaml", "--reward", "breaks.py:score", "output_dir=part")
    assert "error: reward breaks.py:score: ZeroDivisionError: division by zero (line 2), for " in said
    assert "my.jsonl:" in said
    steps = len((place / "part/metrics.jsonl").read_text().splitlines())
    assert 1 < steps < 7

    assert "its reward runs code; name it again, --reward " + str(place / "breaks.py:score") in refused(
        "train", "--resume", "part"
    )
    (place / "breaks.py").write_text(COUNTS.format("pass"), encoding="utf-8")
    done = zoft("train", "--resume", "part", "--reward", "breaks.py:score")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stderr.count("is not what this run began with") == 1
    for verb in (
        ["replay", "part", "--out", "rebuilt"],
        ["ledger", "part", "--verify"],
    ):  # these run no reward
        assert zoft(*verb).exit_code == 0
    weights = [
        (place / f / "model.safetensors").read_bytes() for f in ("whole/model", "part/model", "rebuilt")
    ]
    assert weights[0] == weights[1] == weights[2]


def test_a_saved_run_is_judged_by_what_it_was_trained_for(place):
    """The figures of the training itself, and of each text; numbers of a file that counts letters again."""
    done = zoft("train", "--config", "my.yaml", "--reward", "mine.py:score", "output_dir=judged")
    assert done.exit_code == 0, (done.output, done.exception)
    after = json.loads((place / "judged/result.json").read_text())["after"]
    done = zoft("eval", "judged", "--json", "--examples", "each.jsonl")
    assert done.exit_code == 0 and "reward" not in json.loads(done.stdout), done.output
    assert f"--reward {place / 'mine.py:score'} asks it" in done.stderr and "text" not in first("each.jsonl")
    done = zoft("eval", "judged", "--reward", "mine.py:score", "--json", "--examples", "each.jsonl")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    low, high = found.pop("ci95")["reward"]
    assert found == pytest.approx(after) and low <= found["reward"] <= high
    each = [json.loads(line) for line in (place / "each.jsonl").read_text().splitlines()]
    names: dict = {}
    exec((place / "mine.py").read_text(), names)
    lines = [json.loads(line) for line in (place / "my.jsonl").read_text().splitlines()]
    rows = [lines[int(e["row"].rpartition(":")[2]) - 1] for e in each]
    assert [e["reward"] for e in each] == names["score"](rows, [e["text"] for e in each])
    assert sum(e["reward"] for e in each) / len(each) == pytest.approx(found["reward"])

    # Another objective's texts, of any run or model; no key but those that an evaluation reads.
    done = zoft("eval", "judged", "objective=f1", "--json", "--resamples", "0", "--examples", "each.jsonl")
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["f1"] == 0 and {"text", "exact_match", "f1"} <= first("each.jsonl").keys()
    words = ["eval", "judged/model", "--config", "my.yaml", "--reward", "mine.py:score", "--json"]
    assert json.loads(zoft(*words).stdout)["reward"] == pytest.approx(found["reward"])
    for words, said in [
        (["objective=lm"], "objective=lm: metrics of labels and losses are there anyway"),
        (["lr=5"], "lr: does nothing in an evaluation"),
        (["task.prompt={text}", "seed=3"], "seed: does nothing in an evaluation"),
        (["model=tiny"], "model: judged is a run, whose own model is judged"),
        (["bits=4"], "bits: judged is a run, whose own model is judged"),
        (["--reward", "none.py:score"], "no such .py file"),
        (["--reward", "mine.py:score", "--lm-eval", "boolq"], "cannot be used with --lm-eval"),
    ]:
        assert said in refused("eval", "judged", *words)


@pytest.mark.parametrize("objective", ["f1", "auto"])
def test_text_to_learn_is_judged_the_same_whatever_it_was_trained_by(place, objective):
    text = (place / "my.yaml").read_text().partition("  label:")[0] + "  target: ' {label}'\n"
    text += "steps: 2\nbatch_size: 2\nmax_length: 48\nmax_new_tokens: 4\nthreads: 1\neps: 0.03\n"
    (place / "text.yaml").write_text(f"{text}objective: {objective}\n", encoding="utf-8")
    run = f"text-{objective}"
    assert zoft("train", "--config", "text.yaml", f"output_dir={run}").exit_code == 0
    after = json.loads((place / run / "result.json").read_text())["after"]
    done = zoft("eval", run, "--json", "--resamples", "0", "--examples", "each.jsonl")
    found = json.loads(done.stdout)
    assert found == pytest.approx(after) and {"f1", "exact_match", "loss"} <= found.keys()
    line = first("each.jsonl")
    assert {"answers", "prediction", "right", "f1"} <= line.keys() and "text" not in line


def first(file):
    with open(file, encoding="utf-8") as lines:
        return json.loads(lines.readline())


def test_no_file_names_a_reward(place):
    (place / "evil.yaml").write_text(
        (place / "my.yaml").read_text() + "reward: mine.py:score\n", encoding="utf-8"
    )
    said = refused("train", "--config", "evil.yaml", "output_dir=evil")
    assert "reward: not from a file, for it runs code; put --reward mine.py:score on the command line" in said
    assert "objective=reward: name the function: --reward my_reward.py:score" in refused(
        "train", "--config", "my.yaml", "output_dir=evil"
    )
    assert "no such .py file" in refused(
        "train", "--config", "my.yaml", "--reward", "none.py:score", "output_dir=evil"
    )
    assert not (place / "evil").exists()


def test_keys_that_would_do_nothing_are_refused(place):
    for words, said in [
        (["objective=f1", "--reward", "mine.py:score"], "objective=f1 asks no reward"),
        (["objective=accuracy"], "max_new_tokens=4: no text is written with objective=accuracy"),
        (["objective=f1", "reward_seconds=3"], "reward_seconds=3.0: objective=f1 asks no reward"),
        (["objective=f1", "max_new_tokens=48"], "leaves no room for a prompt in max_length=48"),
        (["objective=f1", "probes_per_forward=2"], "one probe at a time"),
        (["objective=f1", "cache_frozen=true"], "text grows"),
        (["objective=f1", "perturb=inplace", "hold_probe=true"], "moves the weights themselves"),
        (["objective=f2"], "did you mean f1?"),
    ]:
        assert said in refused("train", "--config", "my.yaml", "output_dir=never", *words)
    with contextlib.suppress(FileNotFoundError):
        assert not list((place / "never").iterdir())


# ---- within its time, however it answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body,said",
    [
        ("while True: yield 1", "returned more than 3 numbers"),
        ("import time\n    time.sleep(20)\n    yield 1", "no answer in reward_seconds=0.5"),
        ("return {1: 0.5, 2: 0.5, 3: 0.5}", "returned {.*; a list of 3 numbers is wanted"),
        ("return {1, 2, 3}", "returned {1, 2, 3} for"),
        ("return map(lambda t: 1 / 0, texts)", "ZeroDivisionError: .* for f:1 and the text 'a'"),
        ("return [Bad()] * 3", r"<Bad instance at .*> is no finite number, for f:1 \(KeyError \(line 2\)\)"),
        ("return [Slow()] * 3", "no answer in reward_seconds=0.5"),
        ("raise Worse()", r"Worse \(line \d+\), for f:1"),
        ("import os; os._exit(0)", r"SystemExit: os\._exit\(0\) would end the run \(line \d+\)"),
    ],
)
def test_a_reward_is_taken_within_its_time_however_it_answers(tmp_path, body, said):
    classes = (
        "class Bad:\n    def __float__(self): raise KeyError\n    def __repr__(self): raise KeyError\n"
        "class Slow:\n    def __float__(self):\n        import time; time.sleep(20)\n"
        "class Worse(Exception):\n    def __str__(self): raise KeyError\n"
    )
    reward = made(tmp_path, f"{classes}def score(rows, texts):\n    {body}\n", seconds=0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^reward mine.py:score: {said}"):
        reward(ROWS, TEXTS, WHERE)
    assert time.monotonic() - began < 5 and made(tmp_path, SCORE)(ROWS, TEXTS, WHERE) == [2.0, 4.0, 3.0]


def test_a_file_that_does_not_end_or_leaves_is_one_line(tmp_path):
    for text, said in (
        ("import time; time.sleep(20)\n", "the file itself did not end in reward_seconds=0.5"),
        ("import os; os._exit(0)\n", r"line 1: SystemExit: os\._exit\(0\) would end the run"),
    ):
        with pytest.raises(UserError, match=said):
            made(tmp_path, text + SCORE, seconds=0.5)


def test_a_pattern_that_never_gives_the_process_back_ends_it(tmp_path):
    import subprocess
    import sys

    code = "import re\ndef score(rows, texts):\n    re.match(r'(a+)+$', 'a' * 64 + 'b')\n"
    (tmp_path / "mine.py").write_text(code)
    run = (
        "import sys; from zoft.objectives import reward; reward.GRACE = 0.5\n"
        "reward.load(sys.argv[1], 0.5)([{}], ['a'], ['f:1'])"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", run, f"{tmp_path}/mine.py:score"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "mine.py" in done.stderr and time.monotonic() - began < 20
