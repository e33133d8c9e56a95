"""Runs whose losses are rewards of text, through the command line: members together, shaped, resumed, replayed."""

import contextlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import ranks
import tiny
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.ledger.log import read_ledger

SCORE = "def score(rows, texts):\n    return [t.count('s') + t.count('y') + len(set(t)) / 9 + len(r['text']) / 100 for r, t in zip(rows, texts)]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    tiny.save(folder / "tiny")
    tiny.write_rows(folder / "my.jsonl")
    (folder / "mine.py").write_text(SCORE, encoding="utf-8")
    (folder / "flat.py").write_text(
        "def score(rows, texts):\n    return [0.1] * len(rows)\n", encoding="utf-8"
    )
    (folder / "my.yaml").write_text(
        "model: tiny\ntask:\n  name: local\n  train: my.jsonl\n  prompt: 'o {text} y:'\n  label: label\n"
        "  choices: {a: ' no', b: ' yes'}\nsteps: 6\nbatch_size: 3\nq: 3\nmax_length: 48\nmax_new_tokens: 8\nthreads: 1\n"
        "lr: 1.0e-3\neps: 0.03\nnoise: rank1\nobjective: reward\neval_limit: 4\n",
        encoding="utf-8",
    )
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def zoft(*words, reward="mine.py:score", code=0):
    more = ["--reward", reward] if words[0] == "train" else []
    done = CliRunner().invoke(app, [*words, *more])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def losses(run):
    return np.array([r.losses for r in read_ledger(run / "ledger")[1]])


