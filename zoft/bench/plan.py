"""Read a bench file and expand it: which rows on which tasks, at which learning rates, with which seeds.

    base: {config: mezo/reviews, schedule: linear}     a config's name or file, and keys that all rows share
    tasks: {reviews: {task: reviews}, trec: {task: trec}}
    rows: {mezo: {lr: 4e-5}, q 4: {q: 4, lr: 8e-5}}    keys of a row; they win over its task's, which win over base's
    frame: {untrained: {method: zero-shot}}            baselines (`zoft baseline --method …`) and their keys
    forwards: 64000                                    of each run, examples × probes
    seeds: [1, 2, 3]
    lr_factors: [0.5, 1, 2]                            times a row's lr: what the search tries; a row may have its own
    lr_forwards: 64000                                 of each run of the search
    lr_seed: 0                                         of the search, none of `seeds`
    evaluations: 5                                     of each run, evenly spaced
    draws: 32                                          steps that --gradient takes the mean of
    reach: {reviews: 0.9}                              a task's value of its metric: forwards and seconds until there

A null takes a key of base away. All of it is composed and checked before the first run begins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zoft.baselines.ask import TRAINING, WITH_GRADIENTS, Ask
from zoft.baselines.methods import METHODS, baseline_settings, keys_of
from zoft.config.compose import is_file, once_each, packaged
from zoft.config.schema import Config, fields
from zoft.errors import UserError, nearest
from zoft.method.configured import compose
from zoft.method.estimators.named import forwards_per_step
from zoft.sweep.grammar import as_text
from zoft.sweep.plan import job_name
from zoft.yaml_files import yaml_tree

FILE_KEYS = {
    "base": dict, "tasks": dict, "rows": dict, "frame": dict, "forwards": int, "seeds": list, "lr_factors": list,
    "lr_forwards": int, "lr_seed": int, "evaluations": int, "draws": int, "reach": dict,
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "frame": {}, "lr_factors": [1], "lr_seed": 0, "evaluations": 5, "draws": 32, "reach": {}, "base": {},
}  # fmt: skip
# What the bench says itself, and what runs code, which a file may not ask for.
OURS = ("steps", "max_forwards", "seed", "eval_every", "save_model")
CODE = ("reward", "trust_remote_code")
DRAWING = ("icl", "linear-probe", *TRAINING)  # methods that a seed changes


@dataclass(frozen=True)
class Job:
    """Describe one run of a bench: its folder's name, its row, task and seed, and what is run.

    part: "search" (chooses an lr), "run", "frame" (a baseline, which `ask` describes) or "gradient", of so many draws.
    """

    name: str
    part: str
    task: str
    row: str
    config: Config
    ask: Ask | None = None
    draws: int = 0

    @property
    def forwards(self) -> int:
        """Return the counted forwards of the plan; 0 for a baseline, whose result says what it took."""
        return self.config.steps * forwards_per_step(self.config) if self.part in ("search", "run") else 0


@dataclass(frozen=True)
class Entry:
    """Describe a row on a task: the runs that search its lr, and, by the lr that is chosen, its runs of each seed.

    search: {lr: its run}, empty where one lr is all there is. runs: {lr: a run per seed}.
    frame: its baselines, one per seed where a seed matters. gradient: what --gradient asks for, or None.
    """

    task: str
    row: str
    search: Mapping[float, Job]
    runs: Mapping[float, Sequence[Job]]
    frame: Sequence[Job] = ()
    gradient: Job | None = None


@dataclass(frozen=True)
class Bench:
    """Describe a bench as it is run: the folder of its runs, its entries, and what its table needs."""

    root: Path
    entries: Sequence[Entry]
    reach: Mapping[str, float]

    @cached_property
    def tasks(self) -> list[str]:
        """Return the tasks in order."""
        return list(dict.fromkeys(e.task for e in self.entries))


@dataclass(frozen=True)
class Wanted:
    """Hold what a command line asks for: only these rows and tasks (empty: all), so many seeds (None: all), and gradients."""

    only: Sequence[str] = ()
    tasks: Sequence[str] = ()
    seeds: int | None = None
    gradient: bool = False


def read_bench(name: str, overrides: Sequence[str] = (), wanted: Wanted = Wanted()) -> Bench:
    """Return the bench of a packaged name (bench/estimators) or a .yaml file; nothing is loaded or written.

    overrides: key=value, keys of all rows; output_dir is the folder of the bench. Raises UserError for what is wrong in
    the file, with the row and task.
    """
    path = bench_file(name)
    tree = _checked(path, yaml_tree(path))
    said = dict(text.partition("=")[::2] for text in overrides if not text.startswith("-"))
    for text in overrides:
        key = text.partition("=")[0]
        if key not in said or key in (*OURS, "lr"):
            raise UserError(f"{text}: zoft bench takes the keys of all rows as key=value, and not this one")
    root = Path(said.pop("output_dir", f"runs/bench-{path.stem}")).expanduser()
    rows = _picked("--only", wanted.only, [*tree["frame"], *tree["rows"]])
    tasks = _picked("--tasks", wanted.tasks, tree["tasks"])
    count = wanted.seeds or len(tree["seeds"])
    if count > len(tree["seeds"]):
        raise UserError(f"--seeds {count}: {path.name} has {len(tree['seeds'])} seeds; give it more")
    seeds = tree["seeds"][:count]
    entries = []
    with once_each():
        for task in tasks:
            for row in rows:
                try:
                    entries.append(_entry(tree, path, root, said, task, row, seeds, wanted.gradient))
                except UserError as error:
                    raise UserError(f"{path.name}: row {row}, task {task}: {error}") from None
    return Bench(root, entries, {t: v for t, v in tree["reach"].items() if t in tasks})


def bench_file(name: str) -> Path:
    """Return the path of a bench file by its packaged name or its own path."""
    if is_file(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"--config {name}: no such file")
        return path
    known = [f"bench/{p.stem}" for p in sorted((packaged("configs") / "bench").glob("*.yaml"))]
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"use {', '.join(known)}, or a path to a .yaml file"
        raise UserError(f"--config {name}: no such bench file; {hint}")
    return packaged("configs") / f"{name}.yaml"


def _checked(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Return a bench file's tree with its defaults. Raises UserError for keys and values that do not belong there."""
    for key, value in tree.items():
        if key not in FILE_KEYS:
            near = nearest(key, FILE_KEYS)
            hint = f"did you mean {near}?" if near else f"use {', '.join(FILE_KEYS)}"
            raise UserError(f"{path.name}: {key}: no key of a bench file; {hint}")
        if not isinstance(value, FILE_KEYS[key]) or isinstance(value, bool):
            kind = {dict: "a map", list: "a list", int: "a whole number"}[FILE_KEYS[key]]
            raise UserError(f"{path.name}: {key}: {value!r} is not {kind}")
    tree = DEFAULTS | tree
    missing = next((k for k in ("tasks", "rows", "forwards", "seeds") if not tree.get(k)), None)
    if missing:
        raise UserError(f"{path.name}: {missing}: a bench file needs it")
    tree["lr_forwards"] = tree.get("lr_forwards", tree["forwards"])
    for key, least in (("forwards", 1), ("lr_forwards", 1), ("evaluations", 1), ("draws", 2)):
        if tree[key] < least:
            raise UserError(f"{path.name}: {key}={tree[key]}: must be ≥ {least}")
    seeds = tree["seeds"]
    if not all(type(s) is int and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path.name}: seeds: {seeds} are not different whole numbers")
    if tree["lr_seed"] in seeds:
        raise UserError(
            f"{path.name}: lr_seed={tree['lr_seed']}: is one of seeds; the lr is chosen by another one"
        )
    for group in ("tasks", "rows", "frame"):
        for name, keys in tree[group].items():
            if not isinstance(name, str) or "," in name or name != name.strip():
                raise UserError(f"{path.name}: {group}: {name!r} is no name; use text without commas")
            if not isinstance(keys, dict | None):
                raise UserError(f"{path.name}: {group}: {name}: write its keys as a map, {{}} for none")
    both = next((name for name in tree["rows"] if name in tree["frame"]), None)
    if both:
        raise UserError(f"{path.name}: {both}: is a row and in the frame; rename one")
    for task, value in tree["reach"].items():
        if task not in tree["tasks"] or not isinstance(value, int | float):
            raise UserError(f"{path.name}: reach: {task}: {value}: give a task of the file and a number")
    return tree


