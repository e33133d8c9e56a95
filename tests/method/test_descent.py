"""Every method of ZO-Bench's set goes down to a fixed loss at a fixed seed, on a quadratic and on a tiny language model."""

import numpy as np
import pytest
import tiny
import torch
from test_methods import SEED, TID, tensor
from test_trainer import build

from zoft.method import blocks, masks, rules
from zoft.method.anchor import anchored, plain
from zoft.method.blocks import Turn, give_turns
from zoft.method.estimators.estimator import Probe
from zoft.method.estimators.named import estimator_of
from zoft.method.momentum import Window
from zoft.method.rules import RULES, Rule
from zoft.method.updates import advance_trained, make_update
from zoft.noise import noise
from zoft.noise.spec import Mask, Update
from zoft.train.trainer import Settings

METHODS = {
    "sgd": {"lr": 2e-2},
    "sign": {"lr": 4e-3, "update": "sign", "q": 4},
    "adam": {"lr": 1e-2, "update": "adam", "q": 4},
    "momentum": {"lr": 2e-3, "update": "momentum", "momentum": 0.9},
    "conservative": {"lr": 5e-2, "update": "conservative"},
    "one_sided": {"lr": 2e-2, "estimator": "one_sided", "eps": 1e-4},
    "q4": {"lr": 4e-2, "q": 4},
    "random blocks": {"lr": 8e-2, "blocks": "random"},
    "cyclic blocks": {"lr": 8e-2, "blocks": "cyclic"},
    "sparse": {"lr": 4e-2, "mask": Mask(seed=SEED, share=2**15, every=1)},
    "anchored": {"lr": 2e-2, "anchor": 1e-3},
}


class Quadratic:
    """½ Σ a_i θ_i² of d = 50 numbers in two tensors, asked at a method's probes."""

    def __init__(
        self,
        lr,
        update="sgd",
        momentum=0.0,
        estimator="two_sided",
        q=1,
        eps=1e-3,
        blocks="all",
        mask=None,
        anchor=0.0,
    ):
        self.lr, self.q, self.eps, self.window = lr, q, eps, Window(momentum if update == "momentum" else 0.0)
        s = Settings(seed=SEED, steps=1, lr=lr, eps=eps, q=q, estimator=estimator, update=update)
        self.estimator = estimator_of(s)
        start = torch.linspace(-1, 1, 50).double()
        self.parts = [start[:25].clone(), start[25:].clone()]
        self.curvature = torch.logspace(-1, 0, 50).double()[
            torch.randperm(50, generator=torch.Generator().manual_seed(1))
        ]
        rule = RULES.get(update)
        if anchor:
            rule = Rule("sgd", anchored(plain, anchor), anchor=anchor)
        self.trained = [tensor(p, mask=mask) for p in self.parts]
        for i, t in enumerate(self.trained):
            t.id, t.turn = TID + i, None if blocks == "all" else Turn(blocks, 2, i)
        rules.attach_rule(self.trained, rule)
        self.rule = rule

    def losses(self, step, probes):
        found = []
        for p in probes:
            made = []
            for t in self.trained:
                out = torch.empty(1, 25, dtype=torch.float64)
                (seen,) = blocks.seen_by(t, [p], SEED, step)
                noise.perturb(
                    t.stored, t.id, out, [seen], seed=SEED, step=step, noise="rademacher", mask=t.mask
                )
                made.append(out[0])
            found.append(float((self.curvature * torch.cat(made) ** 2).sum() / 2))
        return found

    def step(self, step):
        e, eps = self.estimator, torch.tensor(self.eps, dtype=torch.float64)
        found = torch.tensor(self.losses(step, e.probes(self.q, self.eps)), dtype=torch.float64)
        c, _ = e.run(found, self.q, eps, torch.zeros(0))
        u = make_update(step, SEED, c.tolist(), lr=self.lr, ruled=self.rule is not None)
        if e.second:
            chosen = e.second.choose(self.losses(step, e.second.probes(u.multipliers)), u.multipliers)
            u = Update(step, SEED, tuple(chosen))
        u = self.window.take(u)
        for t in self.trained:
            advance_trained(t, [u], "rademacher")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_descends_a_quadratic(name):
    problem = Quadratic(**METHODS[name])
    begun = problem.losses(0, [Probe(0, 0.0)])[0]
    for step in range(900):
        problem.step(step)
    assert problem.losses(0, [Probe(0, 0.0)])[0] < 0.1 * begun


@pytest.mark.parametrize("name", METHODS)
def test_every_method_teaches_a_tiny_model(tmp_path, name):
    keys = {k: v for k, v in METHODS[name].items() if k not in ("blocks", "mask", "anchor", "lr")}
    lr = {"momentum": 3e-4, "random blocks": 2e-3, "cyclic blocks": 2e-3}.get(name, 1e-3)
    trainer = build(tmp_path, tiny.llama(tie=True), lr=lr, steps=200, kind="rademacher", **keys)
    trained = trainer.axis.trained
    give_turns(trainer.model, trained, METHODS[name].get("blocks", "all"))
    rule = RULES.get(keys.get("update", ""))
    if name == "anchored":
        rule = Rule("sgd", anchored(plain, 1e-3), anchor=1e-3)
    if rule:
        rules.attach_rule(trained, rule)
    if name == "sparse":
        masks.mask_tensors(trained, "random", 0.5, SEED, 1)
    seen = []
    trainer.run(lambda metrics: seen.append(metrics["loss"]))
    assert np.mean(seen[-50:]) < 0.65 * np.mean(seen[:20]), (np.mean(seen[:20]), np.mean(seen[-50:]))
