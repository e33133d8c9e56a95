"""Choose the rows that a run trains on, is chosen by, and is judged by: the papers' splits, by a seeded permutation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoft.errors import UserError

TEST_SEED = 42  # draws the rows that judge few-shot runs, so that they are the same for every data_seed
DRAWN = ("num_train", "num_dev", "num_eval", "k_shot", "data_seed", "balanced")
Rows = list[dict[str, Any]]


def asked(task: Any) -> dict[str, Any]:
    """Return the task's settings of this file."""
    return {name: getattr(task, name) for name in DRAWN}


def check(task: Any, classes: bool) -> None:
    """Refuse settings that contradict each other or do nothing. classes: whether the rows have labels."""
    a = asked(task)
    drawn = [n for n in ("k_shot", "num_train", "num_dev", "num_eval") if a[n] is not None]
    if a["k_shot"] is not None:
        for name in ("num_train", "num_dev"):
            if a[name] is not None:
                raise UserError(
                    f"task.{name}={a[name]}: task.k_shot={a['k_shot']} takes as many rows a class to train, and as many "
                    "for the dev set; set one of the two to null"
                )
    if a["balanced"] and a["num_train"] is None:
        raise UserError("task.balanced=true: as many rows of each class as what? set task.num_train")
    for name in ("k_shot", "balanced"):
        if a[name] and not classes:
            raise UserError(f"task.{name}={a[name]}: these rows have no classes; leave it out")
    if a["data_seed"] and not drawn and task.name not in ("countdown", "arithmetic"):
        raise UserError(
            f"task.data_seed={a['data_seed']}: nothing is drawn; set task.num_train, task.num_eval or task.k_shot, too"
        )
    if task.train_limit is not None and (found := [n for n in drawn if n != "num_eval"]):
        raise UserError(f"task.train_limit={task.train_limit}: task.{found[0]} says how many; leave one out")


def draw(
    train: Rows, held: Rows, task: Any, labels: Sequence[str]
) -> tuple[Rows, Rows | None, Rows, list[str]]:
    """Return (rows to train on, rows to choose a model by or None, rows to judge by, notes for a person).

    A permutation of the training rows by data_seed: the first num_train of it are trained on, the num_dev after them
    are the dev set; where there are fewer, the dev set is the tail. With k_shot the first k of each class, and the k
    after them; with balanced as many of each class as make num_train and num_dev. The first num_eval of a permutation
    of the evaluation rows judge: by data_seed, too, but by one fixed seed for k_shot, whose seeds (13, 21, 42, 87, 100
    in the papers) are averaged over.

    train, held: rows with `gold`. task: see `asked`. labels: of the classes, in the order of gold.
    Errors: UserError where no row is left to train on, or a class has too few for task.balanced.
    Source: MeZO (arXiv 2305.17333), whose permutations these are, for rows in the same order; few shots: LM-BFF (arXiv
    2012.15723), whose draws are others, its files being in another order.
    """
    a, notes = asked(task), []
    seed = TEST_SEED if a["k_shot"] is not None else a["data_seed"]
    judged = [held[i] for i in _order(len(held), seed)[: a["num_eval"]]] if a["num_eval"] else held
    if a["num_eval"]:
        notes.append(f"{len(judged):,} of {len(held):,} rows for evaluation, by a permutation of seed {seed}")
    if all(a[n] is None for n in ("k_shot", "num_train", "num_dev")):
        return train, None, judged, notes
    order = [train[i] for i in _order(len(train), a["data_seed"])]
    if a["k_shot"] is not None or a["balanced"]:
        first, second = _by_class(order, a, labels, notes)
    else:
        chosen = order[: a["num_train"] + (a["num_dev"] or 0)] if a["num_train"] else order
        cut = len(chosen) - (a["num_dev"] or 0)
        if cut < 1:
            raise UserError(
                f"task.num_dev={a['num_dev']}: there are only {len(order)} rows, so none is left to train on; lower it, or null"
            )
        first, second = chosen[:cut], chosen[cut:]
    said = f"{len(first):,} rows to train on"
    if second:
        said += f" and {len(second):,} for the dev set"
    elif a["k_shot"] is not None or a["num_dev"]:
        said += " and none for the dev set"
    notes.append(f"{said}, by a permutation of seed {a['data_seed']}")
    return first, second or None, judged, notes


def _by_class(order: Rows, a: dict[str, Any], labels: Sequence[str], notes: list[str]) -> tuple[Rows, Rows]:
    """The first rows of each class in this order, and those after them."""
    classes = [[r for r in order if r["gold"] == gold] for gold in range(len(labels))]
    if a["k_shot"] is not None:
        train = dev = a["k_shot"]
    else:
        train, dev = a["num_train"] // len(labels), (a["num_dev"] or 0) // len(labels)
        if not train:
            raise UserError(f"task.num_train={a['num_train']}: there are {len(labels)} classes; raise it")
    for name, rows in zip(labels, classes):
        if len(rows) < train + dev:
            if a["balanced"]:
                raise UserError(
                    f"task.balanced=true: {train} rows of each class to train on and {dev} for the dev set are wanted, "
                    f"and {name} has {len(rows)}; lower task.num_train or task.num_dev"
                )
            notes.append(f"class {name} has only {len(rows)} rows")
    first = [r for rows in classes for r in rows[:train]]
    return first, [r for rows in classes for r in rows[train : train + dev]]


def _order(n: int, seed: int) -> list[int]:
    from numpy.random import RandomState  # NumPy promises to keep this generator's numbers

    return RandomState(seed).permutation(n).tolist()
