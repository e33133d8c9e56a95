"""Limits: what is beyond them is refused in time and without the memory, what is within them is as without them."""

import json
import re
import signal
import threading
import time

import pytest

from zoft import limits
from zoft.console import escaped
from zoft.errors import UserError
from zoft.limits import at_most_memory, at_most_seconds, parse_json, read_bytes


def test_a_file_is_read_up_to_its_limit_and_not_beyond(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"x" * 10)
    assert read_bytes(file, 10, "") == b"x" * 10
    with pytest.raises(UserError, match="more than 9 bytes; raise it"):
        read_bytes(file, 9, "raise it")
    with file.open("wb") as hole:
        hole.truncate(1 << 40)
    with pytest.raises(UserError, match="no config"):
        read_bytes(file, 1000, "no config")


@pytest.mark.parametrize("depth", [1, 2, 99, 100, 101, 900, 100_000])
@pytest.mark.parametrize("kind", ["[{}]", '{{"a": {}}}'])
def test_nesting_is_read_up_to_its_limit(depth, kind):
    before, after = kind.format("|").split("|") if kind[0] == "[" else ('{"a": ', "}")
    if kind[0] == "[":
        before, after = "[", "]"
    text = before * depth + "1" + after * depth
    for given in (text, text.encode()):
        if depth <= limits.DEPTH:
            assert parse_json(given) == json.loads(text)
        else:
            with pytest.raises(ValueError, match="nested more than 100 deep"):
                parse_json(given)


def test_brackets_in_text_are_no_nesting():
    text = json.dumps({"a": "[" * 5000, "b": [[1]] * 500})
    assert parse_json(text) == json.loads(text)


def test_names_of_an_object_are_counted_and_told_apart_in_linear_time():
    names = [f'"n{i}": 1' for i in range(60_000)]
    began = time.monotonic()
    with pytest.raises(ValueError, match="an object of 60,000 names; at most 10,000 are read"):
        parse_json("{" + ",".join(names) + "}")
    with pytest.raises(ValueError, match="'n5' is there twice"):
        parse_json("{" + ",".join([*names, names[5]]) + "}")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "work",
    [
        "while True: pass",
        "import time; time.sleep(20)",
        "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
        "while True:\n    try:\n        while True: pass\n    except Exception: pass",
    ],
)
def test_code_that_does_not_end_is_stopped(work):
    began = time.monotonic()
    with pytest.raises(UserError, match="^too long$"):
        with at_most_seconds(0.2, "too long"):
            exec(work, {})
    assert time.monotonic() - began < 5


def test_timers_nest_and_others_go_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    kept = signal.setitimer(signal.ITIMER_REAL, 0.3)  # a timer of pytest's, perhaps
    try:
        with at_most_seconds(5, "outer"):
            with pytest.raises(UserError, match="inner"):
                with at_most_seconds(0.1, "inner"):
                    time.sleep(5)
        assert not rung
        time.sleep(0.6)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *kept)


def test_another_thread_is_not_bounded_and_says_so_nowhere():
    done = []

    def work():
        with at_most_seconds(0.05, "never"):
            time.sleep(0.2)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_memory_beyond_the_limit_is_refused_and_free_again_afterwards():
    with pytest.raises(UserError, match="too large"):
        with at_most_memory(1 << 28, "too large"):
            b"x" * (1 << 30)
    with at_most_memory(1 << 28, "too large"):
        assert len(b"x" * (1 << 26)) == 1 << 26
    assert len(bytes(1 << 30)) == 1 << 30


def test_escaped_text_has_no_control_and_keeps_its_words():
    assert escaped("\x1b[31mred\x07\r\x9b2J") == "\\x1b[31mred\\x07\\r\\x9b2J"
    assert escaped("a\u202eb\u2066c\u2028d\ud800") == "a\\u202eb\\u2066c\\u2028d\\ud800"
    kept = "tab\tline\nnéxt 日本\u3000 👩\u200d🔬 שלום\xa0!"
    assert escaped(kept) == kept
    every = "".join(map(chr, range(0x110000)))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", escaped(every))
