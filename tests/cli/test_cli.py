"""The verbs: their surface, their answers to mistakes, and one small run through train, resume, replay and eval."""

import contextlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from typer.main import get_command
from typer.testing import CliRunner

from zoft import __version__
from zoft.cli.main import app
from zoft.config.compose import names
from zoft.method.configured import load_run

ROOT = Path(__file__).resolve().parents[2]
# A user's scripts depend on these: a change here is a change of the interface.
SURFACE = {
    "train": [
        "--config",
        "--dry-run",
        "--help",
        "--nproc",
        "--recipe",
        "--resume",
        "--reward",
        "-c",
        "overrides",
    ],
    "eval": [
        "--config",
        "--examples",
        "--help",
        "--json",
        "--lm-eval",
        "--lm-eval-path",
        "--resamples",
        "--reward",
        "-c",
        "args",
    ],
    "baseline": ["--config", "--demos", "--epochs", "--help", "--method", "-c", "-m", "overrides"],
    "bench": [
        "--config",
        "--dry-run",
        "--gradient",
        "--help",
        "--jobs",
        "--only",
        "--seeds",
        "--tasks",
        "--worker",
        "-c",
        "overrides",
    ],
    "rank": ["--help", "--port", "folder"],
    "samples": ["--help", "--json", "--reward", "-n", "folder", "overrides"],
    "lr": ["--config", "--help", "--json", "--png", "--recipe", "-c", "overrides"],
    "report": ["--csv", "--help", "--metrics", "--png", "runs"],
    "join": ["--help", "--secret", "--trust-remote-code", "place"],
    "sweep": [
        "--cancel",
        "--config",
        "--detach",
        "--direction",
        "--help",
        "--jobs",
        "--json",
        "--launcher",
        "--metric",
        "--plot",
        "--recipe",
        "--results",
        "--slurm",
        "--status",
        "--trials",
        "--watch",
        "-c",
        "words",
    ],
    "replay": ["--denoise", "--device", "--help", "--out", "--recipe", "--step", "--storage", "folder"],
    "ledger": ["--help", "--json", "--plot", "--verify", "folder"],
    "export": ["--adapter", "--device", "--dtype", "--help", "--merge", "--out", "--recipe", "folder"],
    "ls": ["--help"],
    "cp": ["--help", "dest", "name"],
    "validate": ["--config", "--help", "--recipe", "-c", "overrides"],
    "estimate": ["--config", "--help", "--json", "--recipe", "-c", "overrides"],
    "data": ["--config", "--help", "--json", "-c", "-n", "overrides"],
    "keys": ["--help", "name"],
    "env": ["--help", "--json"],
}


def invoke(*args):
    return CliRunner().invoke(app, list(args))


