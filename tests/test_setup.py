"""Setting a run up: what calibration looks at."""

import pytest
import tiny
import torch

from zoft import setup
from zoft.objective import Example, losses


def example(*lengths, single=True):
    ends = ((5,), (9,)) if single else ((5, 7), (9,))
    return [Example((tuple(range(4, 4 + n)),) * 2, ends, 0, "choice", single) for n in lengths]


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 6, 4, 8), (5,), (5, 9)])
def test_calibration_sees_padding_and_two_lengths_where_there_are_any(lengths, single):
    examples = example(*lengths, single=single)
    small, double = setup.calibration(examples)
    mask, n = small.inputs["attention_mask"], small.rows
    assert n == (2 if single else 4)
    assert bool((mask == 0).any())
    if len(set(lengths)) > 1:
        assert len(mask.sum(1).unique()) > 1
    assert torch.equal(double.inputs["attention_mask"], mask.repeat(2, 1)) and double.rows == 2 * n
    assert torch.equal(double.inputs["input_ids"][:n], small.inputs["input_ids"])
    model = tiny.llama()
    want = torch.cat([losses(model, setup.collate([e]))[0] for e in (examples[0], examples[-1])])
    if len(set(lengths)) == 1:  # a column more changes no loss
        torch.testing.assert_close(losses(model, small)[0], want)
