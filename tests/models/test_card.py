"""The card of a saved model: what it says is true, and its commands open and rebuild the weights."""

import contextlib
import json
import os
import re
import shlex

import pytest
import tiny
from safetensors.torch import load_file
from typer.testing import CliRunner

from zoft.cli.main import app

WAYS = {
    "model": ([], "model"),
    "adapter": (["recipe=lora_zo"], "adapter"),
    "codes": (["recipe=qzo", "bits=8", "group=32", "lr=1e-3", "eps=1e-2"], "model"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_card_has_what_a_user_needs(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.place(tmp_path, "max_length: 32\n")
    keys, name = WAYS[way]
    zoft("train", "--config", "mine.yaml", "steps=3", "seed=1", "threads=1", "output_dir=run", *keys)
    folder = tmp_path / "run" / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    titles = re.findall(r"^## (.*)$", card, re.M)
    assert titles == ["Base", "Data", "Method", "Results", "Rebuild it", "Load it"]
    assert "tiny" in card and "| steps | 3 |" in card and "| label words |" in card
    for metric in result["after"]:
        told = re.search(rf"^\| {metric} \| (.*) \| (.*) \|$", card, re.M)
        assert [float(x) for x in told.groups()] == pytest.approx(
            [result[when][metric] for when in ("before", "after")], rel=1e-3
        )
    (rebuild,) = re.findall(r"```bash\n(.*)\n```", card)
    zoft(*shlex.split(rebuild.replace("RUN", "run").replace("DIR", "again"))[1:])
    (file,) = folder.glob("*.safetensors")
    made, again = load_file(file), load_file(tmp_path / "again" / file.name)
    assert made.keys() == again.keys() and all(made[n].equal(again[n]) for n in made)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    opened: dict = {}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        exec(code.replace("FOLDER", str(folder)), opened)
    assert sum(p.numel() for p in opened["model"].parameters()) > 0


def test_weights_on_the_way_claim_no_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.place(tmp_path, "max_length: 32\n")
    zoft("train", "--config", "mine.yaml", "steps=3", "threads=1", "output_dir=run")
    zoft("replay", "run", "--step", "2", "--out", "two")
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert (
        "| steps | 2 of 3 |" in card and "no evaluation of their own" in card and "| accuracy |" not in card
    )


def zoft(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, (words, done.output, done.stderr, done.exception)
