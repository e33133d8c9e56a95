"""`zoft rank`: its server over HTTP, and its page in a real browser where one is at hand."""

import http.client
import json
import os
import shutil
import stat
import threading
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.cli.rank import RankServer, rank_run
from zoft.train.asked import Rollouts, answered, ask, place_of

NAME = "000003"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
TEXTS = [["good one", "5"], ["bad", "6"], [EVIL, "5"], ["", "7"]]  # [P][N]


@pytest.fixture
def run(tmp_path):
    """A run's folder that waits for the ranking of step 3."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: tiny\n")
    zeros = [[0.0, 0.0]] * 4
    ask(folder, NAME, 3, 11, Rollouts(["What is <b>best</b>?\nSay it.", "2 + 3"], TEXTS, zeros, zeros))
    return folder


@pytest.fixture
def server(run):
    made = RankServer(run, NAME)
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def post(server, what, tree, **headers):
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    request = urllib.request.Request(
        server.address + what, body, {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def letter(run, n, text):
    texts = json.loads(place_of(run, NAME).read_text())["questions"][n]["texts"]
    return next(k for k, v in texts.items() if v == text)


def test_an_answer_is_written_whole_and_read_by_the_run(run, server):
    found = json.loads(urllib.request.urlopen(server.address + "question").read())
    assert found["draft"] is None and set(found["question"]) == {"step", "questions"}
    first = {"order": [[letter(run, 0, "good one")], [letter(run, 0, "")]], "unknown": [letter(run, 0, EVIL)]}
    draft = {"step": 3, "at": 0, "rankings": [first, {"order": [], "unknown": []}]}
    assert post(server, "draft", draft)[0] == 200 and answered(run, NAME) is None
    again = json.loads(urllib.request.urlopen(server.address + "question").read())
    assert again["draft"]["rankings"][0] == first  # a page that is loaded again goes on
    second = {"order": [[letter(run, 1, "5")], [letter(run, 1, "7"), letter(run, 1, "6")]]}
    assert post(server, "answer", {"step": 3, "at": 1, "rankings": [first, second]})[0] == 200
    orders, wrote = answered(run, NAME)
    assert orders[0].tiers == ((0,), (3,)) and orders[0].unknown == {2}
    assert orders[1].tiers[0] == (0, 2) and set(orders[1].tiers[1]) == {1, 3}  # equal texts share a letter
    assert wrote.texts == TEXTS
    assert server.answered.is_set() and stat.S_ISREG(os.stat(place_of(run, NAME, "answer")).st_mode)
    assert "answered already" in post(server, "answer", {"step": 3, "at": 1, "rankings": [first, second]})[1]


@pytest.mark.parametrize(
    "what, tree, said",
    [
        ("answer", b"{", "no JSON"), ("answer", {"rankings": []}, "holds 0 rankings for 2 questions"),
        ("draft", {"step": 4, "rankings": [{"order": []}] * 2}, "another step"),
        ("draft", {"step": 3, "at": 9, "rankings": [{"order": []}] * 2}, "another step"),
        ("answer", {"step": 3, "rankings": [{"order": [["q"]]}, {"order": []}]}, "ranking 1 names q"),
        ("nothing", {}, "not understood"),
    ],
)  # fmt: skip
def test_what_is_no_answer_writes_nothing(run, server, what, tree, said):
    status, text = post(server, what, tree)
    assert status == 400 and said in text
    assert not place_of(run, NAME, "answer").exists() and not place_of(run, NAME, "draft").exists()


def test_nobody_else_is_let_in(run, server):
    def status(path, **headers):
        link = http.client.HTTPConnection("127.0.0.1", server.server_port)
        link.request("GET", path, headers=headers)
        return link.getresponse().status

    mine = f"/{server.token}/question"
    assert status(mine) == 200 and len(server.token) >= 32
    for path in (
        "/",
        "/question",
        f"/{server.token[:-1]}/question",
        "//question",
        f"/{server.token}/../../etc/passwd",
        "/é"[:1] + "%e9/",
    ):
        assert status(path) == 404, path
    assert status(mine, Host="evil.example") == 404  # a name that was pointed here
    assert status(mine, Origin="http://evil.example") == 404
    assert post(server, "answer", {}, Origin="http://evil.example")[0] == 404
    assert server.server_address[0] == "127.0.0.1"
    with urllib.request.urlopen(server.address) as reply:
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        assert server.token not in reply.read().decode()


def test_the_verb_serves_until_it_is_answered(run):
    said = []
    thread = threading.Thread(target=rank_run, args=(str(run), 0, said.append))
    thread.start()
    while not said:
        pass
    address = said[0].rpartition(" ")[2]
    body = json.dumps({"step": 3, "at": 1, "rankings": [{"order": []}, {"order": []}]}).encode()
    urllib.request.urlopen(urllib.request.Request(address + "answer", body)).read()
    thread.join(10)
    assert not thread.is_alive() and "go on with `zoft train --resume" in said[1]
    done = CliRunner().invoke(app, ["rank", str(run)])
    assert done.exit_code == 2 and "waits for no ranking" in done.stderr
    done = CliRunner().invoke(app, ["rank", str(run / "none")])
    assert done.exit_code == 2 and "not a run's folder" in done.stderr


@pytest.fixture
def page(server):
    """The page in headless Chromium, as wide as a phone."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 375, "height": 700})
        shown.problems = []
        shown.on("pageerror", lambda error: shown.problems.append(str(error)))
        shown.goto(server.address)
        shown.wait_for_selector(".card")
        yield shown
        browser.close()


