"""Tasks whose answers a program checks: countdown and arithmetic from seeded generators, GSM8K from files or the Hub.

Each row has a prompt, one right answer as text (`candidates`, for objective=lm), and the columns that its scorer reads
(zoft.objectives.verify). Rows are distinct; the held-out part is chosen by a hash of the prompt, as for all data.
Sources: Countdown as in TinyZero and reasoning-gym, in words of our own; GSM8K, Cobbe et al. 2021 (arXiv 2110.14168).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from zoft.config.schema import VERIFIED
from zoft.errors import UserError

if TYPE_CHECKING:
    from numpy.random import RandomState

ROWS = 2000  # rows of a generator where task.rows says nothing
LEVEL = 2
TRIES = 50  # draws per row that is wanted, at most
GSM8K = "openai/gsm8k"

# level -> (numbers, largest number, operators) of an exercise
ARITHMETIC = {1: (2, 9, "+"), 2: (2, 99, "+-"), 3: (2, 99, "+-*"), 4: (3, 99, "+-*")}
# level -> (numbers, largest number, largest target, operators)
COUNTDOWN = {1: (2, 9, 18, "+-"), 2: (3, 9, 30, "+-*"), 3: (3, 99, 200, "+-*/"), 4: (4, 99, 200, "+-*/")}

Row = dict[str, Any]


def check_verifiable(task: Any) -> None:
    """Refuse keys that a verifiable task has no use for. Raises UserError."""
    for key in (
        "prompt",
        "label",
        "target",
        "null_prompt",
        "choices",
        "columns",
        "k_shot",
        "balanced",
        "pack",
    ):
        if getattr(task, key):
            raise UserError(f"task.{key}: task={task.name} brings its own prompts and answers; leave it out")
    if task.format != "auto":
        raise UserError(f"task.format={task.format}: task={task.name} brings its own rows; leave it out")
    made = task.name in MAKERS
    for key in ("train", "eval", "subset"):
        if made and getattr(task, key):
            raise UserError(
                f"task.{key}: task={task.name} makes its rows; for a file of yours say task=local"
            )
    for key in ("rows", "level"):
        if not made and getattr(task, key) is not None:
            raise UserError(
                f"task.{key}={getattr(task, key)}: is for task={' and task='.join(MAKERS)}; task.num_train says how many"
            )


def refuse_generator_keys(task: Any) -> None:
    """Refuse the generators' keys for tasks that have rows of their own. Raises UserError."""
    for key in ("rows", "level"):
        if task.name not in VERIFIED and getattr(task, key) is not None:
            raise UserError(
                f"task.{key}={getattr(task, key)}: is for task={' and task='.join(MAKERS)}; leave it out"
            )


def generated(task: Any) -> tuple[list[Row], list[str]]:
    """Return the rows of a generator, in the order they were drawn, and notes on them.

    task: name, rows, level, data_seed. The first n rows do not depend on how many are made.
    """
    from numpy.random import RandomState  # NumPy promises to keep this generator's numbers

    wanted, level = task.rows or ROWS, task.level or LEVEL
    rng, found = RandomState(task.data_seed), dict[str, Row]()
    for _ in range(TRIES * wanted):
        if len(found) == wanted:
            break
        columns = MAKERS[task.name](rng, level)
        if columns is not None:
            found.setdefault(
                json.dumps([columns.get("numbers"), columns.get("target"), columns.get("exercise")]), columns
            )
    rows = [written(task.name, f"{task.name}:{i}", c) for i, c in enumerate(found.values())]
    few = f", all that level {level} has" if len(rows) < wanted else ""
    return rows, [f"task={task.name}: {len(rows):,} rows of level {level}, by seed {task.data_seed}{few}"]


def arithmetic(rng: RandomState, level: int) -> Row:
    """Draw an exercise: {exercise: "12 + 7", answer: "19"}."""
    count, most, operators = ARITHMETIC[level]
    text = str(rng.randint(0, most + 1))
    for _ in range(count - 1):
        text += f" {operators[rng.randint(len(operators))]} {rng.randint(0, most + 1)}"
    from zoft.data.tasks.expression import value_of

    found = value_of(text)
    assert found is not None and found.denominator == 1, text
    return {"exercise": text, "answer": str(found.numerator)}


def countdown(rng: RandomState, level: int) -> Row | None:
    """Draw numbers and a target that they can make: {numbers, target, answer: "(3 + 5) * 2"}; None where a draw makes none."""
    count, most, largest, operators = COUNTDOWN[level]
    numbers = [int(x) for x in rng.randint(1, most + 1, count)]
    parts = [(Fraction(x), str(x), True) for x in numbers]
    while len(parts) > 1:
        i, j = (int(x) for x in rng.permutation(len(parts))[:2])
        (a, left, _), (b, right, _) = parts[i], parts[j]
        op = operators[rng.randint(len(operators))]
        if op == "/" and (b == 0 or (a / b).denominator != 1):
            return None
        value = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
        parts = [p for k, p in enumerate(parts) if k not in (i, j)] + [
            (value, f"({left} {op} {right})", False)
        ]
    value, text, _ = parts[0]
    if value.denominator != 1 or not 1 <= value <= largest:
        return None
    return {"numbers": numbers, "target": int(value), "answer": text[1:-1]}


MAKERS: dict[str, Callable[[RandomState, int], Row | None]] = {
    "countdown": countdown,
    "arithmetic": arithmetic,
}


def question(name: str, columns: Row) -> str:
    """Return what a row asks."""
    if name == "arithmetic":
        return f"What is {columns['exercise']}? Reply with the number alone."
    if name == "countdown":
        numbers = ", ".join(map(str, columns["numbers"]))
        return (
            f"Make {columns['target']} from the numbers {numbers}. Use each of them exactly once, with +, -, *, / and "
            "brackets. Reply with the expression alone, such as (1 + 2) * 3."
        )
    return f"{columns['question'].strip()}\nThink step by step. Put the number that is asked for behind ####."


def written(name: str, where: str, columns: Row) -> Row:
    """Return one row: as turns for a chat template, and as text that ends in "Answer:"."""
    asked = question(name, columns)
    answer = str(columns["answer"]).strip()
    digest = hashlib.blake2b(json.dumps([asked]).encode(), digest_size=8).digest()
    turns = [
        {"role": "user", "content": asked, "scored": False},
        {"role": "assistant", "content": answer, "scored": True},
    ]
    return {
        "prompt": f"{asked}\nAnswer:", "candidates": [f" {answer}"], "gold": 0, "answers": [answer], "joins": True,
        "messages": turns, "where": where, "key": int.from_bytes(digest, "big"),
        "words": len(asked.split()) + len(answer.split()), "columns": columns,
    }  # fmt: skip


def gsm8k(where: str, row: Row) -> Row:
    """Return one row of GSM8K's schema: question, and an answer whose last line is `#### number`."""
    from zoft.data.tasks.expression import last_number

    for column in ("question", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise UserError(f"{where}: column {column} is empty or no text; GSM8K has {{question, answer}}")
    head, mark, tail = row["answer"].rpartition("####")
    if not mark or last_number(tail) is None:
        raise UserError(f"{where}: column answer ends in no '#### number', as GSM8K's do")
    return written("gsm8k", where, {"question": row["question"], "answer": row["answer"]})
