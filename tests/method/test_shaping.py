"""Shaping of rewards: against sums by hand, scipy's ranks, and what must not change it."""

import numpy as np
import pytest
import torch

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.method.shaping import centred_ranks, check_shaping, shape_rewards, zscores


def drawn(members=6, prompts=4, values=3):
    return torch.tensor(np.random.default_rng(0).integers(0, values, (members, prompts)).astype(float))


def test_zscores_are_numpys():
    x = drawn(values=50)
    want = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    assert np.allclose(zscores(x).numpy(), want, atol=1e-12)


def test_ranks_are_mid_ranks_by_hand():
    x = drawn()
    for column, got in zip(x.T.tolist(), centred_ranks(x).T.tolist()):
        for value, rank in zip(column, got):
            places = [i for i, v in enumerate(sorted(column)) if v == value]
            assert rank == pytest.approx(sum(places) / len(places) / (len(column) - 1) - 0.5, abs=1e-12)


@pytest.mark.parametrize("group", ["all", "prompt"])
def test_ranks_are_blind_to_monotone_changes(group):
    x = drawn(values=50)
    x = x[:, :1] if group == "all" else x
    got = shape_rewards(x, "ranks", group)
    for change in (torch.exp, lambda v: v**3, lambda v: 5 * v - 2):
        assert torch.equal(got, shape_rewards(change(x), "ranks", group))


@pytest.mark.parametrize("shaping", ["zscore", "ranks"])
def test_a_prompts_difficulty_drops_out_of_its_group(shaping):
    x = drawn(values=9)
    shift = torch.tensor([0.0, 100.0, -7.0, 3.0], dtype=torch.float64)
    assert torch.allclose(shape_rewards(x, shaping, "prompt"), shape_rewards(x + shift, shaping, "prompt"))
    assert shape_rewards(x, shaping, "prompt").mean().abs() < 1e-12


def test_prompts_of_one_reward_say_nothing_and_all_of_them_skip_the_step():
    x = drawn(values=9)
    flat = torch.cat([x, torch.full((6, 4), 0.1, dtype=torch.float64)], 1)
    assert torch.allclose(shape_rewards(flat, "zscore", "prompt"), shape_rewards(x, "zscore", "prompt") / 2)
    for group in ("all", "prompt"):
        assert shape_rewards(torch.full((6, 3), 0.1, dtype=torch.float64), "zscore", group) is None


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"shaping_group": "prompt"}, "shaping_group=prompt: does nothing with shaping=none"),
        ({"shaping": "ranks", "elastic": True}, "elastic=true: does not go with shaping=ranks"),
        ({"shaping": "ranks", "meazo": 0.9}, "meazo=0.9: does not go with shaping=ranks"),
        ({"shaping": "zscore", "estimator": "normalised"}, "estimator=normalised: divides by the spread"),
        ({"shaping": "zscore", "update": "conservative"}, "update=conservative: compares losses"),
    ],
)
def test_what_shaping_does_not_go_with(keys, said):
    with pytest.raises(UserError, match=said):
        check_shaping(Config(**keys))
