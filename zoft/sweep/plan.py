"""`zoft sweep`: many runs of one config, expanded and checked before the first begins, each in a folder of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoft.config.compose import once_each, to_yaml
from zoft.config.schema import Config, fields, values
from zoft.errors import UserError, writing
from zoft.folder import refuse_unwritable, write
from zoft.limits import read_bytes
from zoft.method.configured import compose
from zoft.method.recipes import is_page
from zoft.packages import zoft_command
from zoft.signals import RESUME
from zoft.sweep import job
from zoft.sweep.grammar import CONFIG, Dimension, configs, product, split
from zoft.sweep.job import STATES, job_state

PLAN = "sweep.json"
PLAN_BYTES = 1 << 26
JOBS_MAX = 10_000
# Keys of the machine, not of the result: another value of theirs is the same job, unless they are swept over.
MACHINE = ("output_dir", "device", "threads", "probes_per_forward", "sync", "track", "trust_remote_code")


class Interrupted(KeyboardInterrupt):
    """Signal that a signal, or --cancel, has stopped a sweep; its jobs can be resumed. code: the exit code that says so."""

    code = RESUME


@dataclass
class Plan:
    """Hold a sweep: its folder, and name -> (config, {swept key: text}) of each job, in order.

    swept: the dimensions. base: what all jobs share, {config, overrides}. extra: arguments that each job's
    `zoft train` needs besides. devices: what the jobs' `device` may be.
    """

    root: Path
    swept: list[Dimension]
    base: dict[str, Any]
    jobs: dict[str, tuple[Config, dict[str, str]]] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    devices: set[str] = field(default_factory=set)


def plan(config: str | None, overrides: Sequence[str], *, search: str = "") -> Plan:
    """Expand and check a sweep; writes nothing. search: what else names it, where its values are searched.

    Raises UserError that names the first config that is wrong, and how.
    """
    own = Path(config).expanduser().resolve().parent if config and Path(config).is_file() else None
    single, swept = split(overrides, own)
    several = configs(config)
    if several:
        swept.insert(0, Dimension(CONFIG, tuple(several)))
    keys = [d.key for d in swept]
    given = [*keys, *(text.partition("=")[0] for text in single)]
    twice = next((k for k in keys if given.count(k) > 1), None)
    if twice:
        raise UserError(f"{twice} is given twice; keep one")
    if any(d.interval for d in swept) and not search:
        key = next(d.key for d in swept if d.interval)
        raise UserError(f"{key}: an interval is searched; say how often with --trials N, or give a list")
    told = [text for text in single if text.startswith("output_dir=")]
    single = [text for text in single if text not in told]
    base = {"config": config, "overrides": single}
    made = Plan(Path(), swept, base)
    with once_each():
        rows = corners(swept) if search else product(swept)
        if len(rows) > JOBS_MAX:
            raise UserError(
                f"{len(rows)} configs: more than {JOBS_MAX}; sweep over less, or search with --trials"
            )
        for row in rows:
            checked = add_job(made, row)
            if not made.root.parts:
                made.root = place(config, several, checked, base, swept, told, search)
        every = [c for c, _ in made.jobs.values()]
        made.extra, made.devices = _besides(every), {c.device for c in every}
        _look(every)
    if search:
        made.jobs.clear()  # they come one by one
    refuse_unwritable("output_dir", made.root)
    if (made.root / "ledger").exists():
        raise UserError(f"output_dir={made.root}: it holds a run; a sweep needs a folder of its own")
    return made


def _besides(configs: Sequence[Config]) -> tuple[str, ...]:
    """Return what a resumed run must be told on the command line again; the same for all jobs."""
    from zoft.train.resolve import absolute_paths

    if len({c.reward for c in configs}) > 1:
        raise UserError("reward: a sweep has one reward; make a sweep of each")
    if any(map(is_page, named := {c.recipe for c in configs})) and len(named) > 1:
        raise UserError("recipe: a sweep has packaged recipes or one page of your own; make a sweep of each")
    first = absolute_paths(configs[0])
    reward, page = first.reward, first.recipe if is_page(first.recipe) else None
    trusted = any(c.trust_remote_code for c in configs)
    told = [
        word for key, value in (("--reward", reward), ("--recipe", page)) if value for word in (key, value)
    ]
    return (*told, *(("trust_remote_code=true",) if trusted else ()))


def add_job(made: Plan, row: Mapping[str, str]) -> Config:
    """Check the config of one combination of values and put it among the jobs; returns it."""
    texts = [f"{k}={v}" for k, v in row.items() if k != CONFIG]
    try:
        config = compose(row.get(CONFIG, made.base["config"]), [*made.base["overrides"], *texts])
    except UserError as error:
        where = " ".join(f"{k}={v}" for k, v in row.items())
        raise UserError(
            f"{where}: {error}" if row and not str(error).startswith(where) else str(error)
        ) from None
    made.jobs[job_name(config, row)] = (config, dict(row))
    return config


def corners(swept: Sequence[Dimension]) -> list[dict[str, str]]:
    """Return each value, and each end of an interval, once, the other keys at their first."""
    first = {d.key: d.some()[0] for d in swept}
    rows = [first, *({**first, d.key: value} for d in swept for value in d.some()[1:])]
    return rows


def job_name(config: Config, row: Mapping[str, str]) -> str:
    """Return `lr=1e-6,seed=0-1a2b3c4d`: what was swept, to be read, and a hash of all keys that are not at their default."""
    flat = values(config)
    made = {n: f.default_factory() for n, f in fields().items() if n in flat and callable(f.default_factory)}
    defaults = {name: f.default for name, f in fields().items()} | made
    kept = {k: v for k, v in flat.items() if v != defaults[k] and (k not in MACHINE or k in row)}
    # A value's own type must not count: 1 is 1.0, and a key that a later version adds is at its default.
    said = json.dumps(
        {k: float(v) if type(v) is int and abs(v) < 1 << 53 else v for k, v in sorted(kept.items())}
    )
    readable = ",".join(f"{k}={_brief(v)}" for k, v in row.items()) or "run"
    readable = re.sub(r"[^\w.=,+-]+", "_", readable)[:120]
    return f"{readable}-{_hash(said)}"


def _brief(text: str) -> str:
    """A number with many digits by its first four."""
    return f"{float(text):.4g}" if re.fullmatch(r"[-+\d.e]{9,}", text) and "." in text else text


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def place(
    config: str | None, several: Sequence[str], first: Config, base: Mapping[str, Any], swept: Sequence[Dimension],
    told: Sequence[str], search: str,
) -> Path:  # fmt: skip
    """Return the sweep's folder: output_dir=…, the config's own output_dir, or runs/sweep-<config>-<hash>.

    The hash is of what all jobs share: a sweep with one value more finds what is done already.
    """
    if told:
        return Path(told[-1].partition("=")[2]).expanduser()
    name = Path(str(config)).stem if config and Path(config).is_file() else (config or "run")
    if first.output_dir != f"runs/{name.replace('/', '-')}-seed{first.seed}" and not several:
        return Path(str(first.output_dir))
    text = json.dumps([several or config, sorted(base["overrides"]), [d.key for d in swept], search])
    return Path("runs") / f"sweep-{'configs' if several else name.replace('/', '-')}-{_hash(text)}"


def _look(found: Sequence[Config]) -> None:
    """Find each model and each data file of the configs, without loading one."""
    from zoft.data.tasks import check_task
    from zoft.models import load
    from zoft.models.load import find_model
    from zoft.run.tracker import require_tracker

    for model in dict.fromkeys(c.model for c in found):
        load.check_model(find_model(model))
    seen = []
    for config in found:
        require_tracker(config.track)
        if config.task not in seen:
            check_task(config.task)
            seen.append(config.task)


def write_down(made: Plan, names: Sequence[str]) -> None:
    """Make the folders of jobs, each with its config.yaml, and add them to the plan on disk."""
    from zoft.train.resolve import absolute_paths

    for name in names:
        config, _ = made.jobs[name]
        folder = made.root / name
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "ledger").exists():  # keys of the machine may have changed since it was planned
            mine = absolute_paths(dataclasses.replace(config, output_dir=str(folder.absolute())))
            write(folder / "config.yaml", to_yaml(mine))
    before = read_plan(made.root) if (made.root / PLAN).exists() else {"jobs": {}}
    jobs = before["jobs"] | {name: made.jobs[name][1] for name in names}
    swept = list(dict.fromkeys([*before.get("swept", ()), *(d.key for d in made.swept)]))
    write(made.root / PLAN, json.dumps({**made.base, "swept": swept, "jobs": jobs}, indent=1) + "\n")


def read_plan(root: str | Path) -> dict[str, Any]:
    """Return sweep.json's content: {config, overrides, swept: [keys], jobs: {name: {key: text}}}."""
    path = Path(root) / PLAN
    if not path.is_file():
        raise UserError(f"{root}: not a sweep's folder (it has no {PLAN})")
    try:
        found = json.loads(read_bytes(path, PLAN_BYTES, "it is no sweep's plan"))
        assert isinstance(found["swept"], list) and all(isinstance(k, str) for k in found["swept"])
        rows = found["jobs"].values()
        assert all(isinstance(row, dict) and all(isinstance(v, str) for v in row.values()) for row in rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
        raise UserError(
            f"{path}: damaged; the sweep's own command writes it again once it is deleted"
        ) from None
    for name in found["jobs"]:  # a job is a folder in the sweep's own
        if (
            name != Path(name).name
            or name in ("", ".", "..")
            or "\0" in name
            or len(name.encode(errors="replace")) > 255
        ):
            raise UserError(
                f"{path}: {name[:100]!r} is no name of a job: it would be outside of {root}; delete that entry"
            )
    return found


@dataclass(frozen=True)
class Launch:
    """Say how jobs are run: run(root, names, extra, say) returns once none of them goes on; slots at a time."""

    run: Callable[[Path, Sequence[str], Sequence[str], Callable[[str], Any]], None]
    slots: int


def sweep(made: Plan, launch: Launch, say: Callable[[str], Any]) -> None:
    """Run what is not done yet, of a plan's jobs. Raises Interrupted when stopped; failures are left in the jobs."""
    with hold(made.root):
        write_down(made, list(made.jobs))
        todo = missing(made.root, list(made.jobs), say)
        if todo:
            launch.run(made.root, todo, made.extra, say)


def missing(root: Path, names: Sequence[str], say: Callable[[str], Any]) -> list[str]:
    """Return the jobs that are neither done nor cancelled, those that began first."""
    states = {name: job_state(root / name) for name in names}
    count = {s: list(states.values()).count(s) for s in STATES}
    say(
        f"{root}: {len(names)} jobs" + "".join(f", {n} {s}" for s, n in count.items() if n and s != "pending")
    )
    if count["cancelled"]:
        left = next(name for name, s in states.items() if s == "cancelled")
        say(f"cancelled jobs are left out; delete {root / left}/cancelled to have that one run")
    order = {"running": 0, "stopped": 1, "failed": 2, "pending": 2}
    return sorted((n for n in names if states[n] in order), key=lambda n: order[states[n]])


class hold:
    """Hold the lock of a sweep, for one parent at a time; a mark that it was cancelled goes away with its start."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> None:
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        fd = job.hold(self.root)
        if fd is None:
            raise UserError(
                f"{self.root}: another `zoft sweep` is at work on it; look with `zoft sweep --status {self.root}`"
            )
        self.fd = fd
        (self.root / "cancelled").unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def in_background(root: Path, arguments: Sequence[str]) -> str:
    """Start this command again in the background, its output in a log; returns a line about it."""
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with (root / "sweep.log").open("ab") as log:
            process = subprocess.Popen(
                zoft_command("sweep", *arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
    return (
        f"process {process.pid} in the background, its log in {root / 'sweep.log'}; "
        f"`zoft sweep --status {root}`, `--cancel {root}`"
    )
