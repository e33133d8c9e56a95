"""What all recipes share around the trainer: a run's start, its folder, what is due on the way, and its end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zoft import baseline, compose, guards, processes, results, tracking
from zoft.config import ADAPTERS, Config
from zoft.config_check import check_elastic
from zoft.config_digest import changed
from zoft.due import due, next_stop
from zoft.errors import UserError, writing
from zoft.folder import Presence, alone, kept, refuse_unwritable, write
from zoft.stop import Stop, listening
from zoft.tracking import logged
from zoft.yamlfile import yaml_tree

if TYPE_CHECKING:
    from zoft.ledger import Ledger, Log
    from zoft.trainer import Trainer

OURS = (
    "config.yaml",
    "ledger",
    "metrics.jsonl",
    "result.json",
    "baseline.json",
    "env.json",
    "model",
    "adapter",
    "start.safetensors",
    "snapshots",
)

# What drivers make in /dev: NVIDIA's, WSL's, Jetson's, AMD's.
DRIVERS = ("nvidiactl", "nvidia0", "dxg", "nvmap", "nvhost-gpu", "kfd")

# What another number of processes resolves anew where it was `auto`: no weight depends on it beyond rounding.
ELSEWHERE = ("threads", "hold_probe")

# What it means where a resumed run's ledger says something else.
DIFFERS = {
    "base": "starts from other weights ({found}) than this model has ({value})",
    "data": "was begun on other training data: put back what was changed there",
    "rows": "was begun on rows with other columns or answers: put back what was changed there",
    "noise_version": "has noise of version {found}, this zoft makes version {value}: use the zoft that wrote it",
    "adapter": "starts from an adapter ({found}) that is not made here ({value}): put back start.safetensors",
}


def train(config: Config, *, resume: str | Path | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Run a config's recipe: a new run in config.output_dir, or the rest of the run in `resume`.

    Returns result.json's content. Raises UserError before anything heavy where a mistake shows early.
    """
    if resume and (Path(resume) / "result.json").exists():
        found = results.outcome(Path(resume))
        print(f"{resume}: this run is finished; its result follows", file=sys.stderr)
        return found
    if resume and (Path(resume) / baseline.ASKED).exists():
        raise UserError(
            f"{resume}: a baseline, which is not resumed; delete it and start `zoft baseline` again"
        )
    rewarded(config, resume)
    folder = str(resume or config.output_dir)
    if config.elastic:
        check_elastic(config)
        config = dataclasses.replace(
            config, probes_per_forward=1
        )  # a pair of a probe and a batch is a forward
    elif config.listen != "127.0.0.1:0":
        raise UserError(f"listen={config.listen}: is for elastic=true; leave it out")
    writes = processes.place()[0] == 0  # of several processes, one does
    if writes and resume is None and not dry_run:
        claim(Path(folder))
    mine = alone(Path(folder), resume is None) if writes and not dry_run else nullcontext()
    # A signal that comes while things load says "resume me", too.
    with listening(folder), guards.memory(config), mine:
        if writes:
            first_look(config, resume, dry_run)
        from zoft import distributed

        with distributed.joined(config, folder):
            config = resolved_anew(config, resume)
            return recipe(config.recipe).run(within(absolute(config)), resume=resume, dry_run=dry_run)


def resolved_anew(config: Config, resume: str | Path | None) -> Config:
    """Of a resumed run, what was `auto` and decides no weight is `auto` again where another number of processes goes on:
    each has its share of this machine. What config.yaml was given by hand since stays."""
    from zoft import distributed

    world = distributed.current()
    path = Path(resume or "") / "env.json"

    def began() -> dict[str, Any]:
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_bytes())
            if isinstance(found, dict) and isinstance(found.get("auto"), dict):
                return found
        return {}

    found = world.told(began) if resume else {}
    if found.get("processes", world.size) == world.size:
        return config
    now: dict[str, Any] = {
        k: "auto" for k in ELSEWHERE if k in found["auto"] and found["auto"][k] == getattr(config, k)
    }
    return dataclasses.replace(config, **now)


def first_look(config: Config, resume: str | Path | None, dry_run: bool) -> None:
    """Raise UserError for what can be seen before anything heavy loads."""
    from zoft import checkpoint, models, tasks

    tracking.require(config.track)
    devices(config)
    if resume is None and not dry_run:
        claim(Path(str(config.output_dir)))
    if resume and (Path(resume) / "ledger").exists():  # damage shows before weights load
        from zoft import inspect_run, ledger

        inspect_run.sound(resume, ledger.read(Path(resume) / "ledger"))
    models.check(source := models.resolve(config.model))
    blocks, last = models.blocks(source), re.fullmatch(r"last-(\d+)", config.train)
    if blocks and last and int(last[1]) > blocks:
        raise UserError(f"train={config.train}: the model has {blocks} blocks; use last-1 to last-{blocks}")
    if config.adapter:
        checkpoint.adapter(config.adapter, Path(config.adapter).expanduser())
    tasks.look(config.task)


