"""Pairs of answers: the loss against a plain computation with transformers, runs that learn, resume and replay, refusals."""

import copy
import json
import os
from types import SimpleNamespace

import chatty
import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.schema import Limits, Task
from zoft.data.encode import encode
from zoft.data.tasks import load_task
from zoft.errors import UserError
from zoft.ledger.log import read_ledger
from zoft.objectives.losses import collate
from zoft.objectives.preference import Pairs, preference_losses

ROWS = [
    {"prompt": f"{'bad no ' * (i % 3)}{i} ", "chosen": "yes" + "s" * (i % 2), "rejected": "no to" + "e" * (i % 3)} for i in range(60)
]  # fmt: skip
BETA = 0.3


def data_of(folder, rows=ROWS, **keys):
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_task(
        Task(name="local", train=str(folder / "pairs.jsonl"), format="preference", **keys), Limits()
    )


def summed(model, prompt, answer):
    """Σ log p of an answer's tokens and the end token, one plain forward."""
    tokenizer = tiny.tokenizer()
    start = [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    ids = [1, *tokenizer(prompt + answer, add_special_tokens=False)["input_ids"], 2]
    split = next((i for i, (a, b) in enumerate(zip(start, ids)) if a != b), len(start))
    logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp[i - 1, ids[i]]) for i in range(split, len(ids)))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_the_loss_is_a_plain_computation(tmp_path, name):
    base = tiny.MODELS[name]()
    policy = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    for p in policy.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    data = data_of(tmp_path)
    examples = encode(data.train[:9], tiny.tokenizer(), data, 64)
    pairs = Pairs(BETA, data, tiny.tokenizer(), 64, "cpu")
    assert pairs.meet(base, examples, lambda rows: torch.no_grad()) == 9
    batch = collate(pairs.with_reference(examples))
    found, ones = preference_losses(policy, batch, BETA)
    want = []
    for row in data.train[:9]:
        prompt, (chosen, rejected) = row["prompt"], row["candidates"]
        gain = [summed(policy, prompt, x) - summed(base, prompt, x) for x in (chosen, rejected)]
        want.append(float(np.logaddexp(0, -BETA * (gain[0] - gain[1]))))
    assert np.allclose(found.numpy(), want, atol=2e-6) and float(ones.sum()) == 9
    assert np.ptp(want) > 1e-3
    at_base, _ = preference_losses(base, batch, BETA)
    assert np.allclose(at_base.numpy(), np.log(2), atol=1e-6)
    twice, _ = preference_losses(policy, batch.repeat(2), BETA)
    assert torch.allclose(twice, found.repeat(2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny.save(folder / "tiny")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "my.yaml").write_text(
        "model: tiny\ntask: {name: local, train: pairs.jsonl}\nobjective: preference\nsteps: 60\nbatch_size: 8\nthreads: 1\n"
        "lr: 3.0e-4\neps: 1.0e-3\nq: 4\nmax_length: 64\npreference_beta: 0.5\n",
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


def test_a_run_learns_to_prefer(place):
    done = zoft("train", "--config", "my.yaml", "output_dir=learned")
    assert "pairs scored by the base, once" in done.stderr
    result = json.loads((place / "learned/result.json").read_text())
    before, after = result["before"], result["after"]
    assert before["preference_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert before["preference_margin"] == pytest.approx(0, abs=1e-6)
    assert (
        after["preference_accuracy"] > 0.9
        and after["preference_loss"] < 0.6
        and after["preference_margin"] > 0.2
    )
    assert result["forwards"] == 60 * 8 * 8 + int(done.stderr.partition(" pairs scored")[0].split()[-1])


@pytest.mark.parametrize("train", ["all", "lora"])
def test_runs_resume_and_replay_to_the_same_bits(place, train):
    keys = ["--config", "my.yaml", f"train={train}", "steps=6", "weight_decay=0.01"]
    zoft("train", *keys, f"output_dir={train}-whole")
    zoft("train", *keys, f"output_dir={train}-part")
    ledger = place / f"{train}-part/ledger"
    records = read_ledger(ledger)[1]
    size = ledger.stat().st_size
    for name in ("result.json", "model", "adapter"):
        path = place / f"{train}-part" / name
        if path.exists():
            path.rename(place / f"{train}-old-{name}")
    with ledger.open("r+b") as file:  # as a kill leaves it: the last records are gone
        file.truncate(size - 40)
    assert len(read_ledger(ledger)[1]) < len(records)
    zoft("train", "--resume", f"{train}-part")
    zoft("replay", f"{train}-part", "--out", f"{train}-rebuilt")
    name = "adapter/adapter_model.safetensors" if train == "lora" else "model/model.safetensors"
    whole, part = [(place / f"{train}-{run}" / name).read_bytes() for run in ("whole", "part")]
    assert whole == part == (place / f"{train}-rebuilt" / name.partition("/")[2]).read_bytes()


def test_turns_and_text_are_both_pairs(tmp_path):
    ask, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "dot"), ("assistant", "sos"), ("assistant", "not"))
    )
    whole = data_of(tmp_path, [{"chosen": [ask, good], "rejected": [ask, bad]}] * 30 + [{"chosen": [ask, bad, ask, good], "rejected": [ask, bad, ask, bad]}] * 30)  # fmt: skip
    apart = data_of(tmp_path, [{"prompt": [ask], "chosen": [good], "rejected": [bad]}] * 30 + [{"prompt": [{**ask, "content": "ten"}], "chosen": [good], "rejected": [bad]}] * 30)  # fmt: skip
    tokenizer = chatty.tokenizer()
    rows = [*whole.train, *whole.eval]
    found = encode(rows, tokenizer, whole, 300)
    first = next(e for e, r in zip(found, rows) if len(r["columns"]["chosen"]) == 2)
    other = [*apart.train, *apart.eval]
    again = next(
        e
        for e, r in zip(encode(other, tokenizer, apart, 300), other)
        if r["columns"]["prompt"][0]["content"] == "dot"
    )
    assert (first.contexts, first.completions) == (again.contexts, again.completions)
    assert "to prefer {chosen} over {rejected}" in whole.reading
    long = next(e for e, r in zip(found, rows) if len(r["columns"]["chosen"]) == 4)
    assert len(long.contexts[0]) > len(first.contexts[0]) and long.completions == first.completions


