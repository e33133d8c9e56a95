"""Configs and command lines from anybody: refused in one line before anything loads, and none runs code."""

import gzip
import json
import os

import hostile
import pytest

OK = "model: tiny\ntask: {name: local, train: data.jsonl, prompt: '{text} ', label: label, choices: {a: a, b: b}}\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join(['*' + a] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi")
)
TASK = "name: local, train: data.jsonl, prompt: '{text} ', label: label"

# name -> the whole file
FILES = {
    "empty": "",
    "blank lines": "\n \n",
    "a comment": "# nothing\n",
    "null": "null\n",
    "a list": "- a\n- b\n",
    "a word": "hello\n",
    "a number": "3\n",
    "two documents": f"{OK}---\n{OK}",
    "tabs": "model:\ttiny\n\ttask: x\n",
    "bad indentation": f"{OK}  lr: 1\n",
    "unclosed list": f"{OK}lr: [1\n",
    "unclosed map": f"{OK}lr: {{a: 1\n",
    "unclosed quote": f"{OK}train: 'all\n",
    "no colon": f"{OK}lr 1\n",
    "latin-1": OK.encode() + b"train: caf\xe9\n",
    "utf-16": OK.encode("utf-16"),
    "zero bytes": OK.encode() + b"train: a\0b\n",
    "only zero bytes": b"\0" * 1000,
    "binary": bytes(range(256)),
    "gzip": gzip.compress(OK.encode(), mtime=0),
    "elf": b"\x7fELF\x02\x01\x01" + b"\0" * 100,
    "base 8": f"{OK}seed: 010\n",
    "base 8, below": f"model: tiny\ntask: {{{TASK}, num_train: 0_17, choices: {{a: a, b: b}}}}\n",
    "base 60": f"{OK}steps: 1:30\n",
    "base 60, a fraction": f"{OK}lr: 1:30.5\n",
    "a key twice": f"{OK}lr: 1\nlr: 2\n",
    "a key twice, below": f"model: tiny\ntask: {{{TASK}, label: x, choices: {{a: a, b: b}}}}\n",
    "a label twice": f"model: tiny\ntask: {{{TASK}, choices: {{a: a, b: b, a: c}}}}\n",
    "a label twice, as text": f"model: tiny\ntask: {{{TASK}, choices: {{0: a, '0': b}}}}\n",
    "a label twice, as words": f"model: tiny\ntask: {{{TASK}, choices: {{yes: a, true: b}}}}\n",
    "a label twice, as bool and text": f"model: tiny\ntask: {{{TASK}, choices: {{yes: a, 'true': b}}}}\n",
    "unknown key": f"{OK}lrr: 1\n",
    "unknown key below": f"model: tiny\ntask: {{{TASK}, promt: x}}\n",
    "key with a dot": f"{OK}task.train: x\n",
    "number as key": f"{OK}1: 2\n",
    "null as key": f"{OK}null: 2\n",
    "list as key": f"{OK}? [a, b]\n: 2\n",
    "map as key": f"{OK}? {{a: b}}\n: 2\n",
    "nan as key": f"{OK}.nan: 2\n",
    "number as key below": f"model: tiny\ntask: {{{TASK}, 1: x}}\n",
    "python object": f"{OK}train: !!python/object/apply:os.system ['touch pwned']\n",
    "python object, new": f"{OK}train: !!python/object/new:os.system ['touch pwned']\n",
    "python name": f"{OK}train: !!python/name:os.system\n",
    "python module": f"{OK}train: !!python/module:os\n",
    "python tuple": f"{OK}train: !!python/tuple [a]\n",
    "a tag of its own": f"{OK}train: !evil x\n",
    "binary tag": f"{OK}train: !!binary aGVsbG8=\n",
    "set tag": f"{OK}train: !!set {{a}}\n",
    "float tag on text": f"{OK}lr: !!float high\n",
    "a date": f"{OK}seed: 2024-01-01\n",
    "a date that is none": f"{OK}seed: 2024-13-41\n",
    "a number of 10,000 digits": f"{OK}seed: {'9' * 10000}\n",
    "_target_": f"{OK}_target_: os.system\n",
    "_target_ below": f"model: tiny\ntask: {{{TASK}, _target_: os.system}}\n",
    "_target_ as model": "model: {_target_: os.system, command: touch pwned}\ntask: reviews\n",
    "_target_ as lr": f"{OK}lr: {{_target_: os.system}}\n",
    "_args_": f"{OK}_args_: [x]\n",
    "environment": f"{OK}train: ${{oc.env:HOME}}\n",
    "environment in a number": f"{OK}lr: ${{oc.env:HOME}}\n",
    "environment in a label": f"model: tiny\ntask: {{{TASK}, choices: {{a: '${{oc.env:HOME}}', b: b}}}}\n",
    "environment, built": "model: tiny\ntask: {name: local, train: data.jsonl, prompt: '${${task.label}:HOME}', label: oc.env, choices: {a: a, b: b}}\n",
    "environment behind backslashes": f"{OK}train: '\\\\${{oc.env:HOME}}'\n",
    "environment in the output": f"{OK}output_dir: ${{oc.env:HOME}}/x\n",
    "decode": f"{OK}train: ${{oc.decode:x}}\n",
    "create": f"{OK}train: ${{oc.create:x}}\n",
    "dict values": f"{OK}train: ${{oc.dict.values:task}}\n",
    "time": f"{OK}output_dir: ${{now:%Y}}\n",
    "hydra's": f"{OK}output_dir: ${{hydra:runtime.cwd}}\n",
    "itself": f"{OK}train: ${{train}}\n",
    "a cycle": f"{OK}train: ${{noise}}\nnoise: ${{train}}\n",
    "a key that is none": f"{OK}train: ${{nope}}\n",
    "unclosed interpolation": f"{OK}train: '${{lr'\n",
    "wrong type by reference": f"{OK}lr: ${{model}}\n",
    "a whole group by reference": f"{OK}train: ${{task}}\n",
    "defaults, a word": f"defaults: mezo/reviews\n{OK}",
    "defaults, a map": f"defaults: {{task: reviews}}\n{OK}",
    "defaults out of the folder": f"defaults: [../../etc/passwd]\n{OK}",
    "defaults, absolute": f"defaults: [/etc/passwd]\n{OK}",
    "defaults, a group out of the folder": "defaults: [{/task: ../../../etc/passwd}]\nmodel: tiny\n",
    "defaults, a url": f"defaults: ['file:///etc/passwd']\n{OK}",
    "defaults, a package": f"defaults: ['pkg://os/x']\n{OK}",
    "defaults, hydra's launcher": f"defaults: [{{override hydra/launcher: submitit}}]\n{OK}",
    "defaults, an environment variable": "defaults: [{/task: '${oc.env:HOME}'}]\nmodel: tiny\n",
    "defaults, unknown": f"defaults: [mezo/nothing]\n{OK}",
    "defaults, itself": f"defaults: [mine, _self_]\n{OK}",
    "defaults, two in one": f"defaults: [{{a: b, c: d}}]\n{OK}",
    "defaults, a list in it": f"defaults: [[1]]\n{OK}",
    "defaults, a number": f"defaults: [1.5]\n{OK}",
    "defaults, too many words": f"defaults: [{{a b c: d}}]\n{OK}",
    "hydra": f"{OK}hydra: {{run: {{dir: x}}}}\n",
    "hydra's search path": f"{OK}hydra: {{searchpath: [file:///]}}\n",
    "a billion laughs": BOMB,
    "a billion merges": MERGES,
    "an alias": f"{OK}train: &x all\nnoise: *x\n",
    "an alias in itself": "model: &x [*x]\n",
    "20,000 deep": f"{OK}lr: {'[' * 20000}\n",
    "2,000 deep, closed": f"{OK}lr: {'[' * 2000}{']' * 2000}\n",
    "2,000 maps deep": f"{OK}lr: {'{a: ' * 2000}1{'}' * 2000}\n",
    "two megabytes": f"{OK}train: {'x' * 2_000_000}\n",
    "code of a model": f"{OK}trust_remote_code: true\n",
    "code of a model, as text": f"{OK}trust_remote_code: 'true'\n",
    "out of the folder": f"{OK}output_dir: ../../x\n",
    "out of the folder, hidden": f"{OK}output_dir: runs/../../x\n",
    "out of the folder by reference": f"{OK}model: ../x\noutput_dir: runs/${{model}}\n",
    "absolute output": f"{OK}output_dir: /tmp/zoft-hostile\n",
    "output at home": f"{OK}output_dir: ~/zoft-hostile\n",
    "output with a zero byte": f'{OK}output_dir: "a\\0b"\n',
    "output empty": f"{OK}output_dir: ''\n",
    "half a character": f'{OK}train: "\\uD800"\n',
    "half a character in a label": f'model: tiny\ntask: {{{TASK}, choices: {{a: "\\uD800", b: b}}}}\n',
    "task, a list": "model: tiny\ntask: [reviews]\n",
    "task, a number": "model: tiny\ntask: 3\n",
    "task, none": "model: tiny\ntask: null\n",
    "task out of the folder": "model: tiny\ntask: ../../etc/passwd\n",
    "task, absolute": "model: tiny\ntask: /etc/passwd\n",
    "task, unknown": "model: tiny\ntask: nothing\n",
    "model, a list": f"{OK}model: [a]\n".replace("model: tiny\n", ""),
    "model, missing": OK.replace("model: tiny\n", ""),
    "model, blank": OK.replace("model: tiny", "model: '  '"),
    "model, mandatory": OK.replace("model: tiny", "model: ???"),
    "choices, a list": f"model: tiny\ntask: {{{TASK}, choices: [a, b]}}\n",
    "choices, text": f"model: tiny\ntask: {{{TASK}, choices: ab}}\n",
    "choices, lists in it": f"model: tiny\ntask: {{{TASK}, choices: {{a: [x], b: b}}}}\n",
    "choices, maps in it": f"model: tiny\ntask: {{{TASK}, choices: {{a: {{x: y}}, b: b}}}}\n",
    "prompt, a list": f"{OK}".replace("'{text} '", "[text]"),
}
# key -> values that it may not have, in a file as on the command line
VALUES = {
    "lr": [".nan", ".inf", "-.inf", "-1", "high", "[1]", "{a: b}", "true", "null", "1e-3x", "0x", "1e400"],
    "eps": ["0", "-1", "1e-60", "1e60", ".nan"],
    "seed": ["-1", "1.5", "18446744073709551616", "x"],
    "steps": ["0", "-3", "1.5", "4294967296", "many"],
    "q": ["0", "100000", "two"],
    "batch_size": ["0", "1000000000000", "1.5"],
    "accumulate": ["0"],
    "warmup": ["-1", "1.5", "20000"],
    "momentum": ["1", "-0.1", "2"],
    "weight_decay": ["-1", "1e30"],
    "max_length": ["1", "-5"],
    "max_skipped": ["0"],
    "on_divergence": ["explode"],
    "threads": ["0", "10000000", "some"],
    "device": ["tpu", "'cuda:x'", "'cpu:0; rm'"],
    "storage": ["int4"],
    "compute": ["fp8"],
    "save_dtype": ["float32"],
    "noise": ["cauchy", "gausian"],
    "schedule": ["exponential"],
    "perturb": ["outplace"],
    "probes_per_forward": ["0", "two"],
    "cache_frozen": ["maybe", "3"],
    "track": ["tensorboard"],
    "recipe": ["../../x", "mezo.py", "__init__", "os", "mezo/x"],
    "train": ["'('", "last-0", "'*'"],
    "eval_every": ["-1"],
    "eval_limit": ["0"],
    "save_model": ["perhaps", "2"],
}
VALUE_FILES = [(key, value) for key, values in VALUES.items() for value in values]