def devices(config: Config) -> None:
    """Refuse CUDA where no driver has left its file in /dev; whatever is subtler shows once torch is there."""
    if config.device.startswith("cuda") and sys.platform.startswith("linux"):
        if not any(Path("/dev", name).exists() for name in DRIVERS):
            raise UserError(f"device={config.device}: no CUDA devices here; use device=cpu or device=auto")


def rewarded(config: Config, resume: str | Path | None, *, must: bool = True) -> None:
    """Refuse a reward that is not there, and to train on one (must) that is not named on the command line."""
    if must and config.objective == "reward" and config.reward is None:
        if resume:
            raise compose.again(resume)
        raise UserError("objective=reward: name the function: --reward my_reward.py:score")
    if config.reward is not None:
        from zoft import reward as rewards

        rewards.look(config.reward)


def within(config: Config) -> Config:
    """The config with as many steps as `max_forwards` allows. Raises UserError if it allows none."""
    if config.max_forwards is None:
        return config
    each = 2 * config.q * config.batch_size * config.accumulate
    steps = min(config.steps, config.max_forwards // each)
    if not steps:
        raise UserError(
            f"max_forwards={config.max_forwards}: a step takes {each}; allow more, or lower q or batch_size"
        )
    if steps < config.steps:
        print(f"max_forwards={config.max_forwards}: {steps} steps of {each} forwards", file=sys.stderr)
    for name in ("warmup", "snapshot_every"):
        if getattr(config, name) > steps:
            raise UserError(
                f"{name}={getattr(config, name):g}: more than the {steps} steps that max_forwards allows"
            )
    return dataclasses.replace(config, steps=steps)


def plain(config: Config) -> Config:
    """The config of the base alone, without the adapter that it would train (but with one that it starts from)."""
    return dataclasses.replace(config, train="all") if config.train in ADAPTERS else config


def recipe(name: str) -> ModuleType:
    """The module of a recipe, by its file: recipes/ is zoft/recipes once installed, top-level in a source tree."""
    full = f"zoft.recipes.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, compose.packaged("recipes") / f"{name}.py")
        assert spec and spec.loader, full
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full]
            raise
    return sys.modules[full]


def claim(folder: Path) -> None:
    """Refuse a folder that holds a run, or files that a run would overwrite."""
    refuse_unwritable("output_dir", folder)
    if (folder / "ledger").exists():
        raise UserError(
            f"output_dir={folder}: it holds a run; continue it with `zoft train --resume {folder}`, "
            "or choose another name with output_dir=…"
        )
    taken = [name for name in OURS if (folder / name).exists()]
    if taken:
        raise UserError(f"output_dir={folder}: {taken[0]} is in the way; choose another name")


def absolute(config: Config) -> Config:
    """Paths made absolute, so that a run resumes from any folder."""

    def fixed(text: str | None) -> str | None:
        return str(Path(text).expanduser().resolve()) if text and Path(text).expanduser().exists() else text

    from zoft.models import PACKAGED

    task = dataclasses.replace(config.task, train=fixed(config.task.train), eval=fixed(config.task.eval))
    model = config.model if config.model in PACKAGED else str(fixed(config.model))
    reward = config.reward
    if reward is not None:
        place, _, function = reward.rpartition(":")
        reward = f"{fixed(place)}:{function}"
    return dataclasses.replace(config, model=model, adapter=fixed(config.adapter), task=task, reward=reward)


@dataclass
class Session:
    """An open run: its folder, its ledger, and where its metrics go."""

    folder: Path
    ledger: Ledger
    tracker: tracking.Tracker
    config: Config
    stop: Stop