def _picked(option: str, asked: Sequence[str], known: Any) -> list[str]:
    """Return the names that are asked for, in the file's order; all where none is."""
    for name in asked:
        if name not in known:
            near = nearest(name, known)
            raise UserError(
                f"{option} {name}: use {', '.join(known)}{f'; did you mean {near}?' if near else ''}"
            )
    return [name for name in known if not asked or name in asked]


def _entry(
    tree: Mapping[str, Any], path: Path, root: Path, said: Mapping[str, str], task: str, row: str,
    seeds: Sequence[int], gradient: bool,
) -> Entry:  # fmt: skip
    """Compose all that a row on a task may run."""
    framed = row in tree["frame"]
    keys = _merged(tree["base"], tree["tasks"][task] or {})
    config = _config_of(keys.pop("config", None), path)
    mine = dict(tree["frame" if framed else "rows"][row] or {})
    _refuse_ours({**keys, **mine})
    place = {"task": task, "row": row}
    if framed:
        return Entry(task, row, {}, {}, [*_baselines(tree, keys, mine, config, said, seeds, place, root)])
    factors = mine.pop("lr_factors", tree["lr_factors"])
    if not (isinstance(factors, list) and factors and all(_positive(f) for f in factors)):
        raise UserError(f"lr_factors: {factors}: give a list of numbers above 0")
    keys = _merged(keys, mine) | dict(said)
    plain = compose(config, _words(keys))
    if plain.lr == "auto":
        raise UserError("lr=auto: lr_factors multiply a number; set lr in the bench's row")
    rates = [float(f"{float(plain.lr) * float(f):.6g}") for f in sorted(map(float, factors))]

    def jobs(part: str, forwards: int, seeds: Sequence[int], **more: Any) -> dict[float, list[Job]]:
        """Return {lr: a job per seed}; the config is composed once, for neither lr nor seed changes what is allowed."""
        steps = forwards // forwards_per_step(plain)
        if not steps:
            name = "lr_forwards" if part == "search" else "forwards"
            raise UserError(f"{name}={forwards}: a step takes {forwards_per_step(plain)}; allow more")
        own = {"seed": seeds[0], "steps": steps, "save_model": False, **more}
        found = compose(config, _words(keys | own))
        values = place | ({"part": part} if part != "run" else {})
        return {
            lr: [
                _job(
                    part, dataclasses.replace(found, lr=lr, seed=seed),
                    {**values, "lr": as_text(lr), "seed": str(seed)}, root,
                )
                for seed in seeds
            ]
            for lr in rates
        }  # fmt: skip

    def measured() -> Job:
        found = compose(config, _words(keys | {"seed": tree["lr_seed"], "save_model": False}))
        values = place | {"part": "gradient", "draws": str(tree["draws"])}
        return dataclasses.replace(_job("gradient", found, values, root), draws=tree["draws"])

    steps = tree["forwards"] // forwards_per_step(plain)
    runs = jobs("run", tree["forwards"], seeds, eval_every=math.ceil(steps / tree["evaluations"]))
    search = {}
    if len(rates) > 1:
        found = jobs("search", tree["lr_forwards"], [tree["lr_seed"]], eval_every=0, eval_limit=1)
        search = {lr: job for lr, (job,) in found.items()}
    return Entry(task, row, search, runs, gradient=measured() if gradient else None)


