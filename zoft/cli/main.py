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

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Keys of the config; `zoft keys` lists them.", show_default=False
    ),
]
Args = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [KEY=VALUE]...",
        help="Run or model folder, and keys of the config.",
        show_default=False,
    ),
]
Source = Annotated[
    str | None, typer.Option("--config", "-c", metavar="NAME|FILE", help="Packaged config or .yaml file.")
]
Page = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE.py", help="Page with a method of your own; runs its code."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the device of the run.")]


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


@app.command(
    cls=Verb, context_settings=_LOOSE, epilog="zoft train --config mezo/reviews lr=1e-5 output_dir=runs/mine"
)
def train(
    overrides: Overrides = None,
    config: Source = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and train nothing.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this stopped run.")] = None,
    nproc: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Number of processes that share each step (one GPU each, if any)."
        ),
    ] = 1,
    reward: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION|URL", help="Maximise a reward of your own; runs its code."),
    ] = None,
    recipe: Page = None,
) -> None:
    """Fine-tune a model, or continue a stopped run."""
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


@app.command(cls=Verb, epilog="zoft join runs/mine")
def join(
    place: Annotated[str, typer.Argument(metavar="RUN|HOST:PORT", help="Folder or address of the run.")],
    secret: Annotated[
        str | None, typer.Option(metavar="FILE", help="Copy of the run's join.json, needed for HOST:PORT.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow code that comes with the run's model.")
    ] = False,
) -> None:
    """Work for a run with elastic=true, from now until it ends."""
    from zoft.cli.join import join_run

    typer.echo(join_run(place, secret, trust_remote_code))


@app.command(
    cls=Verb,
    context_settings=_LOOSE,
    epilog="zoft sweep --config mezo/reviews lr=1e-4,5e-4 'seed=range(0,3)'",
)
def sweep(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUES]...", help="Keys, each with one or more values.", show_default=False
        ),
    ] = None,
    config: Source = None,
    launcher: Annotated[str, typer.Option(metavar="local|slurm", help="Where jobs run.")] = "local",
    jobs: Annotated[
        int | None, typer.Option(help="Number of jobs at a time; default: one per GPU, else 1.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Continue in the background.")] = False,
    slurm: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File of Slurm options; a single one is slurm.time=2:00:00."),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Search with Optuna, with this many trials.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric that decides the best job; default: accuracy, else loss.")
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            metavar="minimize|maximize", help="Direction of the metric; default: known by its name."
        ),
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Plot the results.")] = None,
    status: Annotated[
        str | None, typer.Option(metavar="DIR", help="Show which jobs of this sweep are done.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat --status until all jobs have ended.")
    ] = False,
    cancel: Annotated[
        str | None, typer.Option(metavar="DIR", help="Stop all jobs of this sweep, or the named ones.")
    ] = None,
    results: Annotated[
        str | None, typer.Option(metavar="DIR", help="Print the table; write results.csv and best.yaml.")
    ] = None,
    recipe: Page = None,
    as_json: Json = False,
) -> None:
    """Train with every combination of several values."""
    from zoft.sweep.command import Asked, run_sweep_command

    asked = Asked(
        config, launcher, jobs, detach, slurm, trials, metric, direction, plot, status, watch, cancel, results,
        as_json,
    )  # fmt: skip
    run_sweep_command(asked, _with(words, recipe), typer.echo)


@app.command(
    cls=Verb, context_settings=_LOOSE, epilog="zoft bench --config bench/estimators --tasks reviews --seeds 3"
)
def bench(
    overrides: Overrides = None,
    config: Source = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="Run only this row; may be repeated.")
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Run only these tasks.")] = "",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, from the first of the file.")] = None,
    jobs: Annotated[int, typer.Option(help="Number of processes that share the runs.")] = 1,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Also compare each row's steps with the true gradient.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and run nothing.")] = False,
    worker: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """Rank configs on tasks at equal forwards."""
    from zoft.bench.command import Asked, run_bench_command

    asked = Asked(config, only or (), tasks, seeds, jobs, gradient, dry_run, worker)
    run_bench_command(asked, overrides or [], typer.echo, lambda line: typer.echo(line, err=True))


