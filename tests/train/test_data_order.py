from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from zoft.train import batches
from zoft.train.batches import batch_indices


def stream(steps: int, **sizes) -> list[int]:
    return [i for step in range(steps) for batch in batch_indices(step, **sizes) for i in batch]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in whole numbers, one counter at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def test_the_twin_gives_random123s_known_answers():
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_an_epoch_is_the_examples_sorted_by_their_philox_words(seed):
    for epoch in range(3):

        def sort_key(i: int, epoch: int = epoch) -> int:
            low, high = philox((i, 0, epoch, 0x64617461), (seed % 2**32, seed >> 32))[:2]
            return low + high * 2**32

        whole = stream(15, n=20, batch_size=4, accumulate=1, seed=seed)
        assert whole[20 * epoch : 20 * epoch + 20] == sorted(range(20), key=sort_key)


def test_golden_values():
    """A run resumed with any later version must see these."""
    assert batch_indices(0, n=10, batch_size=3, accumulate=2, seed=42) == [[1, 7, 3], [9, 6, 0]]
    assert batch_indices(1, n=10, batch_size=3, accumulate=2, seed=42) == [[5, 4, 8], [2, 0, 3]]
    assert batch_indices(1000, n=50_000, batch_size=4, accumulate=1, seed=7) == [[46474, 14077, 42912, 23675]]


@pytest.mark.parametrize(
    ("n", "batch_size", "accumulate"),
    [(48, 8, 1), (50, 8, 3), (17, 8, 2), (9, 8, 1), (8, 8, 1), (13, 8, 4), (5, 8, 1), (1, 3, 2), (7, 1, 1)],
)
def test_epochs_are_whole_and_batches_full_and_distinct(n, batch_size, accumulate):
    steps = 6 * n
    seen = stream(steps, n=n, batch_size=batch_size, accumulate=accumulate, seed=1)
    assert len(seen) == steps * batch_size * accumulate
    for at in range(0, len(seen) - n + 1, n):
        assert sorted(seen[at : at + n]) == list(range(n))
    distinct = max(size for size in (batch_size * accumulate, batch_size, 1) if size <= n)
    for at in range(0, len(seen), distinct):
        assert len(set(seen[at : at + distinct])) == distinct


@pytest.mark.parametrize("n", [9, 12, 15, 16, 17, 50])
def test_any_step_comes_out_the_same_whatever_was_asked_before(n):
    sizes = {"n": n, "batch_size": 4, "accumulate": 2, "seed": 3}
    forwards = [batch_indices(step, **sizes) for step in range(60)]
    for step in reversed(range(60)):
        batches._epoch.cache_clear()
        batches._shuffle.cache_clear()
        assert batch_indices(step, **sizes) == forwards[step]


def test_splitting_a_step_into_batches_does_not_change_its_examples():
    for n in (8, 11, 30):
        whole = stream(40, n=n, batch_size=8, accumulate=1, seed=5)
        assert stream(40, n=n, batch_size=4, accumulate=2, seed=5) == whole
        assert stream(40, n=n, batch_size=1, accumulate=8, seed=5) == whole


def test_epochs_and_seeds_differ():
    first = stream(10, n=100, batch_size=10, accumulate=1, seed=0)
    second = stream(20, n=100, batch_size=10, accumulate=1, seed=0)[100:]
    others = [stream(10, n=100, batch_size=10, accumulate=1, seed=seed) for seed in (1, 2**32, 2**63)]
    # Not merely different: about one place in a hundred agrees, as between independent permutations.
    for a, b in combinations([first, second, *others], 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) <= 8


@pytest.mark.parametrize(("n", "batch_size"), [(6, 6), (6, 4)])
def test_every_example_is_equally_likely_at_every_place(n, batch_size):
    epochs = 4000
    seen = stream(epochs * n // batch_size, n=n, batch_size=batch_size, accumulate=1, seed=9)
    counts = Counter((place % n, i) for place, i in enumerate(seen))
    table = np.array([[counts[place, i] for i in range(n)] for place in range(n)])  # [place, example]
    chi2 = ((table - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < 60  # 25 degrees of freedom: 1e-4 beyond 60
    if batch_size == n:
        assert chi2 > 5  # too even would be as wrong


def test_neighbours_are_independent():
    """All 6 orders of 3 examples are equally common."""
    counts = Counter(tuple(batch_indices(s, n=3, batch_size=3, accumulate=1, seed=4)[0]) for s in range(6000))
    assert len(counts) == 6 and all(abs(c - 1000) < 150 for c in counts.values())  # 5 standard deviations


def test_a_million_examples_take_no_time():
    batch = batch_indices(5, n=1_000_000, batch_size=16, accumulate=1, seed=0)[0]
    assert len(set(batch)) == 16 and max(batch) > 500_000