def refused(*args):
    result = invoke(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


class Done:
    """What a verb answered, run in this process: importing torch and transformers anew takes seconds."""

    def __init__(self, result):
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.returncode, self.stdout, self.stderr = result.exit_code, result.stdout, result.stderr


def zoft(*args, cwd):
    with _chdir(cwd):
        return Done(invoke(*map(str, args)))


@contextlib.contextmanager
def _chdir(folder):  # contextlib's needs Python 3.11
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_the_surface():
    group = get_command(app)
    found = {}
    for name, command in group.commands.items():
        params = command.get_params(command.make_context(name, [], resilient_parsing=True))
        found[name] = sorted(opt for p in params for opt in p.opts)
    assert found == SURFACE


@pytest.mark.parametrize("module", ["zoft", "zoft.cli"])  # torchrun -m zoft.cli
def test_both_modules_run(module):
    command = [sys.executable, "-m", module, "--version"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, capture_output=True, text=True, env=env).stdout.startswith("zoft ")


def test_help_and_version():
    for flag in ("--help", "-h"):
        result = invoke(flag)
        assert result.exit_code == 0 and all(f"\n  {verb} " in result.output for verb in SURFACE)
        assert invoke("train", flag).exit_code == 0
    for verb, command in get_command(app).commands.items():
        shown = invoke(verb, "--help").output
        assert re.fullmatch(r"[A-Z][^\n]*\.", command.help) and command.epilog.startswith(f"zoft {verb}")
        assert command.help in result.output and command.epilog in result.output and command.epilog in shown
        assert all(p.help for p in command.params if p.param_type_name == "option" and not p.hidden), verb
    assert invoke("--version").output == f"zoft {__version__}\n"
    assert "train" in invoke().output


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["train", "--config", "mezo/reviews", "lrr=3"], "did you mean lr?"),
        (["train", "lrr=3", "--config", "mezo/reviews"], "did you mean lr?"),
        (["train", "--config", "mezo/reviews", "--lr", "3"], "write lr=3"),
        (["train", "--lr", "3", "--config", "mezo/reviews"], "write lr=3"),
        (["train", "--config", "mezo/reviews", "--lr=3"], "write lr=3"),
        (["train", "--config", "mezo/reviews", "lr=1,2"], "sweep"),
        (["train", "--config", "mezo/revews"], "did you mean mezo/reviews?"),
        (["train", "--config", "nothing.yaml"], "no such file"),
        (["train"], "model is not set"),
        (["train", "--resume", "nowhere"], "not a run's folder"),
        (["train", "--resume", "nowhere", "lr=3"], "leave lr=3 out"),
        (["train", "--resume", "nowhere", "threads=1"], "write threads: 1 into nowhere/config.yaml"),
        (["train", "--resume", "nowhere", "--config", "mezo/reviews"], "leave --config out"),
        (["train", "--config", "mezo/reviews", "model=no/where.gguf"], "no such file"),
        (["eval"], "one run's folder"),
        (["eval", "a", "--config", "mezo/reviews"], "not a run's folder"),
        (["eval", "nowhere"], "not a run's folder"),
        (["replay", "nowhere", "--out", "x"], "not a run's folder"),
        (["export", "nowhere", "--merge", "--out", "x"], "not a run's folder"),
        (["export", "nowhere", "--out", "x"], "--merge for the whole model"),
        (["export", "nowhere", "--merge", "--out", "x", "--dtype", "int8"], "use fp32, fp16, bf16"),
        (["cp", "mezo/revews", "x.yaml"], "did you mean mezo/reviews?"),
        (["cp", "mezo/reviews", "x.txt"], ".yaml"),
        (["validate", "--config", "mezo/reviews", "eps=0"], "> 0"),
        (["data", "--config", "mezo/reviews", "task=local"], "task.train is not set"),
        (["estimate", "--config", "mezo/reviews", "model=some/where"], "HF_HUB_OFFLINE"),
        (["estimate"], "model is not set"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refused(*args)


def test_an_unknown_verb_names_the_nearest():
    result = invoke("trian")
    assert result.exit_code == 2 and "did you mean train?" in result.stderr


def test_a_bug_keeps_its_traceback(tmp_path):
    """Anything but a UserError must come out whole."""
    code = "import zoft.config.compose as c\ndef broken(group=''): raise KeyError('a bug')\nc.names = broken\nfrom zoft.cli import main\nimport sys; sys.argv = ['zoft', 'ls']; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


def test_ls_names_every_config_with_a_line():
    lines = invoke("ls").output.splitlines()
    for group in ("", "model", "task", "bench"):
        for name in names(group):
            name = f"bench/{name}" if group == "bench" else name
            (line,) = [x for x in lines if x.split()[0] == name]
            assert len(line.split()) > 3, line


def test_cp_gives_a_file_that_works_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in names():
        file = f"mine/{name.replace('/', '-')}.yaml"
        assert "zoft train --config mine" in invoke("cp", name, file).output
        shown = invoke("validate", "--config", file).output
        own = invoke("validate", "--config", name).output
        assert [
            a for a, b in zip(shown.splitlines(), own.splitlines()) if a != b and "output_dir" not in a
        ] == []
    assert "zoft bench --config mine" in invoke("cp", "bench/estimators", "mine/ranks.yaml").output
    assert invoke("bench", "--dry-run", "--config", "mine/ranks.yaml").exit_code == 0
    invoke("cp", "mezo/reviews", "mine")
    assert "exists" in refused("cp", "mezo/reviews", "mine")


def test_env_is_readable_by_programs():
    found = json.loads(invoke("env", "--json").output)
    assert found["zoft"] == __version__ and found["cores"] >= 1 and found["packages"]["torch"][0].isdigit()
    assert found["python"] in invoke("env").output


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["ls"],
        ["validate", "--config", "mezo/reviews"],
        ["train", "--config", "mezo/reviews", "lrr=1"],
    ],
)
def test_light_verbs_import_nothing_heavy(args):
    """Time depends on the machine, imports do not: these are what makes an answer slow.

    typer reads a whole number (`--nproc 2`) with pydantic where that is installed: 0.05 s."""
    code = (
        "import sys; from zoft.cli.main import app\n"
        f"try: app({args!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'pandas', 'datasets', 'wandb', 'rich'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout[-500:] + done.stderr


def test_a_parameter_a_user_may_type_needs_no_converter():
    """The shortcut past typer's converters is right for text and flags only."""
    hints = [
        p.annotation
        for c in app.registered_commands
        for p in inspect.signature(c.callback).parameters.values()
    ]
    assert hints and all("Path" not in str(h) for h in hints)


# One small run, for real: a model of a few thousand weights, saved as any other, and a file of examples.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    settings = "steps: 6\nbatch_size: 4\nlr: 1e-2\nmax_length: 32\nmomentum: 0.5\nthreads: 1\n"
    return tiny.place(tmp_path_factory.mktemp("work"), settings)


@pytest.fixture(scope="module")
def finished(place):
    done = zoft("train", "--config", "mine.yaml", "eval_every=3", "output_dir=whole", cwd=place)
    assert done.returncode == 0, done.stderr
    return done


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_replay_and_eval_of_an_unfinished_run_say_so(place, finished, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.yaml").write_bytes((place / "whole" / "config.yaml").read_bytes())
    (part / "ledger").write_bytes((place / "whole" / "ledger").read_bytes()[: -2 * 32])  # two steps less
    done = zoft("replay", part, "--out", tmp_path / "rebuilt", cwd=place)
    assert done.returncode == 0 and "4 steps replayed of 6: the run is not finished" in done.stdout
    done = zoft("eval", part, cwd=place)
    assert done.returncode == 2 and "zoft train --resume" in done.stderr


def test_a_runs_folder(place, finished):
    run = place / "whole"
    assert sorted(p.name for p in run.iterdir()) == [
        "config.yaml",
        "env.json",
        "ledger",
        "metrics.jsonl",
        "model",
        "result.json",
    ]
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["forwards"]) == (6, 6 * 2 * 4)
    assert result["peak_memory_gb"] > 0 and result["train_seconds"] > 0
    assert {"accuracy", "majority", "n"} <= set(result["before"]) == set(result["after"])
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "eval" in x] == [0, 3, 6]
    assert [x["step"] for x in lines if "loss" in x] == list(range(6))
    config = load_run(run)
    resolved = (
        config.storage,
        config.compute,
        config.device,
        config.perturb,
        config.probes_per_forward,
        config.threads,
    )
    assert "auto" not in resolved and resolved[:3] == ("fp32", "fp32", "cpu")
    assert "before" in finished.stdout and "accuracy" in finished.stdout and "whole" in finished.stdout


