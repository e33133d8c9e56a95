"""Objectives without a gradient: against weights perturbed by hand and metrics of slow loops, and a whole run of each kind."""

import copy

import numpy as np
import pytest
import ranks
import tiny
import torch
from test_generate import slow
from test_trainer import same_bits, weights

from zoft.config.schema import Config, Task
from zoft.data.encode import encode, prompts
from zoft.data.tasks import TaskData
from zoft.errors import UserError
from zoft.ledger.log import Ledger, read_ledger
from zoft.method import space
from zoft.noise import noise
from zoft.objectives import losses, metrics, objectives
from zoft.train import axis as setup_axis
from zoft.train import batches
from zoft.train import build as setup_trainer
from zoft.train import parts as setup
from zoft.train.resolve import with_objective

WORDS = (" no", " yes", "ab")
ASKED = ("accuracy", "macro_f1", "exact_match", "f1", "reward")


def rows(n=16, seed=0, words=WORDS):
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdenosty"))
    made = []
    for i in range(n):
        prompt = "".join(rng.choice(letters, 2 + i % 4))
        row = {"prompt": prompt, "candidates": list(words), "gold": int(rng.integers(len(words)))}
        made.append({**row, "where": f"row {i}", "key": i, "columns": {"n": i}})
    return made


VOWELS = """
calls = []


def vowels(rows, texts):
    calls.append(texts)
    return [sum(c in "aeo" for c in text) / 4 + row["n"] / 100 for row, text in zip(rows, texts)]
"""
MINE = {}
exec(VOWELS, MINE)


def data_of(made, objective="choice"):
    return TaskData("local", objective, "{text}", "label", dict(zip("xyz", WORDS)), made, made[:4])


def build(tmp_path, objective, *, name="ledger", model=None, made=None, reward=VOWELS, opened=None, **keys):
    """A trainer as a recipe makes it; its rows' answers are what the untrained model writes, so that some match."""
    model, tokenizer = model or tiny.llama(), tiny.tokenizer()
    made = made or rows()
    if objective in ("exact_match", "f1"):
        for row, context in zip(made, prompts(made, tokenizer, 50)):
            row["answers"] = ["dots", slow(model, tokenizer, context, max_new_tokens=5, stop="t")]
    defaults = {
        "lr": 1e-2,
        "eps": 5e-2,
        "q": 2,
        "batch_size": 3,
        "accumulate": 2,
        "steps": 5,
        "seed": 7,
        "max_length": 32,
        "device": "cpu",
    }
    texts = {"max_new_tokens": 5, "stop": "t"} if objective in objectives.GENERATED else {}
    config = Config(model="tiny", task=Task(name="local"), objective=objective, threads=1,
                    **{**defaults, **texts, **keys})  # fmt: skip
    data = data_of(made)
    config = with_objective(config, data)
    if objective == "reward":
        (tmp_path / "mine.py").write_text(reward, encoding="utf-8")
        config.reward = f"{tmp_path}/mine.py:vowels"
    aim = objectives.make_objective(config, data, tokenizer, objectives.reward_of(config))
    scored = aim.examples(encode(made, tokenizer, data, config.max_length))
    names = space.train_names(model, config.train)
    config = setup.resolve_precision(config, model, names)
    config, _, axis = setup_axis.make_axis(config, model, space.adopt(model, names), scored)
    ledger = opened or Ledger.create(tmp_path / name, {"seed": config.seed})
    trainer = setup_trainer.build_trainer_of(config, model, axis, scored, ledger, aim)
    trainer.made, trainer.config = made, config
    return trainer