def _baselines(
    tree: Mapping[str, Any], keys: Mapping[str, Any], mine: dict[str, Any], config: str | None,
    said: Mapping[str, str], seeds: Sequence[int], place: Mapping[str, str], root: Path,
) -> Iterator[Job]:  # fmt: skip
    """Compose a row of the frame: the keys of base and task that its method takes, and its own."""
    method, demos, epochs = (mine.pop(k, None) for k in ("method", "demos", "epochs"))
    if method not in METHODS:
        raise UserError(f"method: {method}: use {', '.join(METHODS)}")
    known, flat = keys_of(method), _flat(keys) | dict(said)
    shared = {k: v for k, v in flat.items() if k.partition(".")[0] in known}
    if method in WITH_GRADIENTS:
        mine["save_model"] = False
    if method in TRAINING:
        steps = mine.get("steps")
        if isinstance(steps, int):
            mine["eval_every"] = math.ceil(steps / tree["evaluations"])
    for seed in seeds if method in DRAWING else seeds[:1]:
        words = _words(_merged(shared, mine) | {"seed": seed, "output_dir": str(root)})
        found, ask = baseline_settings(config, words, method, demos, epochs)
        more = {k: str(v) for k, v in (("demos", demos), ("epochs", epochs)) if v is not None}
        yield _job("frame", found, {**place, "method": method, **more, "seed": str(seed)}, root, ask)


def _job(part: str, config: Config, values: Mapping[str, str], root: Path, ask: Ask | None = None) -> Job:
    name = job_name(config, values)
    config = dataclasses.replace(config, output_dir=str(root / name))
    return Job(name, part, values["task"], values["row"], config, ask)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of both, those of `above` first of all; its null takes away a key that `below` has."""
    below, above = _flat(below), _flat(above)
    gone = {k for k, v in above.items() if v is None and k in below}
    if "task" in above:  # another task keeps no key of the first
        gone |= {k for k in below if k.startswith("task.")}
    return {k: v for k, v in (below | above).items() if k not in gone or above.get(k) is not None}


def _flat(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys with those of `task` by their dotted names."""
    task = keys.get("task")
    if not isinstance(task, Mapping):
        return dict(keys)
    return {k: v for k, v in keys.items() if k != "task"} | {f"task.{k}": v for k, v in task.items()}


def _words(keys: Mapping[str, Any]) -> list[str]:
    return [f"{k}={as_text(v)}" for k, v in keys.items()]


def _refuse_ours(keys: Mapping[str, Any]) -> None:
    """Raise UserError for keys that a bench sets itself, and for what runs code."""
    for key, value in _flat(keys).items():
        if key in (*OURS, "output_dir") and not (key == "steps" and "method" in keys):
            raise UserError(f"{key}: the bench says it; leave it out")
        if key in CODE or (key == "recipe" and str(value).endswith(".py")):
            raise UserError(f"{key}: not from a file, for it runs code; leave it out")
        if key.partition(".")[0] not in {*fields(), "config", "lr_factors", "method", "demos", "epochs"}:
            from zoft.config.check import unknown_key

            raise unknown_key(key)


def _config_of(name: Any, path: Path) -> str | None:
    """Return the config that a bench file names; a file beside it comes first."""
    if name is None:
        return None
    beside = path.resolve().parent / str(name)
    return str(beside) if is_file(str(name)) and beside.is_file() else str(name)


def _positive(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False