def test_the_saved_model_is_any_model(place, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "whole" / "model")
    assert AutoTokenizer.from_pretrained(place / "whole" / "model")("no").input_ids
    assert model.num_parameters() == tiny.llama().num_parameters()
    assert "mezo" in (place / "whole" / "model" / "README.md").read_text()


def test_a_folder_with_a_run_is_refused_with_both_ways_out(place, finished):
    done = zoft("train", "--config", "mine.yaml", "output_dir=whole", cwd=place)
    assert done.returncode == 2 and "--resume whole" in done.stderr and "output_dir=" in done.stderr
    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "config.yaml").write_text("mine: 1\n")
    done = zoft("train", "--config", "mine.yaml", "output_dir=other", cwd=place)
    assert done.returncode == 2 and "config.yaml is in the way" in done.stderr
    assert (place / "other" / "config.yaml").read_text() == "mine: 1\n"


def test_replay_gives_the_same_bits(place, finished):
    done = zoft("replay", "whole", "--out", "again", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "6 steps" in done.stdout and weights(place / "again") == weights(place / "whole" / "model")
    assert weights(place / "again") != weights(place / "tiny")
    assert zoft("replay", "whole", "--out", "again", cwd=place).returncode == 2


def test_a_killed_run_resumes_from_another_folder_to_the_same_bits(place, finished, tmp_path):
    command = [
        sys.executable,
        "-m",
        "zoft",
        "train",
        "--config",
        "mine.yaml",
        "steps=200",
        "output_dir=killed",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = place / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 20):
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "killed" / "result.json").exists()
    done = zoft("train", "--resume", place / "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "replaying" in done.stderr
    whole = zoft("train", "--config", "mine.yaml", "steps=200", "output_dir=unkilled", cwd=place)
    assert whole.returncode == 0, whole.stderr
    assert weights(place / "killed" / "model") == weights(place / "unkilled" / "model")
    lines = [json.loads(x) for x in metrics.read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(200))
    assert (place / "killed" / "ledger").read_bytes() == (place / "unkilled" / "ledger").read_bytes()


def test_a_finished_run_says_so(place, finished):
    before = (place / "whole" / "ledger").read_bytes()
    done = zoft("train", "--resume", "whole", cwd=place)
    assert done.returncode == 0 and "finished" in done.stderr and "accuracy" in done.stdout
    assert (place / "whole" / "ledger").read_bytes() == before


def test_eval_of_a_run_agrees_with_its_result(place, finished):
    done = zoft("eval", "whole", "--json", "--examples", "each.jsonl", cwd=place)
    assert done.returncode == 0, done.stderr
    after = json.loads((place / "whole" / "result.json").read_text())["after"]
    found = json.loads(done.stdout)
    between = found.pop("ci95")
    assert found == pytest.approx(after)
    assert all(low <= after[name] <= high for name, (low, high) in between.items()) and "accuracy" in between
    each = [json.loads(line) for line in (place / "each.jsonl").read_text().splitlines()]
    assert len(each) == after["n"] and sum(e["right"] for e in each) / len(each) == after["accuracy"]
    assert all((max(e["scores"], key=e["scores"].get) == e["gold"]) == e["right"] for e in each)
    assert all(sum(e["probabilities"].values()) == pytest.approx(1) for e in each)
    assert -sum(math.log(e["probabilities"][e["gold"]]) for e in each) / len(each) == pytest.approx(
        after["loss"]
    )
    done = zoft("eval", "--config", "mine.yaml", "eval_limit=3", "--json", "--resamples", "0", cwd=place)
    assert json.loads(done.stdout)["n"] == 3 and "ci95" not in json.loads(done.stdout)


def test_eval_of_a_model_folder_takes_the_task_of_a_config(place, finished):
    done = zoft("eval", "whole/model", "--config", "mine.yaml", "--json", "--resamples=0", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(
        json.loads((place / "whole" / "result.json").read_text())["after"]
    )
    done = zoft("eval", "whole", "--config", "mine.yaml", cwd=place)
    assert done.returncode == 2 and "leave --config out" in done.stderr
    done = zoft("eval", "whole/model", "model=x", "--config", "mine.yaml", cwd=place)
    assert done.returncode == 2 and "leave one of them out" in done.stderr


def test_python_m_zoft_runs_too(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "zoft", "validate", "--config", "mezo/reviews", "eps=-1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: eps=-1: must be > 0\n")


def test_a_dry_run_shows_the_plan_and_writes_nothing(place):
    done = zoft("train", "--config", "mine.yaml", "--dry-run", "train=norms", "output_dir=dry", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (
        "perturb: probes" in done.stdout
        and "5 tensors trained" in done.stdout
        and "48 forwards" in done.stdout
    )
    assert float(re.search(r"cosine (\d\.\d+) with z", done.stdout)[1]) > 0.99
    assert not (place / "dry").exists()


def test_data_marks_what_is_scored(place):
    done = zoft("data", "--config", "mine.yaml", "-n", 2, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("⟦a⟧") == 2 and done.stdout.count("⟦b⟧") == 2


def test_data_counts_what_is_scored(place):
    done = zoft("data", "--config", "mine.yaml", "-n", 1, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["scored"] == found["examples"] > 10 and len(found["shown"]) == 1
    shown = zoft("data", "--config", "mine.yaml", cwd=place).stdout
    assert f"{found['tokens']:,} tokens, {found['scored']:,} scored" in shown


def test_estimate_says_what_a_run_takes(place, monkeypatch):
    from zoft.run import estimate

    monkeypatch.setattr(estimate, "MEASURED", 0.0)
    done = zoft("estimate", "--config", "mine.yaml", "train=norms", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (found["parameters"], found["trained"]) == (tiny.llama().num_parameters(), 5 * 16)
    assert found["peak_bytes"] > found["weights_bytes"] >= 4 * found["parameters"] and not found["notes"]
    shown = zoft("estimate", "--config", "mine.yaml", cwd=place)
    assert "peak memory" in shown.stdout and "AdamW" in shown.stdout


def test_another_base_is_refused(place, finished):
    import shutil

    import torch

    shutil.copytree(place / "whole", place / "moved")
    model = tiny.llama()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(place / "elsewhere")
    tiny.tokenizer().save_pretrained(place / "elsewhere")
    path = place / "moved" / "config.yaml"
    path.write_text(path.read_text().replace(str(place / "tiny"), str(place / "elsewhere")))
    done = zoft("replay", "moved", "--out", "wrong", cwd=place)
    assert done.returncode == 2 and "other weights" in done.stderr, done.stderr