@torch.no_grad()
def predicted(model, tokenizer, row):
    """The candidate of highest mean log-probability, one plain forward a candidate."""
    start = [1, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
    found = []
    for word in row["candidates"]:
        ids = [1, *tokenizer(row["prompt"] + word, add_special_tokens=False)["input_ids"]]
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        split = next((i for i, (a, b) in enumerate(zip(start, ids)) if a != b), len(start))
        found.append(float(np.mean([float(logp[i - 1, ids[i]]) for i in range(split, len(ids))])))
    return int(np.argmax(found))


def by_hand(model, objective, chosen):
    """Minus the metric of a model over rows, the slow way."""
    tokenizer = tiny.tokenizer()
    if objective in ("accuracy", "macro_f1"):
        guesses, gold = (
            np.array([predicted(model, tokenizer, r) for r in chosen]),
            np.array([r["gold"] for r in chosen]),
        )
        return (
            -metrics.macro_f1(gold, guesses) if objective == "macro_f1" else -float((gold == guesses).mean())
        )
    contexts = [[1, *tokenizer(r["prompt"], add_special_tokens=False)["input_ids"]] for r in chosen]
    texts = [slow(model, tokenizer, c, max_new_tokens=5, stop="t") for c in contexts]
    if objective == "reward":
        return -float(np.mean(MINE["vowels"]([{"n": r["columns"]["n"]} for r in chosen], texts)))
    score = metrics.exact_match if objective == "exact_match" else metrics.token_f1
    return -float(np.mean([score(t, r["answers"]) for t, r in zip(texts, chosen)]))


@pytest.mark.parametrize("perturb", ["probes", "inplace"])
@pytest.mark.parametrize("objective", ASKED)
def test_a_step_minimises_minus_the_metric_of_weights_perturbed_by_hand(tmp_path, objective, perturb):
    trainer = build(tmp_path, objective, perturb=perturb, lr=1e-3, eps=1e-2)
    c, seen = trainer.config, set()
    for step in range(3):
        trainer.axis.flush()
        start = copy.deepcopy(trainer.model)
        chosen = [trainer.made[i] for picks in batches.picked(c, len(trainer.made), step) for i in picks]
        assert len(chosen) == 6
        trainer.step()
        wanted = []
        for direction in range(c.q):
            for sign in (1, -1):
                model = copy.deepcopy(start)
                for t in trainer.axis.trained:
                    p = model.get_parameter(t.name)
                    z = noise.direction(
                        p.shape, t.id, seed=c.seed, step=step, direction=direction, noise=c.noise
                    )
                    p.data = p.data + sign * c.eps * z
                wanted.append(by_hand(model, objective, chosen))
        assert trainer.ledger.records[step].losses == pytest.approx(wanted, abs=1e-6)
        seen |= set(wanted)
    assert len(seen) > 2  # there was something to tell apart


@pytest.mark.parametrize("objective", ["macro_f1", "f1"])
def test_lr_zero_leaves_every_bit_and_holding_a_probe_changes_none(tmp_path, objective):
    ledgers = []
    for hold in ("auto",) if objective == "macro_f1" else (True, False):
        trainer = build(
            tmp_path, objective, lr=0.0, storage="fp16", compute="bf16", name=f"{hold}", hold_probe=hold
        )
        before = weights(trainer.model)
        trainer.run()
        assert same_bits(before, weights(trainer.model))
        ledgers.append((tmp_path / f"{hold}").read_bytes())
    assert len(set(ledgers)) == 1
    assert len({r.losses for r in read_ledger(tmp_path / f"{hold}")[1]}) > 1


def test_holding_a_probe_gives_the_run_of_one_that_makes_it_for_each_token(tmp_path):
    ends = []
    for hold in (True, False):
        trainer = build(tmp_path, "f1", storage="bf16", compute="bf16", name=f"{hold}", hold_probe=hold)
        assert trainer.axis.hold is hold
        start = weights(trainer.model)
        trainer.run()
        ends.append(weights(trainer.model))
    assert same_bits(*ends) and not same_bits(start, ends[0])
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


def test_a_held_probe_of_rank_1_is_the_one_that_is_made_for_each_token(tmp_path):
    found = []
    for hold in (True, False):
        trainer = build(tmp_path, "reward", noise="rank1", lr=0.0, name=f"{hold}", hold_probe=hold)
        trainer.run()
        found.append([r.losses for r in read_ledger(tmp_path / f"{hold}")[1]])
    assert np.allclose(*found, atol=1e-7) and len({x for losses in found[0] for x in losses}) > 3


def test_a_reward_that_breaks_leaves_every_bit(tmp_path):
    breaks = VOWELS.replace("append(texts)", "append(1 / (len(calls) < 3))")
    trainer = build(tmp_path, "reward", reward=breaks)
    before = weights(trainer.model)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        trainer.run()
    assert same_bits(before, weights(trainer.model)) and not trainer.ledger.records


@pytest.mark.parametrize("perturb", ["probes", "inplace"])
@pytest.mark.parametrize("objective", ["accuracy", "reward"])
def test_interrupted_resumed_and_replayed_runs_end_with_the_same_bits(tmp_path, objective, perturb):
    whole = build(tmp_path, objective, name="whole", perturb=perturb)
    start = weights(whole.model)
    whole.run()
    end = weights(whole.model)
    assert not same_bits(start, end)
    first = build(tmp_path, objective, name="part", perturb=perturb)
    first.run(until=2)
    first.ledger.close()
    again = Ledger.open(tmp_path / "part")
    second = build(tmp_path, objective, opened=again, perturb=perturb)
    second.replay(list(again.records))
    second.run()
    again.close()
    assert same_bits(end, weights(second.model))
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    replayed = build(tmp_path, objective, name="replayed", perturb=perturb)
    replayed.replay(read_ledger(tmp_path / "whole")[1])
    assert same_bits(end, weights(replayed.model))


@pytest.mark.parametrize("objective", ASKED)
def test_microbatches_are_one_batch(tmp_path, objective):
    """The metric of two batches of 3 is that of 6, though no mean of the two for macro-F1."""
    two = build(tmp_path, objective, name="two", batch_size=3, accumulate=2)
    one = build(tmp_path, objective, name="one", batch_size=6, accumulate=1)
    one.batches = lambda step: join(two.batches(step))  # the same rows

    def join(parts):
        if objective in objectives.GENERATED:
            return [objectives.Prompts(sum((p.picks for p in parts), ()))]
        picks = [i for p in batches.picked(two.config, len(two.made), two.next) for i in p]
        data = data_of(two.made)
        return [losses.collate([encode(two.made, tiny.tokenizer(), data, 32)[i] for i in picks])]

    for trainer in (one, two):
        trainer.step()
    assert one.ledger.records[0].losses == pytest.approx(two.ledger.records[0].losses, abs=1e-7)


@pytest.mark.parametrize("objective", ASKED)
def test_a_nan_in_the_logits_skips_the_step(tmp_path, objective):
    trainer = build(tmp_path, objective, train="norms")
    trainer.model.lm_head.weight.data[5, 3] = float("nan")
    before = weights(trainer.model)
    assert trainer.step()["skipped"]
    trainer.axis.flush()
    assert same_bits(before, weights(trainer.model))


def test_lm_on_a_task_of_candidates_trains_the_gold_ones_tokens(tmp_path):
    trainer = build(tmp_path, "lm")
    (batch, _) = trainer.batches(0)
    assert batch.objective == "lm" and batch.slots.shape[:2] == (3, 1)


def test_objectives_that_a_task_cannot_have_are_refused():
    def resolve(objective, data):
        return with_objective(Config(model="m", task=Task(name="local"), objective=objective), data)

    text = data_of([{**r, "candidates": [" no"], "gold": 0} for r in rows()], "lm")
    for objective in ("choice", "accuracy", "macro_f1"):
        with pytest.raises(UserError, match=f"objective={objective}: .* use lm, f1 or exact_match"):
            resolve(objective, text)
    assert resolve("auto", text).objective == "lm" and resolve("auto", data_of(rows())).objective == "choice"
    with pytest.raises(UserError, match="differ in their number of candidates"):
        resolve("macro_f1", data_of(rows() + rows(words=WORDS[:2])))


def test_prompts_are_cut_on_the_left_to_leave_room():
    tokenizer = tiny.tokenizer()
    made = [{"prompt": "abcdenost", "where": "r"}]
    whole = prompts(made, tokenizer, 50)[0]
    assert whole[0] == 1 and prompts(made, tokenizer, 4)[0] == (1, *whole[-3:])
    with pytest.raises(UserError, match="r: there is nothing to write after"):
        prompts([{"prompt": "", "where": "r"}], tiny.tokenizer(bos=False), 4)


@pytest.mark.slow
def test_processes_share_the_rows_and_probes_of_a_metric(tmp_path):
    """lr=0: each step's losses are those of the same weights."""
    place = ranks.make_place(tmp_path, storage="fp32", momentum=0, eps=0.05, lr=0, steps=4, accumulate=2)
    for name, how, size in (("one", "auto", 1), ("rows", "data", 2), ("probes", "probes", 2)):
        keys = ["objective=macro_f1", "save_model=false", f"output_dir={name}", f"parallel={how}"]
        assert ranks.zoft(place, *keys, size=size) == [0] * size
    one, shared, probes = (
        [r.losses for r in read_ledger(place / d / "ledger")[1]] for d in ("one", "rows", "probes")
    )
    assert len({x for losses in one for x in losses}) > 2
    assert np.allclose(one, shared, atol=1e-6) and np.allclose(one, probes, atol=1e-6)
