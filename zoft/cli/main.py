"""The verbs of `zoft`. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from zoft import __version__
from zoft.cli.app import Verb, Verbs
from zoft.console import lasting
from zoft.errors import UserError

app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# `--lr 3` reaches parse(), which says what to write instead.
_LOOSE = {"ignore_unknown_options": True}

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)]
Args = Annotated[list[str] | None, typer.Argument(metavar="[RUN] [KEY=VALUE]...", show_default=False)]
Source = Annotated[
    str | None, typer.Option("--config", "-c", metavar="NAME|FILE", help="A packaged config or a .yaml file.")
]
Page = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE.py", help="A recipe's page of your own; runs FILE.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: where it ran.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zoft {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models with forward passes only."""


@app.command(cls=Verb, context_settings=_LOOSE)
def train(
    overrides: Overrides = None,
    config: Source = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; train nothing.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a stopped run.")] = None,
    nproc: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that share each step (a GPU each, if any).")
    ] = 1,
    reward: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNCTION", help="Maximise a reward of your own; runs FILE.")
    ] = None,
    recipe: Page = None,
) -> None:
    """Fine-tune a model: zoft train --config mezo/reviews lr=1e-5."""
    from zoft.method.configured import compose, load_run
    from zoft.parallel.launch import process_place, start_elastic, start_processes
    from zoft.replay.saved_model import plan_text, result_summary
    from zoft.run.preflight import first_look
    from zoft.run.start import train_run

    code = {
        "reward": reward,
        "recipe": recipe,
    }  # what runs code is said on the command line, again on a resume
    mine = [f"{key}={value}" for key, value in code.items() if value]
    overrides = [*(overrides or []), *mine]
    if resume is None:
        resolved = compose(config, overrides or [])
    elif config:
        raise UserError(f"--config {config}: a resumed run keeps its own config; leave --config out")
    else:
        others = [text for text in overrides if text not in ("trust_remote_code=true", *mine)]
        if others and others[0].startswith("threads="):
            raise UserError(
                f"{others[0]}: other threads round losses otherwise, and a resumed run ends in the bits of one that never "
                f"stopped; if its speed matters more, write {others[0].replace('=', ': ')} into {resume}/config.yaml"
            )
        if others:
            raise UserError(f"{others[0]}: a resumed run keeps its own config; leave {', '.join(others)} out")
        resolved = load_run(resume, overrides or [])
    if nproc > 1 and not dry_run:
        first_look(resolved, resume, dry_run)
        given = [
            *[text for text in overrides if text not in mine],
            *[word for key, value in code.items() if value for word in (f"--{key}", value)],
            *(["--config", config] if config else []),
            *(["--resume", resume] if resume else []),
        ]
        begin = start_elastic if resolved.elastic else start_processes
        raise typer.Exit(begin(nproc, ["train", *given], str(resume or resolved.output_dir)))
    result = train_run(resolved, resume=resume, dry_run=dry_run)
    if process_place()[0] == 0:
        typer.echo(plan_text(result) if dry_run else result_summary(result))


@app.command(cls=Verb)
def join(
    place: Annotated[str, typer.Argument(metavar="RUN|HOST:PORT")],
    secret: Annotated[
        str | None, typer.Option(metavar="FILE", help="A copy of the run's join.json, for HOST:PORT.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the run's model.")
    ] = False,
) -> None:
    """Work for a run with elastic=true, from now until it ends: zoft join runs/mine."""
    from zoft.cli.join import join_run

    typer.echo(join_run(place, secret, trust_remote_code))