@app.command("eval", cls=Verb, context_settings=_LOOSE, epilog="zoft eval runs/mine")
def evaluate(
    args: Args = None,
    config: Source = None,
    as_json: Json = False,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.jsonl", help="Write one line per example: scores, prediction, right or wrong."
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples for the 95 % intervals; 0 prints none.")
    ] = 1000,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION|URL",
            help="Evaluate generated texts by a reward of your own; runs its code.",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Run tasks of lm-evaluation-harness instead: arc_easy,boolq."),
    ] = None,
    lm_eval_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with task files of your own.")
    ] = None,
) -> None:
    """Evaluate the model of a run, any model, or an adapter."""
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
            raise UserError(f"--examples {examples}: cannot be used with --lm-eval; leave one of them out")
        if reward is not None:
            raise UserError(f"--reward {reward}: cannot be used with --lm-eval; leave one of them out")
        results, shown = harness(resolved, adapter, lm_eval, lm_eval_path)
        typer.echo(json.dumps(results) if as_json else shown)
        return
    if lm_eval_path is not None:
        raise UserError(f"--lm-eval-path {lm_eval_path}: does nothing without --lm-eval TASKS")
    found = evaluate_config(resolved, adapter, resamples=resamples, out=examples)
    typer.echo(json.dumps(found) if as_json else evaluation_text(found))


@app.command(cls=Verb, context_settings=_LOOSE, epilog="zoft samples runs/mine -n 5")
def samples(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run.")],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of held-out rows.")] = 5,
    reward: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNCTION|URL", help="Reward of the run; runs its code.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show scored texts of the base and of a run's model for the same prompts."""
    from zoft.cli.samples import samples_of, samples_text
    from zoft.console import escaped

    found = samples_of(folder, count, reward, overrides or [])
    if as_json:
        typer.echo("\n".join(json.dumps(sample) for sample in found))
    else:
        typer.echo("\n".join(escaped(line) for line in samples_text(found).split("\n")))


@app.command(cls=Verb, epilog="zoft rank runs/mine")
def rank(
    folder: Annotated[str, typer.Argument(metavar="RUN")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 is any free one.")] = 0,
) -> None:
    """Rank the texts that a run waits for, on a page of this machine."""
    from zoft.cli.rank import rank_run

    rank_run(folder, port, typer.echo)


@app.command(cls=Verb, context_settings=_LOOSE, epilog="zoft baseline --config mezo/reviews --method icl")
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
    demos: Annotated[
        int | None, typer.Option(min=1, help="Number of demonstrations for icl; default: 32.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of the first-order methods; default: 3.")
    ] = None,
) -> None:
    """Score a model without zeroth-order training."""
    from zoft.baselines.methods import baseline_settings, baseline_text, run_baseline

    if epochs is not None and not epochs > 0:
        raise UserError(f"--epochs {epochs:g}: must be > 0")
    resolved, ask = baseline_settings(config, overrides or [], method, demos, epochs)
    typer.echo(baseline_text(run_baseline(resolved, ask)))


@app.command(cls=Verb, epilog="zoft replay runs/mine --step 100 --out rebuilt")
def replay(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run.")],
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder to write; without it, only print what would be made."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Number of steps to replay; default: all.")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="fp32", help="Keep 16-bit weights in fp32, without rounding.")
    ] = None,
    denoise: Annotated[
        bool, typer.Option("--denoise", help="Sum the updates in fp32 and round once to the run's storage.")
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


@app.command(cls=Verb, epilog="zoft export runs/mine --merge --out exported")
def export(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model, for transformers.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the adapter alone, for PEFT.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; default: the run's save_dtype.")
    ] = None,
    device: Device = None,
    recipe: Page = None,
) -> None:
    """Write a run's model for other libraries, and check it."""
    from zoft.cli.replay import export_run

    typer.echo(
        export_run(folder, out, merge=merge, adapter=adapter, dtype=dtype, device=device, recipe=recipe)
    )


