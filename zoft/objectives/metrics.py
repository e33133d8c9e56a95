"""Scores of predictions: of generated text against answers, of labels against labels, of rankings."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

UNANSWERABLE = ("no answer", "cannotanswer")  # golds that say so, normalised
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Return a text in lower case, without punctuation and without the articles a, an, the, words set apart by one space.

    Source: SQuAD's evaluation (arXiv 1606.05250), in MeZO's order (arXiv 2305.17333).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Return 1.0 where the text, normalised, is one of the answers, normalised; else 0.0."""
    assert answers, "no answer to compare with"
    return float(normalise(text) in {normalise(a) for a in answers})


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Return the largest over answers of F1 = 2·|A ∩ B| / (|A| + |B|), A and B the multisets of normalised words.

    An answer that says there is none ("no answer", "CANNOTANSWER") counts by exact match.
    Source: as `normalise`. Where either has no word left F1 is 0/0; they are then compared, as SQuAD 2.0 does.
    """
    assert answers, "no answer to compare with"
    return max(_f1(normalise(text), normalise(a)) for a in answers)


def _f1(text: str, answer: str) -> float:
    if answer in UNANSWERABLE or not text or not answer:
        return float(text == answer)
    a, b = text.split(), answer.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def macro_f1(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean over labels of 2·TP / (2·TP + FP + FN), over the labels that occur in either.

    gold, predicted: int [n].
    """
    labels = np.union1d(gold, predicted)
    hits = [np.sum((gold == label) & (predicted == label)) for label in labels]
    sizes = [np.sum(gold == label) + np.sum(predicted == label) for label in labels]
    return float(np.mean([2 * h / s for h, s in zip(hits, sizes)]))


def auc(positive: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the ROC curve: P(score of a positive > score of a negative), ties counted half.

    positive: bool [n], holding both. score: [n]; a NaN ranks lowest.
    Source: the Mann-Whitney statistic, from mid-ranks.
    """
    _, which, counts = np.unique(np.nan_to_num(score, nan=-np.inf), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2)[which]  # [n], from 1, ties share their mean
    p = int(positive.sum())
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * (len(score) - p)))