# Command lines that no config is needed for, and what the answer must name.
LINES = {
    "no such verb": (["frobnicate"], "no such verb"),
    "a verb misspelt": (["trian"], "did you mean train?"),
    "a verb in capitals": (["TRAIN"], "no such verb"),
    "a path as verb": (["../../bin/sh"], "no such verb"),
    "an escape sequence as verb": (["\x1b[31mred\x07"], "\\x1b"),
    "no such option": (["--frobnicate"], "--frobnicate"),
    "no such option of a verb": (["replay", "run", "--frobnicate"], "--frobnicate"),
    "replay of nothing": (["replay"], "RUN"),
    "replay of two": (["replay", "run", "run", "--out", "x"], ""),
    "replay of no folder": (["replay", "nowhere", "--out", "x"], "not a run's folder"),
    "replay onto a file": (["replay", "run", "--out", "data.jsonl"], "exists"),
    "replay onto the run": (["replay", "run", "--out", "run"], "exists"),
    "cp without a name": (["cp", "mezo/reviews"], ""),
    "cp of nothing": (["cp"], ""),
    "cp out of the configs": (["cp", "../../etc/passwd", "x.yaml"], "no such config"),
    "cp of a path": (["cp", "/etc/passwd", "x.yaml"], "no such config"),
    "cp onto a file": (["cp", "mezo/reviews", "mine.yaml"], "exists"),
    "cp into a file": (["cp", "mezo/reviews", "mine.yaml/x.yaml"], "mine.yaml"),
    "cp under another name": (["cp", "mezo/reviews", "x.txt"], ".yaml"),
    "config without a name": (["train", "--config"], "--config"),
    "config, empty": (["train", "--config", ""], "--config"),
    "config out of the configs": (["train", "--config", "../mezo/reviews"], "no such config"),
    "config, a round trip": (["train", "--config", "mezo/../mezo/reviews"], "no such config"),
    "config, absolute": (["train", "--config", "/etc/passwd"], ""),
    "config, a group": (["train", "--config", "mezo"], "no such config"),
    "config, a slash too many": (["train", "--config", "mezo/reviews/"], "no such config"),
    "config, backslashes": (["train", "--config", "mezo\\reviews"], "no such config"),
    "config, a task": (["train", "--config", "task/reviews"], "no such config"),
    "config, zero byte": (["train", "--config", "a\0b.yaml"], "no such"),
    "config, zero byte, no suffix": (["train", "--config", "a\0b"], "no such"),
    "config, a name too long": (["train", "--config", "a" * 5000], "no such"),
    "config, a name too long, yaml": (["train", "--config", "a" * 5000 + ".yaml"], "no such"),
    "config, a folder": (["train", "--config", "tiny"], "no such config"),
    "config, the data": (["train", "--config", "data.jsonl"], ".yaml"),
    "config, the model": (["train", "--config", "tiny/model.safetensors"], ".yaml"),
    "config, a device": (["train", "--config", "/dev/zero"], "no such"),
    "a key twice": (["validate", "--config", "mine.yaml", "lr=1", "lr=2"], "lr is given twice"),
    "a key twice, the same": (["validate", "--config", "mine.yaml", "lr=1", "steps=3", "lr=1"], "twice"),
    "a task's key twice": (["validate", "--config", "mine.yaml", "task.label=a", "task.label=b"], "twice"),
    "a group twice": (["validate", "--config", "mine.yaml", "task=reviews", "task=trec"], "twice"),
    "no key": (["validate", "--config", "mine.yaml", "=3"], ""),
    "a key of a key": (["validate", "--config", "mine.yaml", "lr.x=3"], "lr.x"),
    "hydra's key": (["validate", "--config", "mine.yaml", "hydra.run.dir=x"], "unknown key"),
    "_target_": (["validate", "--config", "mine.yaml", "_target_=os.system"], "unknown key"),
    "a key's attributes": (["validate", "--config", "mine.yaml", "__class__=x"], "unknown key"),
    "an added key": (["validate", "--config", "mine.yaml", "+lr=1"], "without +"),
    "a removed key": (["validate", "--config", "mine.yaml", "~lr"], "without ~"),
    "a sweep": (["validate", "--config", "mine.yaml", "lr=1,2"], "sweep"),
    "a function": (["validate", "--config", "mine.yaml", "lr=choice(1,2)"], "sweep"),
    "python in choices": (["validate", "--config", "mine.yaml", "task.choices=!!python/name:os.system"], "task.choices"),
    "aliases in choices": (["validate", "--config", "mine.yaml", "task.choices={a: &x y, b: *x}"], "task.choices"),
    "a label twice": (["validate", "--config", "mine.yaml", "task.choices={a: x, a: y}"], "task.choices"),
    "deep choices": (["validate", "--config", "mine.yaml", "task.choices=" + "[" * 20000], "task.choices"),
    "environment": (["validate", "--config", "mine.yaml", "output_dir=${oc.env:HOME}"], "resolver"),
    "environment, built": (["validate", "--config", "mine.yaml", "task.prompt=${${task.label}:HOME}", "task.label=oc.env"], "resolver"),
    "task out of the configs": (["validate", "--config", "mine.yaml", "task=../../etc/passwd"], "task="),
    "recipe out of the recipes": (["validate", "--config", "mine.yaml", "recipe=../setup"], "recipe="),
    "bytes that are no text": (["validate", "--config", "mine.yaml", "train=\udcff"], "train: holds bytes"),
    "bytes that are no text, in a key": (["validate", "--config", "mine.yaml", "\udcff=1"], "unknown key"),
    "a zero byte": (["validate", "--config", "mine.yaml", "output_dir=a\0b"], "zero byte"),
    "output too long": (["train", "--config", "mine.yaml", "output_dir=" + "x" * 300], "output_dir"),
    "output onto a file": (["train", "--config", "mine.yaml", "output_dir=data.jsonl"], "data.jsonl"),
    "output into a file": (["train", "--config", "mine.yaml", "output_dir=data.jsonl/x"], "data.jsonl"),
    "output onto a run": (["train", "--config", "mine.yaml", "output_dir=run"], "holds a run"),
    "output nowhere": (["train", "--config", "mine.yaml", "output_dir=/proc/1/x"], "output_dir"),
    "output, empty": (["train", "--config", "mine.yaml", "output_dir="], "output_dir is empty"),
    "model, zero byte": (["train", "--config", "mine.yaml", "output_dir=out", "model=a\0b"], "zero byte"),
    "model, too long": (["train", "--config", "mine.yaml", "output_dir=out", "model=" + "x" * 5000], "model="),
    "model, a script": (["train", "--config", "mine.yaml", "output_dir=out", "model=mine.yaml"], ".gguf"),
    "model, a url": (["train", "--config", "mine.yaml", "output_dir=out", "model=https://x.org/m"], "no such"),
    "model, out of here": (["train", "--config", "mine.yaml", "output_dir=out", "model=../../../nowhere"], "no such"),
    "device that is not there": (["train", "--config", "mine.yaml", "output_dir=out", "device=cuda:77"], "device=cuda:77"),
    "train of no tensor": (["train", "--config", "mine.yaml", "output_dir=out", "train=nothing_like_it"], "selects no tensor"),
    "train of blocks that are not there": (["train", "--config", "mine.yaml", "output_dir=out", "train=last-99"], "2 blocks"),
    "resume of no run": (["train", "--resume", "tiny"], "not a run's folder"),
    "resume of nothing": (["train", "--resume", ""], "not a run's folder"),
    "resume with other keys": (["train", "--resume", "run", "lr=1"], "leave lr=1 out"),
    "eval of nothing": (["eval"], "one run's folder"),
    "eval of two": (["eval", "run", "run"], "one run's folder"),
    "eval of a file": (["eval", "data.jsonl"], "not a run's folder"),
    "data of no examples": (["data", "--config", "mine.yaml", "-n", "0"], "-n"),
    "data of some examples": (["data", "--config", "mine.yaml", "-n", "some"], "-n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder for all cases: none of them may change it, but for the file that is the case itself."""
    return hostile.copy(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file(place, name):
    text = FILES[name]
    (place / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = hostile.refused(place, ["validate", "--config", "mine.yaml"])
    assert os.environ["HOME"] not in said
    assert not (place / "pwned").exists()


@pytest.mark.parametrize(("key", "value"), VALUE_FILES)
def test_a_value_out_of_range_in_a_file(place, key, value):
    (place / "mine.yaml").write_text(f"{OK}{key}: {value}\n")
    hostile.refused(place, ["validate", "--config", "mine.yaml"], key)


@pytest.mark.parametrize("name", LINES)
def test_a_hostile_command_line(place, name):
    args, *parts = LINES[name]
    (place / "mine.yaml").write_text(json.dumps(hostile.CONFIG))
    hostile.refused(place, args, parts[0])


def test_a_defaults_list_is_followed_by_the_same_rules(place):
    (place / "mine.yaml").write_text(f"defaults: [other, _self_]\n{OK}")
    (place / "task").mkdir()
    for text, part in (("lr: 1\nlr: 2\n", "twice"), (BOMB, "aliases"), ("defaults: [../x]\n", "../x")):
        (place / "other.yaml").write_text(text)
        assert part in hostile.refused(place, ["validate", "--config", "mine.yaml"])
    (place / "other.yaml").write_text("defaults: [mine]\n")
    assert "lead back" in hostile.refused(place, ["validate", "--config", "mine.yaml"])
    (place / "other.yaml").write_text("lr: 1\n")
    (place / "task" / "own.yaml").write_text(BOMB)
    (place / "mine.yaml").write_text("model: tiny\ntask: own\n")
    assert "aliases" in hostile.refused(place, ["validate", "--config", "mine.yaml"])
    (place / "mine.yaml").write_text("defaults: [{task: own}]\nmodel: tiny\n")
    assert "aliases" in hostile.refused(place, ["validate", "--config", "mine.yaml"])


def test_files_that_are_none(place):
    links = {"loop": "loop.yaml", "nowhere": "not/there.yaml", "zeros": "/dev/zero"}
    for name, target in links.items():
        (place / f"{name}.yaml").symlink_to(target)
        hostile.refused(place, ["validate", "--config", f"{name}.yaml"], "no such file")
    (place / "folder.yaml").mkdir()
    hostile.refused(place, ["validate", "--config", "folder.yaml"], "no such file")
    os.mkfifo(place / "pipe.yaml")
    hostile.refused(place, ["validate", "--config", "pipe.yaml"], "no such file")
    (place / "pipe.yaml").unlink()


def test_permissions(place):
    (place / "mine.yaml").write_text(OK)
    (place / "mine.yaml").chmod(0)
    (place / "closed" / "inner").mkdir(parents=True)
    (place / "closed" / "inner" / "x.yaml").write_text(OK)
    (place / "closed").chmod(0)
    try:
        with hostile.no_privileges(), pytest.raises(PermissionError):
            (place / "mine.yaml").read_bytes()
        for args, part in (
            (["validate", "--config", "mine.yaml"], "Permission denied"),
            (["validate", "--config", "closed/inner/x.yaml"], "no such file"),
            (["train", "--resume", "closed/inner"], "not a run's folder"),
            (["train", "--config", "mezo/reviews", "output_dir=closed/x"], "output_dir=closed/x"),
            (["train", "--config", "mezo/reviews", "output_dir=closed/inner/x"], "closed"),
            (["cp", "mezo/reviews", "closed/x.yaml"], "closed"),
            (["replay", "run", "--out", "closed/x"], "closed"),
        ):
            before = hostile.digest(place)
            with hostile.no_privileges(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(hostile, "digest", lambda folder: None)
                hostile.refused(place, args, part)
            assert hostile.digest(place) == before
    finally:
        (place / "closed").chmod(0o755)
        (place / "mine.yaml").chmod(0o644)
