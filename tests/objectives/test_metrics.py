"""Scores of generated text, against values worked out by hand from their rules."""

import pytest

from zoft.objectives.metrics import exact_match, normalise, token_f1


@pytest.mark.parametrize(
    "text,want",
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("  a  cat,\tAN owl; the-end ", "cat owl theend"),  # punctuation goes first, so this "the" is none
        ("theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalise(text, want):
    assert normalise(text) == want


@pytest.mark.parametrize(
    "text,answers,em,f1",
    [
        ("The cat", ["cat"], 1, 1),
        ("cat dog", ["cat"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),  # a multiset: the second cat has no partner
        ("cat cat", ["cat cat bird"], 0, 4 / 5),
        ("big cat", ["dog", "cat", "big cat"], 1, 1),
        ("big cat", ["dog", "cat"], 0, 2 / 3),  # the best of the answers
        ("fish", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("answer", ["no answer"], 0, 0),  # no overlap counts there
        ("No answer.", ["no answer"], 1, 1),
        ("cannotanswer", ["CANNOTANSWER"], 1, 1),
        ("no answer", ["CANNOTANSWER"], 0, 0),
        ("the", ["The"], 1, 1),  # no word left in either
        ("cat", ["the"], 0, 0),
    ],
)
def test_exact_match_and_token_f1(text, answers, em, f1):
    assert exact_match(text, answers) == em
    assert token_f1(text, answers) == pytest.approx(f1, abs=1e-15)