@app.command(cls=Verb, context_settings=_LOOSE)
def sweep(
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUES]...", show_default=False)] = None,
    config: Source = None,
    launcher: Annotated[str, typer.Option(metavar="local|slurm", help="Where jobs run.")] = "local",
    jobs: Annotated[int | None, typer.Option(help="Jobs at a time; default: one a GPU, else 1.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background.")] = False,
    slurm: Annotated[
        str | None, typer.Option(metavar="FILE", help="Slurm options; single ones: slurm.time=2:00:00.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Search with Optuna, so many trials.")] = None,
    metric: Annotated[str | None, typer.Option(help="Best by this; default: accuracy or loss.")] = None,
    direction: Annotated[str | None, typer.Option(metavar="minimize|maximize", help="Of the metric.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the results.")] = None,
    status: Annotated[str | None, typer.Option(metavar="DIR", help="Which jobs are done.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show --status until all has ended.")] = False,
    cancel: Annotated[str | None, typer.Option(metavar="DIR", help="Stop all jobs, or those named.")] = None,
    results: Annotated[str | None, typer.Option(metavar="DIR", help="Table, results.csv, best.yaml.")] = None,
    recipe: Page = None,
    as_json: Json = False,
) -> None:
    """Run a config with many values: zoft sweep --config mezo/reviews lr=1e-4,5e-4 'seed=range(0,3)'."""
    from zoft.sweep.command import Asked, run_sweep_command

    asked = Asked(
        config, launcher, jobs, detach, slurm, trials, metric, direction, plot, status, watch, cancel, results,
        as_json,
    )  # fmt: skip
    run_sweep_command(asked, _with(words, recipe), typer.echo)


@app.command(cls=Verb, context_settings=_LOOSE)
def bench(
    overrides: Overrides = None,
    config: Source = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Only this row; repeatable.")] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Only these tasks.")] = "",
    seeds: Annotated[int | None, typer.Option(help="The first so many of the file's seeds.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the runs.")] = 1,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Also lay each row's steps beside the true gradient.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; run nothing.")] = False,
    worker: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """Rank configs on tasks at equal forwards: zoft bench --config bench/estimators --tasks reviews --seeds 3."""
    from zoft.bench.command import Asked, run_bench_command

    asked = Asked(config, only or (), tasks, seeds, jobs, gradient, dry_run, worker)
    run_bench_command(asked, overrides or [], typer.echo, lambda line: typer.echo(line, err=True))


@app.command("eval", cls=Verb, context_settings=_LOOSE)
def evaluate(
    args: Args = None,
    config: Source = None,
    as_json: Json = False,
    examples: Annotated[
        str | None,
        typer.Option(metavar="FILE.jsonl", help="Write a line an example: scores, prediction, right."),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Of the bootstrap that gives 95 % intervals; 0 gives none.")
    ] = 1000,
    reward: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Judge texts by a reward of your own; runs FILE."),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness instead: arc_easy,boolq."),
    ] = None,
    lm_eval_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where task files of your own are.")
    ] = None,
) -> None:
    """Evaluate a run's model, any model or an adapter: zoft eval runs/mine; zoft eval DIR --config mezo/reviews."""
    from zoft.cli.eval import GIVE, evaluate_config, evaluated_config, evaluation_text, harness

    # A sweep's folders are named lr=0.001-…: a path that exists is no key.
    folders = [a for a in args or [] if os.path.exists(a) or ("=" not in a and not a.startswith("-"))]
    overrides = [a for a in args or [] if a not in folders]
    overrides += [f"reward={reward}"] if reward else []
    if len(folders) > 1:
        raise UserError(f"eval: {GIVE}")
    resolved, adapter = evaluated_config(folders[0] if folders else None, config, overrides)
    if lm_eval is not None:
        if examples is not None:
            raise UserError(f"--examples {examples}: is not of --lm-eval; leave one of them out")
        if reward is not None:
            raise UserError(f"--reward {reward}: is not of --lm-eval; leave one of them out")
        results, shown = harness(resolved, adapter, lm_eval, lm_eval_path)
        typer.echo(json.dumps(results) if as_json else shown)
        return
    if lm_eval_path is not None:
        raise UserError(f"--lm-eval-path {lm_eval_path}: does nothing without --lm-eval TASKS")
    found = evaluate_config(resolved, adapter, resamples=resamples, out=examples)
    typer.echo(json.dumps(found) if as_json else evaluation_text(found))