def test_a_person_ranks_with_mouse_and_keys(run, server, page):
    def texts():
        return page.eval_on_selector_all(".pick", "all => all.map(x => x.textContent)")

    def ranks():
        return page.eval_on_selector_all(".rank", "all => all.map(x => x.textContent)")

    assert sorted(texts()) == sorted(["good one", "bad", EVIL, "(nothing)"])  # as text, not as markup
    assert page.title() == "zoft rank" and page.inner_text("#prompt") == "What is <b>best</b>?\nSay it."
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 375, wide  # nothing sticks out of a phone
    page.screenshot(path=os.environ.get("ZOFT_SCREENSHOT", str(run / "phone.png")))
    at = {t: i for i, t in enumerate(texts())}
    page.click(f".card:nth-child({at['good one'] + 1}) .pick")
    page.keyboard.press(str(at["bad"] + 1))
    assert ranks()[at["good one"]] == "1." and ranks()[at["bad"]] == "2."
    page.keyboard.press("=")
    page.keyboard.press(str(at["(nothing)"] + 1))
    assert ranks()[at["bad"]] == ranks()[at["(nothing)"]] == "2. (tied)"
    page.keyboard.press("u")
    assert ranks()[at["bad"]] == "2." and not ranks()[at["(nothing)"]].startswith("2")
    page.click(f".card:nth-child({at[EVIL] + 1}) [data-unsure]")
    assert ranks()[at[EVIL]] == "cannot tell"
    page.reload()  # what was chosen is kept
    page.wait_for_selector(".card.ranked")
    assert ranks()[at["bad"]] == "2." and ranks()[at[EVIL]] == "cannot tell"
    page.keyboard.press("Enter")
    assert "question 2 of 2" in page.inner_text("#state")
    page.click("#back")
    assert "question 1 of 2" in page.inner_text("#state")
    page.click("#next")
    place = texts()
    page.keyboard.press(str(place.index("7") + 1))
    page.click(f".card:nth-child({place.index('7') + 1}) .pick")  # a second time takes it back
    page.click(f".card:nth-child({place.index('6') + 1}) .pick")
    page.click("#next")
    page.wait_for_selector("#end")
    assert "saved" in page.inner_text("#end") and not page.problems
    orders, _ = answered(run, NAME)
    assert orders[0].tiers == ((0,), (1,)) and orders[0].unknown == {2}
    assert orders[1].tiers == ((1,),)
