"""Rankings that people give: a step's texts are written as a question into the run's folder, and its answer is read from there.

    RUN/rank/000012.json          the question: {step, questions: [{prompt, texts: {"a": …, "b": …}}]}
    RUN/rank/000012.answer.json   the answer: {rankings: [{order: [["b"], ["a", "c"]], unknown: ["d"]}]}, one per question
    RUN/rank/000012.key.json      which member wrote which text, kept from whoever ranks

Questions about points of a step's line (rank_line) are named 000012-line.

Letters are dealt by a permutation of the run's seed, step and question, so that no place says who a member is. Members that wrote the
same text share a letter, and so tie. Letters in no tier stand below all tiers; unknown ones are compared with nobody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.folder import write
from zoft.method.ranking import Order
from zoft.noise.spec import philox

DEALT = 0x6465616C  # separates these words from those of the noise
MOST = 1 << 24  # bytes of an answer
HOW = (
    'answer into STEP.answer.json: {"rankings": [{"order": [["best"], ["next", "tied with it"]], "unknown": []}, …]}, one per '
    "question; letters that are left out stand below all others"
)


@dataclass(frozen=True)
class Rollouts:
    """Hold what a step's members wrote [P][N], with the tokens and scores of each text, and the prompts [N]."""

    prompts: list[str]
    texts: list[list[str]]
    tokens: list[list[float]]
    scores: list[list[float]]


def question_name(step: int, line: bool = False) -> str:
    """Return the name of a step's question, about its members or about its line."""
    return f"{step:06d}{'-line' if line else ''}"


def place_of(folder: Path, name: str, kind: str = "") -> Path:
    """Return the file of a question (kind ""), its `answer`, its `key` or its `draft`."""
    return folder / "rank" / f"{name}{'.' if kind else ''}{kind}.json"


def waiting(folder: Path) -> str | None:
    """Return the name of the last question that has no answer yet; None where there is none."""
    names = sorted(p.stem for p in (folder / "rank").glob("[0-9]*.json") if "." not in p.stem)
    return next((n for n in reversed(names) if not place_of(folder, n, "answer").exists()), None)


def ask(folder: Path, name: str, step: int, seed: int, found: Rollouts) -> None:
    """Write a step's question and its key, the question last: whoever sees it can answer."""
    dealt = [letters_of(seed, step, n, [row[n] for row in found.texts]) for n in range(len(found.prompts))]
    questions = []
    for prompt, letters, n in zip(found.prompts, dealt, range(len(dealt)), strict=True):
        texts = {letter: found.texts[p][n] for p, letter in enumerate(letters)}
        questions.append({"prompt": prompt, "texts": dict(sorted(texts.items()))})
    key = {"letters": dealt, "texts": found.texts, "tokens": found.tokens, "scores": found.scores}
    (folder / "rank").mkdir(exist_ok=True)
    write(place_of(folder, name, "key"), json.dumps(key) + "\n")
    write(
        place_of(folder, name),
        json.dumps({"step": step, "how": HOW, "questions": questions}, indent=1) + "\n",
    )


def letters_of(seed: int, step: int, question: int, texts: Sequence[str]) -> list[str]:
    """Return each member's letter [P]: one for each distinct text, dealt at random."""
    word = 1 << 32
    key = seed % word, seed // word % word
    own = list(dict.fromkeys(texts))
    drawn = [(philox((i, question % word, step % word, DEALT), key)[0], i) for i in range(len(own))]
    place = {i: at for at, (_, i) in enumerate(sorted(drawn))}
    letter = {text: _name(place[i]) for i, text in enumerate(own)}
    return [letter[text] for text in texts]


def _name(n: int) -> str:
    """Return a, b, …, z, aa, ab, …"""
    return (_name(n // 26 - 1) if n >= 26 else "") + chr(ord("a") + n % 26)


def answered(folder: Path, name: str) -> tuple[list[Order], Rollouts] | None:
    """Return a question's rankings by members, and what they wrote; None where the answer is not there yet. Raises UserError."""
    path = place_of(folder, name, "answer")
    if not path.exists() or not place_of(folder, name, "key").exists():
        return None
    key = json.loads(place_of(folder, name, "key").read_text(encoding="utf-8"))
    question = json.loads(place_of(folder, name).read_text(encoding="utf-8"))
    if path.stat().st_size > MOST:
        raise UserError(f"{path}: more than {MOST:,} bytes; it has one ranking per question")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({' '.join(str(error).split())[:80]}); {HOW}") from None
    rankings = checked(tree, [q["texts"] for q in question["questions"]], str(path))
    orders = []
    for (tiers, unknown), letters in zip(rankings, key["letters"], strict=True):
        who = {letter: [p for p, own in enumerate(letters) if own == letter] for letter in letters}
        orders.append(
            Order(
                tuple(tuple(p for letter in tier for p in who[letter]) for tier in tiers),
                frozenset(p for letter in unknown for p in who[letter]),
            )
        )
    prompts = [q["prompt"] for q in question["questions"]]
    return orders, Rollouts(prompts, key["texts"], key["tokens"], key["scores"])


def checked(
    tree: Any, texts: Sequence[Mapping[str, str]], where: str
) -> list[tuple[list[list[str]], list[str]]]:
    """Return (tiers, unknown letters) of each question of an answer. Raises UserError naming what is wrong."""
    rankings = tree.get("rankings") if isinstance(tree, dict) else None
    if not isinstance(rankings, list) or len(rankings) != len(texts):
        said = f"{len(rankings)} rankings" if isinstance(rankings, list) else "no list of rankings"
        raise UserError(f"{where}: holds {said} for {len(texts)} questions; {HOW}")
    found = []
    for n, (ranking, held) in enumerate(zip(rankings, texts), 1):
        ranking = ranking if isinstance(ranking, dict) else {}
        tiers, unknown = ranking.get("order"), ranking.get("unknown", [])
        if (
            not isinstance(tiers, list)
            or not isinstance(unknown, list)
            or not all(isinstance(t, list) for t in tiers)
        ):
            raise UserError(f"{where}: ranking {n} has no order of lists; {HOW}")
        named = [letter for part in (*tiers, unknown) for letter in part]
        for letter in named:
            if not isinstance(letter, str) or letter not in held:
                raise UserError(
                    f"{where}: ranking {n} names {str(letter)[:20]}; its texts are {', '.join(held)}"
                )
        if twice := [letter for letter in held if named.count(letter) > 1]:
            raise UserError(f"{where}: ranking {n} names {twice[0]} twice; once is enough")
        found.append(([t for t in tiers if t], unknown))
    return found