@app.command(cls=Verb, context_settings=_LOOSE)
def baseline(
    overrides: Overrides = None,
    config: Source = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="zero-shot, icl, calibrated, sfc, linear-probe, first-order, first-order-lora, checkpointed-lora, "
            "forward-gradient.",
        ),
    ] = "zero-shot",
    demos: Annotated[int | None, typer.Option(min=1, help="Demonstrations of icl; default: 32.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Of first-order; default: 3.")] = None,
) -> None:
    """What a model scores without zeroth-order training: zoft baseline --config mezo/reviews --method icl."""
    from zoft.baselines.methods import baseline_settings, baseline_text, run_baseline

    if epochs is not None and not epochs > 0:
        raise UserError(f"--epochs {epochs:g}: must be > 0")
    resolved, ask = baseline_settings(config, overrides or [], method, demos, epochs)
    typer.echo(baseline_text(run_baseline(resolved, ask)))


@app.command(cls=Verb)
def replay(
    folder: Annotated[str, typer.Argument(metavar="RUN")],
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the model is written; without it, what would be made."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="The model after so many steps; default: the last.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="fp32", help="Keep 16-bit weights in fp32: nothing is rounded.")
    ] = None,
    denoise: Annotated[
        bool, typer.Option("--denoise", help="Sum in fp32, round to the run's storage once.")
    ] = False,
    device: Device = None,
    recipe: Page = None,
) -> None:
    """Rebuild a run's model from its base and its ledger, bit for bit."""
    from zoft.cli.replay import replay_run_folder

    typer.echo(
        replay_run_folder(
            folder, out, step=step, storage=storage, denoise=denoise, device=device, recipe=recipe
        )
    )