def steps(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval" not in row]


@pytest.mark.parametrize("train", ["all", "lora", "prefix", "prompt"])
def test_rewards_are_those_of_one_member_after_another(place, train):
    keys = ["--config", "my.yaml", "lr=0", f"train={train}"]
    keys += ["eps=0.5"] if train != "all" else []
    keys += ["noise=gaussian"] if train == "lora" else []
    for n in ("auto", "1", "4"):
        zoft("train", *keys, f"members_per_batch={n}", f"output_dir={train}-{n}", "save_model=false")
    assert "members_per_batch: 6" in (place / f"{train}-auto/config.yaml").read_text()
    one = losses(place / f"{train}-1")
    assert np.allclose(one, losses(place / f"{train}-auto"), atol=1e-6, rtol=0)
    assert np.allclose(one, losses(place / f"{train}-4"), atol=1e-6, rtol=0)
    assert len({float(x) for x in one.flatten()}) > 3
    for a, b in zip(steps(place / f"{train}-auto"), steps(place / f"{train}-1")):
        told = ("reward", "reward_spread", "length", "differ")
        assert [a[k] for k in told] == pytest.approx([b[k] for k in told])
    assert any(row["differ"] > 0 for row in steps(place / f"{train}-auto"))


@pytest.mark.parametrize(
    "keys", [["shaping=zscore"], ["shaping=ranks", "shaping_group=prompt", "temperature=1"]]
)
def test_shaped_runs_resume_and_replay_to_the_same_bits(place, keys):
    name = keys[0].partition("=")[2]
    common = ["--config", "my.yaml", *keys]
    zoft("train", *common, f"output_dir={name}")
    records = read_ledger(place / name / "ledger")[1]
    assert any(any(r.multipliers) for r in records)
    part = ["eval_every=3", f"output_dir={name}-part"]
    (place / "breaks.py").write_text(
        "import pathlib\nn = [0]\n"
        + SCORE.replace(":\n    return", ":\n    n[0] += 1\n    1 / (n[0] < 5)\n    return"),
        encoding="utf-8",
    )
    zoft("train", *common, *part, reward="breaks.py:score", code=2)
    (place / "breaks.py").write_text(SCORE, encoding="utf-8")
    zoft("train", "--resume", f"{name}-part", reward="breaks.py:score")
    zoft("replay", f"{name}-part", "--out", f"{name}-rebuilt")
    folders = (f"{name}/model", f"{name}-part/model", f"{name}-rebuilt")
    whole, resumed, rebuilt = [(place / f / "model.safetensors").read_bytes() for f in folders]
    assert whole == resumed == rebuilt


def test_a_shaped_step_is_the_mean_difference_of_its_pairs(place):
    """c_k = -(F₊ - F₋)/(2q), F the z-scores of the members' mean rewards, from the losses that the ledger has."""
    zoft(
        "train", "--config", "my.yaml", "shaping=zscore", "output_dir=formula", "steps=3", "save_model=false"
    )
    for record in read_ledger(place / "formula/ledger")[1]:
        rewards = -np.array(record.losses)
        shaped = (rewards - rewards.mean()) / rewards.std()
        want = 1e-3 * (shaped[0::2] - shaped[1::2]) / 6
        assert np.allclose(record.multipliers, want, rtol=1e-4)


def test_members_of_one_reward_skip_the_step(place):
    done = zoft("train", "--config", "my.yaml", "shaping=zscore", "output_dir=flat", "steps=25", "eval_limit=1",
                "max_new_tokens=1", "batch_size=1", "weight_decay=0.1", "task.train_limit=8", reward="flat.py:score")  # fmt: skip
    records = read_ledger(place / "flat/ledger")[1]
    assert len(records) == 25 and all(r.skipped and not any(r.multipliers) for r in records)
    assert json.loads((place / "flat/result.json").read_text())["skipped"] == 25
    assert done.stderr.count("20 steps in a row were skipped") == 1


def test_dense_noise_says_what_rank1_would_gain(place):
    done = zoft(
        "train", "--config", "my.yaml", "noise=gaussian", "output_dir=dense", "steps=1", "save_model=false"
    )
    assert "noise=gaussian makes whole weights for each member; with noise=rank1" in done.stderr
    assert "the 6 members of a step write in one batch" in done.stderr
    done = zoft(
        "train", "--config", "my.yaml", "noise=gaussian", "members_per_batch=2", "output_dir=never", code=2
    )
    assert "members_per_batch=2: noise=gaussian makes whole weights for each member; use 1" in done.stderr


def test_keys_of_rollouts_are_refused_elsewhere(place):
    for words, said in [
        (["objective=accuracy", "max_new_tokens=50", "temperature=1"], "temperature=1.0: no text is written"),
        (["objective=choice", "max_new_tokens=50", "shaping=ranks"], "shaping='ranks': no text is written"),
        (["objective=f1", "members_per_batch=0"], "members_per_batch=0: must be ≥ 1"),
        (
            ["objective=f1", "noise=gaussian", "perturb=inplace", "members_per_batch=2"],
            "perturb=inplace has one probe",
        ),
        (["objective=f1", "shaping_group=prompt"], "does nothing with shaping=none"),
    ]:
        done = CliRunner().invoke(app, ["train", "--config", "my.yaml", *words, "output_dir=never"])
        assert done.exit_code == 2 and said in done.output, (done.output, said)
    with contextlib.suppress(FileNotFoundError):
        assert not list((place / "never").iterdir())


@pytest.mark.slow
def test_two_processes_have_the_ledger_of_one(tmp_path):
    folder = ranks.make_place(tmp_path, storage="fp32", momentum=0, eps=0.05, lr=1e-3, steps=4, batch_size=4)
    (folder / "mine.py").write_text(SCORE, encoding="utf-8")
    for name, how, size in (("one", "auto", 1), ("rows", "data", 2), ("probes", "probes", 2)):
        keys = ["--reward", str(folder / "mine.py:score"), "noise=rank1", "shaping=zscore", "q=2", "max_new_tokens=6", "save_model=false",
                f"output_dir={name}", f"parallel={how}"]  # fmt: skip
        assert ranks.zoft(folder, *keys, size=size) == [0] * size
    one, rows, probes = (losses(folder / d) for d in ("one", "rows", "probes"))
    assert len({float(x) for x in one.flatten()}) > 2
    assert np.array_equal(one, rows) and np.array_equal(one, probes)


def test_a_verifiable_task_is_data_and_reward_in_one_name(place):
    keys = ["task=arithmetic", "task.level=1", "model=tiny", "steps=2", "batch_size=2", "q=2", "noise=rank1", "max_length=128",
            "max_new_tokens=4", "threads=1", "eval_limit=3", "shaping=zscore", "output_dir=sums"]  # fmt: skip
    done = CliRunner().invoke(app, ["train", *keys])
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((place / "sums/result.json").read_text())
    assert 0 <= result["after"]["reward"] <= 1
    assert "objective: reward" in (place / "sums/config.yaml").read_text()
    done = CliRunner().invoke(app, ["eval", "sums", "--json", "--examples", "each.jsonl"])
    assert done.exit_code == 0 and json.loads(done.stdout)["reward"] == pytest.approx(
        result["after"]["reward"]
    ), done.output
    learned = [k for k in keys if not k.startswith(("shaping", "output"))]
    done = CliRunner().invoke(app, ["train", *learned, "objective=lm", "output_dir=learned"])
    assert done.exit_code == 0, (done.output, done.exception)


def test_a_served_reward_is_the_files(place):
    """The same numbers from a server give the same ledger."""
    names: dict = {}
    exec(SCORE, names)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = json.dumps({"rewards": names["score"](body["rows"], body["texts"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    keys = ["--config", "my.yaml", "steps=3", "save_model=false"]
    zoft("train", *keys, "output_dir=served", reward=url)
    zoft("train", *keys, "output_dir=filed")
    server.shutdown()
    server.server_close()
    assert np.array_equal(losses(place / "served"), losses(place / "filed"))