@app.command(cls=Verb, epilog="zoft ledger runs/mine --verify")
def ledger(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the ledger, the config and the snapshots.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Plot losses and coefficients of all steps.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a run's steps, losses and events, also while it runs."""
    from zoft.cli.ledger import ledger_json, ledger_summary, ledger_text, plot_ledger, verify_ledger

    found = ledger_summary(folder)
    checks = verify_ledger(folder) if verify else []
    if as_json:
        typer.echo(ledger_json({**found, "verified": checks} if verify else found))
    else:
        typer.echo("\n".join([ledger_text(found), *checks]))
    if plot:
        typer.echo(plot_ledger(folder, plot), err=as_json)


@app.command(cls=Verb, epilog="zoft report runs --png curve.png")
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or folders that contain runs.")
    ],
    metrics: Annotated[str, typer.Option(help="Metrics to show, such as accuracy,auc; default: all.")] = "",
    csv: Annotated[
        str | None, typer.Option(metavar="FILE.csv", help="Also write the table to this file.")
    ] = None,
    png: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Plot metrics against forwards.")
    ] = None,
) -> None:
    """Print one table of runs, mean ± sd over seeds."""
    from zoft.report.table import report_runs

    asked = [m for m in metrics.replace(",", " ").split() if m]
    typer.echo(report_runs(runs, asked, csv_to=csv, png_to=png))


@app.command("ls", cls=Verb, epilog="zoft ls")
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


@app.command(cls=Verb, epilog="zoft cp mezo/reviews my.yaml")
def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a packaged config.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="File or folder to write.")],
) -> None:
    """Copy a packaged config, to make it your own."""
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


@app.command(cls=Verb, context_settings=_LOOSE, epilog="zoft validate --config mezo/reviews lr=1e-5")
def validate(overrides: Overrides = None, config: Source = None, recipe: Page = None) -> None:
    """Check a config and print it with all defaults; loads no model and no data."""
    from zoft.config.compose import to_yaml
    from zoft.method.configured import compose

    typer.echo(to_yaml(compose(config, _with(overrides, recipe))), nl=False)


@app.command(cls=Verb, context_settings=_LOOSE, epilog="zoft estimate --config mezo/reviews batch_size=32")
def estimate(
    overrides: Overrides = None, config: Source = None, recipe: Page = None, as_json: Json = False
) -> None:
    """Print the memory and time that a run will need, without loading weights."""
    from zoft.method.configured import compose

    resolved = compose(config, _with(overrides, recipe))
    from zoft import console
    from zoft.run.estimate import estimate_run, estimate_text
    from zoft.train.resolve import allowed_steps

    found = estimate_run(allowed_steps(resolved))
    typer.echo(json.dumps(console.finite(found)) if as_json else estimate_text(found))


@app.command(cls=Verb, context_settings=_LOOSE, epilog="zoft lr --config mezo/reviews")
def lr(
    overrides: Overrides = None,
    config: Source = None,
    recipe: Page = None,
    png: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the line there too.")] = None,
    as_json: Json = False,
) -> None:
    """Show the losses along a run's first steps and the lr that lr=auto takes."""
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


@app.command(cls=Verb, context_settings=_LOOSE, epilog="zoft data --config mezo/reviews -n 5")
def data(
    overrides: Overrides = None,
    config: Source = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of examples.")] = 3,
    as_json: Json = False,
) -> None:
    """Show training examples as the model reads them, and count their tokens."""
    from zoft.cli.data import show_data
    from zoft.method.configured import compose

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show_data(compose(config, overrides or []), count, typer.echo, as_json=as_json, colour=colour)


@app.command(cls=Verb, epilog="zoft keys lr")
def keys(
    name: Annotated[
        str | None, typer.Argument(metavar="[KEY|TOPIC]", help="Key or topic to explain; default: all keys.")
    ] = None,
) -> None:
    """List all keys by topic, or explain one."""
    from zoft.config.keys import describe_key, describe_keys
    from zoft.method.recipes import method_of, names

    if name is None:
        typer.echo(describe_keys())
        return
    defaults = {recipe: method_of(recipe).defaults for recipe in names()}
    typer.echo(describe_key(name, {recipe: some[name] for recipe, some in defaults.items() if name in some}))


@app.command(cls=Verb, epilog="zoft env")
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
    try:
        os.getcwd()
    except OSError as error:
        print(f"error: the folder that you are in: {error.strerror}; go to another one", file=sys.stderr)
        sys.exit(2)
    code: Any = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout.buffer.raw.lost = True  # type: ignore[attr-defined]  # else the interpreter tries again
        if not code:  # else a verb's own line has said it
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
            code = 2
    sys.exit(code)
