"""Make what a template cannot say of the papers' tasks: columns, candidates and answers from a row of the Hub's schema.

The rest of each task (data set, prompt, label words, split) is configs/task/NAME.yaml. Source of the wording: MeZO (arXiv
2305.17333) for decoder models, LM-BFF (arXiv 2012.15723) for masked ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Made:
    """Hold what a function below makes of a row.

    columns: further columns for the templates, or others in their place. candidates: texts for {candidate} in task.target,
    where each row brings its own. golds: which of them are right, the first being trained on. answers: all texts that
    count as right where an answer is generated.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    candidates: list[str] = field(default_factory=list)
    golds: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def boolq(row: Mapping[str, Any]) -> Made:
    """Write the question as a sentence: a capital letter in front, one question mark behind."""
    question = row["question"].rstrip()
    return Made({"question": question[:1].upper() + question[1:].removesuffix("?")})


def wsc(row: Mapping[str, Any]) -> Made:
    return Made({"span2_text": row["span2_text"].lower()})


def copa(row: Mapping[str, Any]) -> Made:
    """Make the premise without its full stop, a conjunction, and the choices as they go on: "I" keeps its capital."""
    conjunction = {"effect": "so", "cause": "because"}[row["question"]]
    candidates = []
    for choice in (row["choice1"], row["choice2"]):
        first, *rest = choice.split(" ")
        candidates.append(" ".join([first if first == "I" else first.lower(), *rest]))
    premise = row["premise"].rstrip().removesuffix(".")
    return Made({"premise": premise, "conjunction": conjunction}, candidates, [int(row["label"])])


def record(row: Mapping[str, Any]) -> Made:
    """Make the whole query the candidate, once with each entity in it; every answer is right."""
    entities = list(dict.fromkeys(row["entities"]))
    candidates = [row["query"].replace("@placeholder", entity) for entity in entities]
    golds = [entities.index(answer) for answer in dict.fromkeys(row["answers"])]
    return Made({"passage": row["passage"].replace("@highlight\n", "- ")}, candidates, golds)


def squad(row: Mapping[str, Any]) -> Made:
    return _answered(row, row["answers"]["text"])


def drop(row: Mapping[str, Any]) -> Made:
    """Count each span of an answer as an answer, as the MeZO paper's code has it; DROP's own metric wants all of them."""
    return _answered(row, row["answers_spans"]["spans"])


def _answered(row: Mapping[str, Any], answers: list[str]) -> Made:
    return Made({"question": row["question"].strip(), "answer": answers[0]}, answers=list(answers))


def labelled(row: Mapping[str, Any]) -> Made | None:
    """Return None for a row whose annotators did not agree on a label (-1)."""
    return None if int(row["label"]) == -1 else Made()


def as_it_is(row: Mapping[str, Any]) -> Made:
    return Made()


# task -> what it does to a row of its data, before the templates are filled
ROWS: dict[str, Callable[[Mapping[str, Any]], Made | None]] = {
    "sst2": as_it_is,
    "rte": as_it_is,
    "cb": as_it_is,
    "boolq": boolq,
    "wsc": wsc,
    "wic": as_it_is,
    "multirc": as_it_is,
    "copa": copa,
    "record": record,
    "squad": squad,
    "drop": drop,
    "sst2-mlm": as_it_is,
    "sst5-mlm": as_it_is,
    "snli-mlm": labelled,
    "mnli-mlm": as_it_is,
    "rte-mlm": as_it_is,
    "trec-mlm": as_it_is,
}
