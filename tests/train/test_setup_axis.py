"""Setting a run up: what calibration looks at."""

import pytest
import tiny
import torch
from test_estimate import allocated

from zoft.config.schema import Config, Task
from zoft.data.example import Example
from zoft.method import space
from zoft.objectives.losses import collate, losses
from zoft.train import axis as setup_axis


def example(*lengths, single=True):
    ends = ((5,), (9,)) if single else ((5, 7), (9,))
    return [Example((tuple(range(4, 4 + n)),) * 2, ends, 0, "choice", single) for n in lengths]


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 6, 4, 8), (5,), (5, 9)])
def test_calibration_sees_padding_and_two_lengths_where_there_are_any(lengths, single):
    examples = example(*lengths, single=single)
    small, double = setup_axis.calibration(examples)
    mask, n = small.inputs["attention_mask"], small.rows
    assert n == (2 if single else 4)
    assert bool((mask == 0).any())
    if len(set(lengths)) > 1:
        assert len(mask.sum(1).unique()) > 1
    assert torch.equal(double.inputs["attention_mask"], mask.repeat(2, 1)) and double.rows == 2 * n
    assert torch.equal(double.inputs["input_ids"][:n], small.inputs["input_ids"])
    model = tiny.llama()
    want = torch.cat([losses(model, collate([e]))[0] for e in (examples[0], examples[-1])])
    if len(set(lengths)) == 1:  # a column more changes no loss
        torch.testing.assert_close(losses(model, small)[0], want)


def test_probes_a_forward_go_by_the_memory_there_is():
    """At the limits that the allocator's own record of a forward gives."""
    train = example(6, 9, 4, 8)
    config = Config(
        model="tiny", task=Task(name="local"), q=6, batch_size=4, device="cpu", storage="fp32", compute="fp32"
    )
    model = tiny.opt()
    config, _, axis = setup_axis.make_axis(
        config, model, space.adopt(model, space.train_names(model, "all")), train
    )
    assert config.probes_per_forward == 12  # a tiny model's activations fit anywhere
    batch = collate(sorted(train, key=lambda e: -e.length))
    with axis.clean(batch.rows):
        each = allocated(lambda: losses(model, batch))
    for room, want in ((0.5, 1), (3, 2), (5, 4), (7.5, 6), (11, 6), (13, 12)):
        assert setup_axis.grouped(config, model, axis, train, int(room * each)) == want, room
