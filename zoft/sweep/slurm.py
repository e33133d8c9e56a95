"""A sweep's jobs as an array of a Slurm cluster, submitted by submitit; each goes on from its ledger when requeued."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from zoft.errors import UserError, nearest
from zoft.folder import write
from zoft.limits import read_bytes
from zoft.packages import missing
from zoft.signals import RESUME
from zoft.sweep import job as sweep_job
from zoft.sweep.job import job_state
from zoft.sweep.local import THREAD_VARIABLES, listening, outcome
from zoft.sweep.plan import PLAN_BYTES, Interrupted
from zoft.yaml_files import strict_yaml, yaml_tree

SUBMITTED = "slurm.json"  # in the sweep's folder: which array has which jobs
ARRAY_MAX = 1000  # tasks of an array; Slurm's own default limit (MaxArraySize) is 1001
LOOK_SECONDS = (1.0, 15.0)  # between looks at the queue, first and at most
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of a limit or a pre-emption, where the job may be queued again


@dataclass(frozen=True)
class Slurm:
    """Hold what sbatch is told; on the command line as slurm.KEY=value, in a file for --slurm as KEY: value."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: int | str = 60  # minutes, H:MM:SS or D-HH:MM:SS
    gpus: int = 0  # a job
    cpus: int = 1  # a job
    mem: str | None = None  # 32G
    parallel: int = ARRAY_MAX  # jobs of the array that run at a time
    signal_s: int = 120  # seconds before the limit that a job is told to stop
    setup: list[str] = field(default_factory=list)  # shell lines before a job: module load …
    extra: dict[str, Any] = field(default_factory=dict)  # any other sbatch option: {constraint: a100}


def options(file: str | None, texts: Sequence[str]) -> Slurm:
    """Read Slurm options from a YAML file, with `slurm.KEY=value` on top. Raises UserError for unknown keys, bad values."""
    tree: dict[str, Any] = {}
    if file:
        yaml_tree(Path(file), words=True)  # strictly, for its mistakes
        tree = _words(Path(file).read_text(encoding="utf-8")) or {}
    for text in texts:
        name, _, raw = text.partition("=")
        strict_yaml(raw, text, words=True)
        tree[name.removeprefix("slurm.")] = _words(raw)
    known = {f.name: f for f in dataclasses.fields(Slurm)}
    given = {}
    for name, value in tree.items():
        if name not in known:
            near = nearest(str(name), known)
            hint = (
                f"did you mean slurm.{near}?"
                if near
                else f"use {', '.join(known)}; others go below slurm.extra"
            )
            raise UserError(f"slurm.{name}: {hint}")
        kind = str(known[name].type).partition(" |")[0]
        if kind == "int" and name != "time":
            right = isinstance(value, str) and value.isdigit()
            value = int(value) if right else value
        else:
            right = isinstance(value, {"list[str]": list, "dict[str, Any]": dict}.get(kind, str))
        if not right:
            raise UserError(f"slurm.{name}={value}: expected {kind}")
        given[name] = value
    found = Slurm(**given)
    minutes(found.time)
    return found


def _words(text: str) -> Any:
    """YAML with every scalar as it is written: to YAML 1.1, 2:00:00 is the number 7200."""
    import yaml

    return yaml.load(text, yaml.BaseLoader)