def test_what_cannot_be_is_refused(place, tmp_path):
    for words, said in [
        (
            ["objective=lm", "task.format=preference", "preference_beta=0.1"],
            "objective=lm: rows are pairs; use preference",
        ),
        (["objective=lm", "preference_beta=0.2"], "preference_beta=0.2: is for objective=preference"),
        (
            ["task.columns={prompt: prompt, completion: chosen}", "task.format=completion"],
            "task=local has no pairs of answers",
        ),
        (["task=arithmetic"], "task=arithmetic has no pairs of answers"),
        (["preference_beta=0"], "preference_beta=0: must be > 0"),
        (["perturb=nodes"], "recipe=node has losses of tokens alone"),
    ]:
        done = zoft("train", "--config", "my.yaml", "output_dir=never", *words, code=2)
        assert said in done.stderr, (words, done.stderr)
    same = SimpleNamespace(rows=[{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2)
    data = load_task(Task(name="local", train=str(place / "pairs.jsonl"), format="preference"), Limits())
    (place / "same.jsonl").write_text("\n".join(map(json.dumps, same.rows)))
    pair = load_task(
        Task(
            name="local", train=str(place / "same.jsonl"), eval=str(place / "same.jsonl"), format="preference"
        ),
        Limits(),
    )
    with pytest.raises(UserError, match="same.jsonl:1: both answers are the same"):
        encode(pair.train, tiny.tokenizer(), data, 64)
    (place / "empty.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "", "rejected": "b"}))
    with pytest.raises(UserError, match="empty.jsonl:1: column chosen is empty"):
        load_task(
            Task(
                name="local",
                train=str(place / "empty.jsonl"),
                eval=str(place / "empty.jsonl"),
                format="preference",
            ),
            Limits(),
        )