@app.command(cls=Verb)
def export(
    folder: Annotated[str, typer.Argument(metavar="RUN")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where it is written.")],
    merge: Annotated[bool, typer.Option("--merge", help="The whole model, for transformers.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="What was trained beside it, for PEFT.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; default: the run's save_dtype.")
    ] = None,
    device: Device = None,
    recipe: Page = None,
) -> None:
    """Write a run's model as others load it, and check it: zoft export runs/mine --merge --out mine."""
    from zoft.cli.replay import export_run

    typer.echo(
        export_run(folder, out, merge=merge, adapter=adapter, dtype=dtype, device=device, recipe=recipe)
    )


@app.command(cls=Verb)
def ledger(
    folder: Annotated[str, typer.Argument(metavar="RUN")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the ledger, its config and snapshots.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw losses and coefficients of all steps.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run's ledger holds, also while the run goes on: steps, losses, coefficients, events, base, plan."""
    from zoft.cli.ledger import ledger_json, ledger_summary, ledger_text, plot_ledger, verify_ledger

    found = ledger_summary(folder)
    checks = verify_ledger(folder) if verify else []
    if as_json:
        typer.echo(ledger_json({**found, "verified": checks} if verify else found))
    else:
        typer.echo("\n".join([ledger_text(found), *checks]))
    if plot:
        typer.echo(plot_ledger(folder, plot), err=as_json)


@app.command(cls=Verb)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...")],
    metrics: Annotated[str, typer.Option(help="Which metrics: accuracy,auc; default: all there are.")] = "",
    csv: Annotated[str | None, typer.Option(metavar="FILE.csv", help="Write the table there too.")] = None,
    png: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw metrics against forwards.")
    ] = None,
) -> None:
    """One table of runs, or of all below a folder, mean ± sd over seeds: zoft report runs --png curve.png."""
    from zoft.report.table import report_runs

    asked = [m for m in metrics.replace(",", " ").split() if m]
    typer.echo(report_runs(runs, asked, csv_to=csv, png_to=png))


@app.command("ls", cls=Verb)
def list_configs() -> None:
    """List the packaged configs."""
    from zoft.config.compose import BENCH, describe, names

    titles = {"zoft train --config NAME": "", "zoft bench --config NAME": BENCH, "model=NAME": "model",
              "task=NAME": "task"}  # fmt: skip
    for title, group in titles.items():
        typer.echo(title)
        for name in names(group):
            whole = f"{group}/{name}" if group else name
            typer.echo(f"  {whole if group == BENCH else name:20} {describe(whole)}")


@app.command(cls=Verb)
def cp(name: str, dest: str) -> None:
    """Copy a packaged config, to make it your own: zoft cp mezo/reviews my.yaml."""
    from zoft.config.compose import BENCH, GROUPS, names, nearest, packaged

    known = names() + [f"{group}/{n}" for group in (*GROUPS, BENCH) for n in names(group)]
    if name not in known:
        near = nearest(name, known)
        raise UserError(
            f"{name}: no such config; {f'did you mean {near}?' if near else '`zoft ls` lists them'}"
        )
    target = Path(dest) / f"{Path(name).name}.yaml" if Path(dest).is_dir() else Path(dest)
    if target.suffix != ".yaml":
        raise UserError(f"{dest}: give a folder that exists, or a name that ends in .yaml")
    if target.exists():
        raise UserError(f"{target} exists: choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(packaged("configs") / f"{name}.yaml", target)
    verb = "train" if name in names() else "bench" if name.startswith(f"{BENCH}/") else ""
    typer.echo(f"{target}: zoft {verb} --config {target}" if verb else str(target))


@app.command(cls=Verb, context_settings=_LOOSE)
def validate(overrides: Overrides = None, config: Source = None, recipe: Page = None) -> None:
    """Check a config and print it resolved; loads no model and no data."""
    from zoft.config.compose import to_yaml
    from zoft.method.configured import compose

    typer.echo(to_yaml(compose(config, _with(overrides, recipe))), nl=False)


@app.command(cls=Verb, context_settings=_LOOSE)
def estimate(
    overrides: Overrides = None, config: Source = None, recipe: Page = None, as_json: Json = False
) -> None:
    """Say what a run would take, memory and time a step, without loading weights."""
    from zoft.method.configured import compose

    resolved = compose(config, _with(overrides, recipe))
    from zoft import console
    from zoft.run.estimate import estimate_run, estimate_text
    from zoft.train.resolve import allowed_steps

    found = estimate_run(allowed_steps(resolved))
    typer.echo(json.dumps(console.finite(found)) if as_json else estimate_text(found))


@app.command(cls=Verb, context_settings=_LOOSE)
def lr(
    overrides: Overrides = None,
    config: Source = None,
    recipe: Page = None,
    png: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the line there too.")] = None,
    as_json: Json = False,
) -> None:
    """Show the losses along a run's first steps and the lr that lr=auto takes: zoft lr --config mezo/reviews."""
    from zoft.cli.lr import draw_line, line_json, line_text, measure_lr
    from zoft.method.configured import compose

    resolved = compose(config, _with(overrides, recipe))
    if png:
        from zoft.pictures import pyplot, refuse_other_ends

        pyplot("--png")
        refuse_other_ends("--png", Path(png))
    from zoft import console

    line = measure_lr(resolved)
    typer.echo(json.dumps(console.finite(line_json(line))) if as_json else line_text(line, resolved.lr))
    if png:
        draw_line(line, png)
        typer.echo(png, err=as_json)


@app.command(cls=Verb, context_settings=_LOOSE)
def data(
    overrides: Overrides = None,
    config: Source = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many examples.")] = 3,
    as_json: Json = False,
) -> None:
    """Show training examples as the model reads them, scored tokens marked, and counts of them all."""
    from zoft.cli.data import show_data
    from zoft.method.configured import compose

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show_data(compose(config, overrides or []), count, typer.echo, as_json=as_json, colour=colour)


@app.command(cls=Verb)
def keys() -> None:
    """List every key with its type, default and meaning."""
    from zoft.config.schema import describe_keys

    typer.echo(describe_keys())


@app.command(cls=Verb)
def env(as_json: Json = False) -> None:
    """Print versions and hardware, for a bug report."""
    from zoft.env import environment

    found = environment()
    typer.echo(json.dumps(found) if as_json else "\n".join(f"{k}: {_flat(v)}" for k, v in found.items()))


def _with(words: list[str] | None, recipe: str | None) -> list[str]:
    """Return the words of a command line, the page of --recipe among them."""
    return [*(words or []), *([f"recipe={recipe}"] if recipe else [])]


def _flat(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def main() -> None:
    """Run the console script."""
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    sys.exit(app())