def minutes(value: int | str) -> int:
    """Return a time limit in whole minutes, rounded up, from Slurm's own ways to write it."""
    text = str(value)
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+)(?::(\d+))?", text)
    if not match or (match[1] and not match[2] and match[4]):
        raise UserError(f"slurm.time={value}: use minutes, MM:SS, H:MM:SS or D-HH:MM:SS")
    days, first, middle, last = (int(g) if g else None for g in match.groups())
    if days is not None and first is None:  # D-HH
        seconds = days * 86400 + (middle or 0) * 3600
    elif first is not None and last is None:  # D-HH:MM or MM:SS
        seconds = (
            days * 86400 + first * 3600 + (middle or 0) * 60
            if days is not None
            else first * 60 + (middle or 0)
        )
    elif first is not None:
        seconds = (days or 0) * 86400 + first * 3600 + (middle or 0) * 60 + (last or 0)
    else:
        seconds = (middle or 0) * 60
    if not seconds:
        raise UserError(f"slurm.time={value}: a job needs some time")
    return -(-seconds // 60)


def require() -> Any:
    """Return submitit, on a machine that can submit. Raises UserError where either is missing."""
    try:
        import submitit
    except ImportError:
        raise UserError(missing("--launcher slurm", "submitit")) from None
    for name in ("sbatch", "squeue", "scontrol", "srun"):
        if shutil.which(name) is None:
            raise UserError(f"--launcher slurm: no {name} on this machine; run it where Slurm's commands are")
    return submitit


def run(
    root: Path,
    names: Sequence[str],
    extra: Sequence[str],
    say: Callable[[str], Any],
    *,
    slurm: Slurm,
    detach: bool = False,
) -> None:
    """Submit the jobs that are not in the queue yet, and wait for all of them; detach: do not wait.

    Raises Interrupted on a signal: the jobs stay in the queue.
    """
    active = queue(root)
    new = [n for n in names if n not in active and job_state(root / n) != "running"]
    for first in range(0, len(new), ARRAY_MAX):
        part = new[first : first + ARRAY_MAX]
        say(f"Slurm job {submit(root, part, extra, slurm)}: {len(part)} jobs")
    if detach:
        return
    pause, ended = LOOK_SECONDS[0], set[str]()
    with listening() as got:
        while len(ended) < len(names):
            active = queue(root)
            for name in names:
                state = job_state(root / name)
                if name in ended or name in active or state == "running":
                    continue
                ended.add(name)
                say(f"{len(ended)}/{len(names)} {outcome(root / name)}")
                pause = LOOK_SECONDS[0]
            if got:
                raise Interrupted(
                    f"no longer waiting; the jobs stay in the queue: zoft sweep --status {root}, or --cancel"
                )
            if len(ended) < len(names):
                time.sleep(pause)
                pause = min(pause * 1.2, LOOK_SECONDS[1])
    if (root / "cancelled").exists():
        raise Interrupted(f"cancelled; the same command goes on with {root}")


def submit(root: Path, names: Sequence[str], extra: Sequence[str], slurm: Slurm) -> str:
    """Submit one array with these jobs; returns its id, which slurm.json has then."""
    submitit = require()
    executor = submitit.SlurmExecutor(folder=(root / "slurm").absolute())
    flags = {k: True if v in ("", "true") else v for k, v in slurm.extra.items()}
    told = {"mem": slurm.mem, "gpus-per-node": slurm.gpus or None} | flags
    executor.update_parameters(
        job_name="zoft", partition=slurm.partition, account=slurm.account, qos=slurm.qos, time=minutes(slurm.time),
        cpus_per_task=slurm.cpus, array_parallelism=slurm.parallel, signal_delay_s=slurm.signal_s,
        setup=list(slurm.setup) or None, stderr_to_stdout=True,
        additional_parameters={"requeue": True} | {k: v for k, v in told.items() if v is not None},
    )  # fmt: skip
    folders = [str((root / name).absolute()) for name in names]
    try:
        jobs = executor.map_array(work, folders, [tuple(extra)] * len(folders))
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, RuntimeError) as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--launcher slurm: sbatch refused: {said[-1] if said else error}") from None
    before = submitted(root)
    ids = {name: str(job.job_id) for name, job in zip(names, jobs)}
    write(root / SUBMITTED, json.dumps({**before, **ids}, indent=1) + "\n")
    return ids[names[0]].partition("_")[0]


def submitted(root: Path) -> dict[str, str]:
    """Return {name: Slurm's id of its last submission, 12_3}."""
    try:
        return dict(json.loads(read_bytes(root / SUBMITTED, PLAN_BYTES, "it is no list of jobs")))
    except (UserError, ValueError, TypeError, RecursionError):
        return {}


def queue(root: Path) -> dict[str, str]:
    """Return {name: Slurm's state} of the jobs that wait or run. Raises UserError if Slurm does not answer."""
    ids = submitted(root)
    if not ids:
        return {}
    ask = ["squeue", "--noheader", "--array", "--me", "--format=%F %K %T"]
    for attempt in range(4):  # a controller that restarts is back in a moment
        done = subprocess.run(ask, capture_output=True, text=True)
        if done.returncode == 0:
            break
        time.sleep(2.0 * attempt)
    else:
        raise UserError(
            f"--launcher slurm: squeue: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
        )
    states = {}
    for line in done.stdout.splitlines():
        job, task, state = line.split()[:3]
        states[job if task == "N/A" else f"{job}_{task}"] = state
    return {name: states[i] for name, i in ids.items() if i in states}


def cancel(root: Path, names: Sequence[str]) -> None:
    """Take jobs out of the queue, and stop those that run: they end their step."""
    active, ids = queue(root), submitted(root)
    wanted = [ids[n] for n in names if n in active]
    if wanted:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["scancel", *wanted], capture_output=True)


def work(folder: str, extra: Sequence[str] = ()) -> int:
    """Run a task of the array: begin a job's run or go on with it; returns its exit code.

    A warning (SIGUSR1, SIGUSR2) that stops the run queues the task again, if it got any further; after SIGTERM
    Slurm does that itself where it pre-empts.
    """
    place = Path(folder)
    task = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", ""))
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        task += f"_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job_state(place) in ("done", "running", "cancelled"):
        print(f"{folder}: {job_state(place)} already")
        return 0
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    env = dict.fromkeys(THREAD_VARIABLES, cpus)
    got: list[int] = []
    process: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        got.append(number)
        if process:
            process[0].send_signal(number)

    for number in (*WARNINGS, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    steps = sweep_job.steps(place)
    # In a process group of its own: whether Slurm signals a group or one process, the run gets each signal once.
    begun = sweep_job.start(place, env=env, extra=extra, die_with_me=True, slurm=task)
    if begun is None:
        return 0
    process.append(begun)
    if got:
        begun.send_signal(got[0])
    code = begun.wait()
    warned = [n for n in got if n in WARNINGS]
    again = bool(warned) and code != 0 and not (place / "cancelled").exists()
    if again and sweep_job.steps(place) <= steps and not (place / "result.json").exists():
        again = False
        with (place / "job.log").open("a") as log:
            log.write("error: not one step in the time limit: raise slurm.time\n")
        sweep_job.ended(place, 2)
        return 2
    sweep_job.ended(place, code, signalled=bool(got))
    if again:
        subprocess.run(["scontrol", "requeue", task], check=False)
    return code if code != RESUME else 0
