"""Configs: every shipped one composes; every mistake is one line that names the key and the fix."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from zoft.bench.plan import read_bench
from zoft.config.compose import describe, names, packaged, parse, to_yaml
from zoft.config.keys import TOPICS, describe_key, describe_keys, topics
from zoft.config.schema import Config, Task, fields
from zoft.errors import UserError
from zoft.method.configured import compose, load_run

REVIEWS = "mezo/reviews"


def refused(config, *overrides):
    with pytest.raises(UserError) as caught:
        compose(config, overrides)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("name", names())
def test_every_config_composes_and_round_trips(name, tmp_path):
    config = compose(name)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert compose(str(path)) == config
    assert describe(name)


@pytest.mark.parametrize(
    "path", sorted(packaged("configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_config_says_what_it_is_and_how_to_run_it(path):
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    commands = [line for line in head if line.startswith("#   zoft ")]
    assert commands, f"{path} has no command in its header"
    for line in commands:  # a command that is continued on the next line ends in a backslash
        words = line.removeprefix("#").rstrip("\\").split()
        named = words[words.index("--config") + 1] if "--config" in words else None
        if named and words[1] == "bench":
            assert read_bench(named).entries
        elif named:
            compose(named, [w for w in words if "=" in w])


@pytest.mark.parametrize("name", names("task"))
def test_every_task_and_model_is_a_choice(name):
    assert compose(REVIEWS, [f"task={name}"]).task.name == name.replace("-short", "")
    for model in names("model"):
        assert compose("mezo/opt-13b-sst2", [f"model={model}"]).model == model


def test_values_of_the_paper_setting():
    config = compose("mezo/opt-13b-sst2")
    assert (config.model, config.steps, config.batch_size, config.eps, config.lr) == (
        "facebook/opt-13b",
        20000,
        16,
        1e-3,
        1e-6,
    )
    assert config.task.prompt == "{sentence} It was"
    assert config.task.choices == {"0": " terrible", "1": " great"}


def test_overrides_are_read_by_the_type_of_their_key():
    config = compose(
        REVIEWS,
        [
            "lr=1e-5", "steps=2e4", "eval_limit=null", "save_model=false", "probes_per_forward=4", "threads=auto",
            "model=facebook/opt-125m", "output_dir='runs/a, b'", r"train=layers\.(28|29)\.", "task=local",
            r"task.prompt=Review: {text}\nSentiment:", 'task.choices={negative: " bad", positive: " good"}',
        ],
    )  # fmt: skip
    assert (config.lr, config.steps, config.eval_limit, config.save_model) == (1e-5, 20000, None, False)
    assert (config.probes_per_forward, config.threads, config.model) == (4, "auto", "facebook/opt-125m")
    assert (config.output_dir, config.train) == ("runs/a, b", r"layers\.(28|29)\.")
    assert config.task.prompt == "Review: {text}\nSentiment:"
    assert config.task.choices == {"negative": " bad", "positive": " good"}


def test_another_task_replaces_the_whole_task():
    config = compose("mezo/opt-13b-sst2", ["task=reviews"])
    assert config.task == Task(name="reviews")
    order = compose("mezo/opt-13b-sst2", ["task.prompt={text}", "task=reviews"])
    assert order.task == Task(name="reviews", prompt="{text}")


def test_labels_that_yaml_reads_as_something_else():
    config = compose(REVIEWS, ["task.choices={0: a, 1: b}"])
    assert config.task.choices == {"0": "a", "1": "b"}
    config = compose(REVIEWS, ["task.choices={true: a, false: b}"])
    assert config.task.choices == {"true": "a", "false": "b"}


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("{neg: no, pos: yes}", {"neg": "no", "pos": "yes"}),
        ("{neg: off, pos: On}", {"neg": "off", "pos": "On"}),
        ("{neg: False, pos: true}", {"neg": "False", "pos": "true"}),
        ("{neg: 007, pos: 1.50}", {"neg": "007", "pos": "1.50"}),
        ("{neg: 1e3, pos: 1_000}", {"neg": "1e3", "pos": "1_000"}),
        ("{neg: 1:30, pos: 2020-01-01}", {"neg": "1:30", "pos": "2020-01-01"}),
        ('{no: " No", yes: " Yes"}', {"no": " No", "yes": " Yes"}),
        ('{007: " Bond", 1.50: " half"}', {"007": " Bond", "1.50": " half"}),
        ('{neg: "null", pos: "~"}', {"neg": "null", "pos": "~"}),
        ('{0: " no", 1: " yes"}', {"0": " no", "1": " yes"}),
    ],
)
def test_label_words_are_what_was_typed(typed, meant, tmp_path):
    config = compose(REVIEWS, ["task=local", f"task.choices={typed}"])
    assert config.task.choices == meant
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run(tmp_path).task.choices == meant
    assert compose(str(tmp_path / "config.yaml")).task.choices == meant


def test_columns_are_what_was_typed():
    config = compose(REVIEWS, ["task=local", "task.columns={prompt: no, completion: 2020}"])
    assert config.task.columns == {"prompt": "no", "completion": "2020"}


@pytest.mark.parametrize(
    "typed, parts",
    [
        ("{neg: no, pos: x}", ["task.choices: neg: no", 'quotes: "no"']),
        ("{neg: x, Yes: y}", ["task.choices: Yes", 'quotes: "Yes"']),
        ("{neg: 007, pos: x}", ["task.choices: neg: 007", 'quotes: "007"']),
        ("{neg: x, pos: 1.50}", ["task.choices: pos: 1.50", 'quotes: "1.50"']),
        ("{neg: x, pos: 1e3}", ["task.choices: pos stands for 1000.0", "quotes"]),
        ("{neg: x, pos: null}", ["task.choices: pos: null", 'quotes: "null"']),
        ("{neg: x, pos: }", ["task.choices: pos:", "quotes"]),
        ("{0: a, 1: 0x1f}", ["task.choices: 1: 0x1f", 'quotes: "0x1f"']),
    ],
)
@pytest.mark.parametrize("group", [False, True])
def test_words_of_a_file_that_yaml_reads_otherwise(typed, parts, group, tmp_path):
    """In the config's own file, and in a task's beside it."""
    mine = f"name: local\ntrain: a.csv\nprompt: '{{text}}'\nlabel: label\nchoices: {typed}\n"
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(mine)
    below = "task:\n" + "".join(f"  {line}\n" for line in mine.splitlines())
    top = "defaults: [task: mine, _self_]\n" if group else below
    (tmp_path / "own.yaml").write_text(f"{top}model: tiny\n")
    message = refused(str(tmp_path / "own.yaml"))
    assert all(part in message for part in parts), message


def test_words_of_a_file_that_are_plain(tmp_path):
    plain = '{0: " no", -1: 12, true: false, "no": "off", "007": 2020-01-01}'
    text = (
        f"model: tiny\ntask: {{name: local, train: a.csv, prompt: '{{text}}', label: x, choices: {plain}}}\n"
    )
    (tmp_path / "own.yaml").write_text(text)
    wanted = {"0": " no", "-1": "12", "true": "false", "no": "off", "007": "2020-01-01"}
    assert compose(str(tmp_path / "own.yaml")).task.choices == wanted


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("lrr=3", ["lrr", "did you mean lr?"]),
        ("prompt=x", ["prompt", "task.prompt"]),
        ("zzz=1", ["zzz", "zoft keys"]),
        ("task.promt=x", ["task.promt", "task.prompt"]),
        ("lr=1,2", ["lr=1,2", "sweep", "zoft sweep"]),
        ("noise=gaussian,rademacher", ["noise", "sweep"]),
        ("task=reviews,trec", ["task", "sweep"]),
        ("seed=range(3)", ["seed", "sweep"]),
        ("lr=abc", ["lr=abc", "number"]),
        ("lr=nan", ["lr", "finite"]),
        ("lr=inf", ["lr", "finite"]),
        ("lr=-1", ["lr=-1", "≥ 0"]),
        ("eps=0", ["eps=0", "> 0"]),
        ("steps=0", ["steps=0", "≥ 1"]),
        ("q=0", ["q=0", "≥ 1"]),
        ("q=1.5", ["q=1.5", "whole"]),
        ("batch_size=0", ["batch_size", "≥ 1"]),
        ("momentum=1", ["momentum=1", "< 1"]),
        ("warmup=-1", ["warmup", "≥ 0"]),
        ("warmup=1.5", ["warmup=1.5", "fraction"]),
        ("warmup=1501", ["warmup=1501", "steps=1500"]),
        ("train=last-0", ["train=last-0", "last-1"]),
        ("noise=gausian", ["noise=gausian", "gaussian, rademacher", "did you mean gaussian?"]),
        ("schedule=cosin", ["schedule", "did you mean cosine?"]),
        ("storage=float16", ["storage=float16", "fp16"]),
        ("probes_per_forward=some", ["probes_per_forward=some", "auto", "whole number"]),
        ("probes_per_forward=0", ["probes_per_forward=0", "≥ 1"]),
        ("device=gpu", ["device=gpu", "cuda:0"]),
        ("save_model=maybe", ["save_model=maybe", "true or false"]),
        ("mask=random", ["mask=random", "recipe=sparse_mezo", "yours is mezo"]),
        ("sparsity=0.5", ["sparsity=0.5", "recipe=sparse_mezo", "yours is mezo"]),
        ("sparsity=1", ["sparsity=1", "< 1"]),
        ("mask=magnitud", ["mask=magnitud", "did you mean magnitude?"]),
        ("task=sst", ["task=sst", "reviews"]),
        ("task=review", ["did you mean reviews?"]),
        ("recipe=mezzo", ["recipe=mezzo: use", "; did you mean mezo?"]),
        ("train=(", ["train=(", "regular expression"]),
        ("task.choices=bad", ["task.choices=bad", "label"]),
        ("task.choices={neg: null, pos: x}", ["task.choices: neg stands for null", '{neg: "null"}']),
        ("task.choices={neg, pos}", ["task.choices: neg stands for null", "give it some text"]),
        ("task.choices={null: a, pos: x}", ["task.choices: null", "in quotes"]),
        ("task.choices={neg: [a], pos: x}", ["task.choices: neg stands for ['a']", "give it some text"]),
        ("+lr=3", ["without +"]),
        ("~lr", ["without ~"]),
        ("output_dir=${oc.env:HOME}", ["output_dir", "resolver"]),
        ("output_dir=${sed}", ["output_dir", "sed"]),
        ("mezo/trec", ["--config mezo/trec"]),
        ("hydra.run.dir=x", ["unknown key hydra.run.dir"]),
    ],
)
def test_a_wrong_override_is_one_line_with_the_fix(override, parts):
    text = refused(REVIEWS, override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--lr", "3"], ["--lr", "write lr=3"]),
        (["--lr=3"], ["write lr=3"]),
        (["--batch-size", "3"], ["write batch_size=3"]),
        (["--lrr", "3"], ["write lr=3"]),
        (["--qqqqqq"], ["unknown option --qqqqqq"]),
    ],
)
def test_dashes_are_answered_with_what_to_write(given, parts):
    text = refused(REVIEWS, *given)
    assert all(part in text for part in parts), text


def test_names_and_files_that_do_not_exist():
    assert "did you mean mezo/reviews?" in refused("mezo/revews")
    assert "no such file" in refused("nowhere/at/all.yaml")
    assert "model is not set" in refused(None)
    assert "task is not set" in refused(None, "model=a/b")
    config = compose(None, ["model=a/b", "task=reviews"])
    assert config.output_dir == "runs/run-seed0"


def user_file(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_anywhere_may_use_packaged_groups_and_configs(tmp_path):
    path = user_file(tmp_path, "defaults:\n  - mezo/reviews\n  - override /task: trec\n  - _self_\nlr: 0.5\n")
    config = compose(path, ["seed=3"])
    assert (config.lr, config.task.name, config.train, config.output_dir) == (
        0.5,
        "trec",
        "last-2",
        "runs/mine-seed3",
    )
    plain = compose(user_file(tmp_path, "model: a/b\ntask: reviews\n"))
    assert (plain.model, plain.task.name, plain.lr) == ("a/b", "reviews", Config().lr)


def test_folders_beside_a_file_that_are_named_like_keys_do_no_harm(tmp_path):
    for folder in ("train", "noise", "model", "mezo", "task"):
        (tmp_path / folder).mkdir()
    config = compose(
        user_file(tmp_path, "defaults: [mezo/reviews, _self_]\n"),
        ["train=all", "noise=gaussian", "model=a/b", "task=trec"],
    )
    assert (config.train, config.noise, config.model, config.task.name) == ("all", "gaussian", "a/b", "trec")


def test_a_users_own_group_file_comes_first(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("name: local\ntrain: x.jsonl\n")
    assert compose(user_file(tmp_path, "model: a/b\ntask: mine\n")).task == Task(
        name="local", train="x.jsonl"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: a/b\nlr: [1\ntask: reviews\n", ["mine.yaml, line", "YAML"]),
        ("model: a/b\ntask: reviews\nlr: 1\nlr: 2\n", ["mine.yaml", "lr"]),
        ("- a\n- b\n", ["key: value"]),
        ("model: a/b\ntask: reviews\nlrr: 1\n", ["lrr", "did you mean lr?"]),
        ("model: a/b\ntask: {name: local, promt: x}\n", ["task.promt", "task.prompt"]),
        ("model: a/b\ntask: reviews\nlr: high\n", ["lr", "high"]),
        ("model: a/b\ntask: reviews\nsteps: 1.5\n", ["steps"]),
        ("model: a/b\ntask: reviews\nmodel_: {_target_: os.system}\n", ["model_"]),
        ("model: {_target_: os.system}\ntask: reviews\n", ["model"]),
        ("model: ${oc.env:HOME}\ntask: reviews\n", ["model", "resolver"]),
        ("model: a/b\ntask: reviews\ntrust_remote_code: true\n", ["trust_remote_code", "command line"]),
        ("model: a/b\ntask: reviews\nhydra: {run: {dir: x}}\n", ["hydra"]),
        ("defaults:\n  - mezo/nothing\n", ["mezo/nothing"]),
        ("model: ???\ntask: reviews\n", ["model"]),
        ("model: a/b\ntask: 3\n", ["task"]),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, parts):
    said = refused(user_file(tmp_path, text))
    assert all(part in said for part in parts), said


def test_a_yml_file_and_a_binary_file(tmp_path):
    assert "must end in .yaml" in refused(user_file(tmp_path, "lr: 1\n", "mine.yml"))
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    refused(str(tmp_path / "bin.yaml"))


def test_text_that_looks_like_an_interpolation_survives_the_round_trip(tmp_path):
    config = compose(REVIEWS, [r"task.prompt=cost \${price} of {text}"])
    assert config.task.prompt == "cost ${price} of {text}"
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_run(tmp_path) == config


def test_a_run_that_trusted_code_must_be_told_so_again(tmp_path):
    config = compose(REVIEWS, ["trust_remote_code=true"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    with pytest.raises(UserError, match="trust_remote_code=true"):
        load_run(tmp_path)
    assert load_run(tmp_path, ["trust_remote_code=true"]) == config
    with pytest.raises(UserError, match="not a run's folder"):
        load_run(tmp_path / "nothing")


def test_a_mask_by_magnitude_goes_with_no_move_in_place():
    assert "mask=random" in refused("sparse_mezo/reviews", "perturb=inplace")
    assert compose("sparse_mezo/reviews", ["perturb=inplace", "mask=random"]).mask == "random"
    assert "sparsity=0.9: mask=none leaves nothing out" in refused(
        "sparse_mezo/reviews", "mask=none", "sparsity=0.9"
    )
    assert compose("sparse_mezo/reviews").mask == "magnitude" and compose(REVIEWS).mask == "none"
    assert compose("sparse_mezo/reviews", ["mask=none"]).mask == "none"
    assert "recipe=lora_zo" in refused("sparse_mezo/reviews", "train=lora")
    assert "denoise_every=5" in refused("sparse_mezo/reviews", "denoise_every=5")
    assert compose("sparse_mezo/reviews", ["denoise_every=5", "mask=random"]).denoise_every == 5


def test_keys_are_documented_and_reachable():
    listed = [line for line in describe_keys().splitlines() if line.startswith("  ")]
    assert sorted(line.split()[0] for line in listed) == sorted(fields())
    assert {name for names in TOPICS.values() for name in names} <= set(fields())
    for name, f in fields().items():
        assert len(f.metadata["doc"]) > 5, name
        if name not in ("task", "task.choices", "task.columns"):
            assert parse(f"{name}=1" if re.search("int|float", str(f.type)) else f"{name}=true")[0] == name
    schema = {f.name for f in dataclasses.fields(Config)}
    assert schema == set(yaml.safe_load(to_yaml(compose(REVIEWS))))
    assert Path(packaged("recipes") / "mezo.py").is_file()


def test_a_key_is_explained_in_full():
    full = describe_key("lr", {"node": 2e-3})
    assert "learning rate" in full and "at least 0" in full and "lora 0.0001" in full and "node 0.002" in full
    for name in (*fields(), *topics()):
        assert describe_key(name, {}), name
    assert "\n  lr" not in describe_key("precision", {}) and "storage" in describe_key("precision", {})
    with pytest.raises(UserError, match="did you mean lora_rank"):
        describe_key("lorarank", {})


@pytest.mark.parametrize(
    "words,says",
    [
        (
            ["directions=example", "estimator=one_sided"],
            "estimator=one_sided: directions=example has two_sided losses; use directions=shared",
        ),
        (["directions=example", "meazo=0.9"], "meazo=0.9: directions=example has no state of the kind"),
        (
            ["directions=example", "perturb=inplace"],
            "perturb=inplace: one move of the weights serves all examples",
        ),
        (["directions=example", "objective=macro_f1"], "objective=macro_f1: it is no sum over examples"),
        (
            ["estimator=normalised"],
            "q=1: estimator=normalised needs the spread of several losses; use q=2 or more",
        ),
        (["estimator=normalised", "q=4", "clip=1"], "clip=1: estimator=normalised has no projected gradient"),
        (
            ["estimator=normalised", "q=4", "meazo=0.9"],
            "meazo=0.9: estimator=normalised has a scale of its own",
        ),
    ],
)
def test_what_a_normalised_estimate_does_not_go_with(words, says):
    assert says in refused(REVIEWS, *words)


def test_a_whole_number_is_a_learning_rate(tmp_path, monkeypatch):
    """In a file, where YAML reads an integer, and on the command line."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model: m\ntask: {name: reviews}\nlr: 1\n", encoding="utf-8")
    for found, want in ((compose("mine.yaml", []).lr, 1.0), (compose("mine.yaml", ["lr=0"]).lr, 0.0)):
        assert found == want and isinstance(found, float)
    assert compose("mine.yaml", ["lr=auto"]).lr == "auto"
