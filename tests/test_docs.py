"""Commands and links of the pages in docs/: what they name is there, and every config that they train is a valid one."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.schema import fields

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def commands(page):
    """The `zoft` lines of a page's code blocks, fenced or indented, with continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r"(    )?zoft \w", line)]


TRAINED = [(p, line) for p in PAGES for line in commands(p) if line.startswith("zoft train")]


def test_there_are_commands():
    assert len(TRAINED) > 10


@pytest.mark.parametrize("page, line", TRAINED, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(TRAINED)])
def test_a_page_trains_what_can_be_trained(page, line, monkeypatch, tmp_path):
    """`zoft validate` of the same words: keys, values and what does not go together."""
    words = shlex.split(line, comments=True)[2:]
    if "--recipe" in words or "--resume" in words:
        pytest.skip("a page of the reader's own, or a run, which another test makes")
    for option in {"--nproc", "--reward"} & {*words}:
        at = words.index(option)
        del words[at : at + 2]
        words += ["objective=f1"] if option == "--reward" else []  # a file of the reader's own; of text, too
    words = ["mezo/reviews" if w.endswith(".yaml") else w for w in words]  # a config of the reader's own
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["validate", *words])
    assert result.exit_code == 0, (page.name, line, result.output, result.stderr)


def test_every_page_and_picture_that_is_linked_exists():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_every_key_that_a_page_sets_exists():
    known = {*fields(), "task"}
    for page in PAGES:
        if page.name == "decisions.md":  # it tells of keys that are gone, too
            continue
        for name in re.findall(r"`([a-z_]+)=[^`]*`", page.read_text(encoding="utf-8")):
            assert name in known, (page.name, name)