@contextmanager
def session(config: Config, header: Mapping[str, Any], resume: str | Path | None) -> Iterator[Session]:
    """Make or reopen a run's folder and ledger; everything is closed at the end.

    config: with nothing `auto` left; a new run's config.yaml keeps it. header: of the ledger; a resumed run's
    must agree with it. Raises UserError for another base, another plan, or a damaged ledger; Stopped on a signal.
    """
    from zoft import distributed
    from zoft.env import environment
    from zoft.ledger import Ledger

    world = distributed.current()
    folder, first = Path(resume or str(config.output_dir)), world.rank == 0
    if not first:
        ledger = world.ledger(None)
    elif resume and (folder / "ledger").exists():
        ledger = Ledger.open(folder / "ledger", sync=config.sync)
    else:
        if resume is None:  # another run may have begun there while the model was loading
            claim(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.yaml", compose.to_yaml(config))
        place = {"processes": world.size, "auto": world.auto}
        write(folder / "env.json", json.dumps(environment() | place, indent=2) + "\n")
        ledger = Ledger.create(folder / "ledger", dict(header), sync=config.sync)
    with kept(ledger), ledger, listening(str(folder)) as stop:
        if first:
            world.ledger(ledger)
        world.stop = stop
        agree(ledger.header, header, folder)
        with tracking.Tracker(
            folder if first else None, config.steps, track=config.track, config=dataclasses.asdict(config),
            resume_step=ledger.last_step + 1, known=steps_of(ledger, config), device=config.device,
        ) as tracker:  # fmt: skip
            try:
                yield Session(folder, ledger, tracker, config, stop)
            finally:  # steps that were under way when something stopped the run; what does not fit, a resume fills in
                with suppress(UserError):
                    tracker.fill(steps_of(ledger, config))


def steps_of(ledger: Ledger, config: Config) -> list[dict[str, Any]]:
    """The metrics of the steps that a ledger has."""
    from zoft.trainer import metrics_of

    return [metrics_of(record, config.eps) for record in ledger.records]


def agree(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue or replay a ledger on anything but what it was written on."""
    for name, value in wanted.items():
        if name in ("zoft", "plan", "reward") or name not in found or found[name] == value:
            continue
        other = DIFFERS.get(name, f"was written with {name}={found[name]}, not {value}")
        if name == "config":
            keys = changed(found[name], value)
            if not keys:  # a zoft that knows other keys
                continue
            other = f"was begun with another {', '.join(keys)} than config.yaml has now: put back what it was"
        if name == "trained":
            names = [n for n in {**found[name], **value} if found[name].get(n) != value.get(n)]
            other = f"trains other tensors than this model has now, {names[0]} among them"
        raise UserError(f"{folder}: its ledger {other.format(found=found[name], value=value)}")


def fit(
    trainer: Trainer, s: Session, evaluate: Callable[[], dict[str, Any]], dev: Callable[[], dict[str, Any]] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Catch up with the ledger, train to the end with whatever is due on the way, and return the result.

    evaluate() -> metrics of the weights as they are; dev() -> those on the dev set, where there is one.
    `before` is the base's, kept by metrics.jsonl on resume.
    """
    from zoft import distributed, replay, selection, snapshot
    from zoft.ledger import Event, Log
    from zoft.stop import Stopped

    config, t, world = s.config, s.tracker, distributed.current()
    known, past = world.told(lambda: before(s.folder))
    evals: dict[int, dict[str, Any]] = dict(known)

    def scored(step: int) -> dict[str, Any]:
        return world.told(
            lambda: selection.score(config, evals, step, evaluate, dev)
        )  # by rank 0; the others wait

    if 0 not in evals:
        evals[0] = scored(0)
        t.evaluation(0, evals[0])
    if line := selection.note(config, evals):
        t.note(line)
    snapshot.check_metric(config, evals[0])
    log = Log(s.ledger.header, s.ledger.records, s.ledger.events)  # the ledger's own lists: they grow
    catch_up(trainer, s.folder, config, log, t.note)
    watch = guards.Watch(config, trainer.axis.trained, steps_of(s.ledger, config))
    cores = guards.cores(config, world.size)
    folder = Presence(s.ledger, {"config.yaml": compose.to_yaml(config)})

    def on_step(metrics: dict[str, Any]) -> None:
        seconds = past + time.monotonic() - began - paused
        lines = watch.see(metrics) + cores.step()
        t.step(metrics.pop("step"), **metrics, seconds=round(seconds, 3))
        for line in lines:
            t.note(line)
        if world.rank == 0:
            folder.look()
        if trainer.settings.probes_per_forward != s.config.probes_per_forward:  # a batch could not be stacked
            s.config = dataclasses.replace(s.config, probes_per_forward=trainer.settings.probes_per_forward)
            if world.rank == 0:  # on resume, too, for the same bits
                write(s.folder / "config.yaml", compose.to_yaml(as_begun(s)))
        if world.size == 1:  # else all stop after the same step, by trainer.halted
            s.stop.check()

    def at_stop(step: int) -> None:
        s.ledger.sync()  # nothing durable is ever ahead of the ledger
        noted = {e.kind for e in s.ledger.events if e.step == step}  # a run that stopped here has done these
        for what in due(config, step):
            if what == "denoise" and what not in noted:
                s.ledger.note(Event("denoise", step))  # first, as with steps: from here on it is a fact
                t.note(replay.denoise(s.folder, config, log, step, trainer.axis.trained))
            elif what == "eval" and step not in evals:
                evals[step] = scored(step)
                t.evaluation(step, evals[step])
            elif what == "snapshot" and what not in noted and world.rank:
                s.ledger.note(Event("snapshot", step))
            elif what == "snapshot" and what not in noted:
                t.note(snapshot.take(s.folder, s.ledger, trainer.axis.trained))
                snapshot.prune(s.folder, config, s.ledger.events, evals)
        if {"snapshot", "denoise"} & {*due(config, step)}:
            world.told(lambda: None)  # however long it takes: a wait for losses has an end

    world.check(trainer.next, trainer.axis.trained)
    at_stop(trainer.next)
    began, paused = time.monotonic(), 0.0
    cores.paused()
    while trainer.next < config.steps and not selection.stops(config, evals):
        with s.stop.finishing():
            trainer.run(on_step, until=next_stop(config, trainer.next, world.size))
        if trainer.halted:
            raise Stopped(0, str(s.folder))
        pause = time.monotonic()
        if trainer.next == config.steps or (config.check_every and not trainer.next % config.check_every):
            world.check(trainer.next, trainer.axis.trained)
        if due(config, trainer.next):
            at_stop(trainer.next)
        paused += time.monotonic() - pause
        t.paused()
        cores.paused()
    trainer.end()
    seconds = past + time.monotonic() - began - paused
    several: dict[str, Any] = {"processes": world.size, "wire_bytes": world.sent} if world.size > 1 else {}
    last = trainer.next
    if not selection.tested(evals[last]):  # an early end, judged on the dev set so far
        evals[last] = {**world.told(evaluate), **evals[last]}
        t.evaluation(last, evals[last])
    chosen = selection.best(config, evals) if config.save_best else last
    if not selection.tested(evals[chosen]):
        back = world.told(
            lambda: selection.look_back(config, s.folder, chosen, trainer.axis.trained, evaluate)
        )
        evals[chosen] = {**back, **evals[chosen]}
    if last < config.steps:
        several["stopped_early"] = True
        t.note(
            f"early_stop={config.early_stop}: nothing better than at step {selection.best(config, evals)}; stopped"
        )
    if config.save_best:
        several |= {"best_step": chosen, "last": evals[last]}
    return {
        **several,
        "steps": last,
        "skipped": sum(r.skipped for r in s.ledger.records),
        "forwards": last * 2 * config.q * config.batch_size * config.accumulate,
        "train_seconds": round(seconds, 3),
        "peak_memory_gb": round(tracking.peak_memory_gb(config.device), 2),
        "before": evals[0],
        "after": evals[chosen],
    }


def as_begun(s: Session) -> Config:
    """A run's config with those keys as its config.yaml has them that another number of processes resolves for itself."""
    path = s.folder / "config.yaml"
    tree = yaml_tree(path) if path.is_file() else {}
    return dataclasses.replace(s.config, **{k: tree[k] for k in ELSEWHERE if k in tree})


def before(folder: Path) -> tuple[list[tuple[int, dict[str, Any]]], float]:
    """Of a run's metrics.jsonl: its evaluations with their steps, and the seconds that training took so far."""
    seen = logged(folder / "metrics.jsonl")
    past = next((row["seconds"] for row in reversed(seen) if "seconds" in row), 0.0)
    return [(row["step"], row["eval"]) for row in seen if "eval" in row], past


def catch_up(trainer: Trainer, folder: Path, config: Config, log: Log, say: Callable[[str], Any]) -> None:
    """Bring the weights to the log's last step: the newest sound snapshot, then what came after it."""
    from zoft import replay, snapshot

    records = log.records
    found = snapshot.newest(folder, log.header, log.events, say=say)
    if found:
        step, path = found
        say(f"starting from the snapshot at step {step}")
        snapshot.load(path, trainer.axis.trained, step)
        trainer.skip_to(step, records)
    if trainer.next < len(records):
        say(f"replaying {len(records) - trainer.next} of {config.steps} steps from the ledger")
    # The last denoising makes all earlier roundings void.
    denoised = max((e.step for e in log.events if e.kind == "denoise"), default=0)
    if trainer.next < denoised:
        trained = trainer.axis.trained
        if not config.momentum:  # with it, only these steps give the buffers
            for t in trained:
                t.step = denoised if t.stored.element_size() == 2 else t.step
        trainer.replay(records[trainer.next : denoised])
        say(replay.denoise(folder, config, log, denoised, trained))
    trainer.replay(records[trainer.next :])


def finish(s: Session, model: Any, tokenizer: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Save the model and, last of all, result.json: its presence says that the run is complete. Rank 0 alone does."""
    from zoft import distributed

    if distributed.current().rank:
        return result
    Presence(s.ledger, {"config.yaml": compose.to_yaml(s.config)}).look(now=True)
    if s.config.save_model:
        out, best = s.folder / results.folder_name(s.config), result.get("best_step", s.config.steps)
        if best == s.config.steps:
            results.save(s.config, model, tokenizer, out, result)
        else:
            from zoft import selection

            s.ledger.sync()
            selection.save(s.config, s.folder, out, best)
    result = {**result, "output_dir": str(s.folder)}
    write(s.folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result
