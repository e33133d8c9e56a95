"""Processes that zoft starts import nothing from the folder they work in: files there may be a stranger's."""

import os
import signal
import subprocess
import time

import pytest
import tiny

from zoft.packages import zoft_command

PLANTED = ("typer", "datasets", "peft", "json", "recipes", "site", "numba")


@pytest.fixture
def place(tmp_path):
    """Return a folder to train in with modules that leave a trace when they are imported."""
    tiny.place(tmp_path, "steps: 2\nbatch_size: 2\nmax_length: 32\nthreads: 1\neval_limit: 4\nq: 2\n")
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(
            f"open('{tmp_path}/ran-{name}', 'w').close()\nraise ImportError('planted')\n"
        )
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", "mine.yaml", "--nproc", "2"],
        ["train", "--config", "mine.yaml", "--nproc", "2", "elastic=true"],
        ["sweep", "--config", "mine.yaml", "lr=1e-4,1e-5", "output_dir=s", "--jobs", "1"],
    ],
)
def test_what_lies_in_the_folder_is_never_imported(place, words):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        zoft_command(*words), cwd=place, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(place.glob("ran-*"))


def listening(pid):
    """Return the addresses on which a process listens, from /proc: hexadecimal, loopback is 0100007F."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:  # closed meanwhile
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/{pid}/net/{table}").read().splitlines()[1:]:
            part = line.split()
            if part[3] == "0A" and f"socket:[{part[9]}]" in inodes:
                found.append(part[1].partition(":")[0])
    return found


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux's /proc")
def test_processes_of_one_machine_listen_on_loopback_alone(tmp_path):
    tiny.place(
        tmp_path,
        "steps: 100000\nbatch_size: 2\nmax_length: 32\nthreads: 1\neval_limit: 4\nsave_model: false\n",
    )
    words = zoft_command("train", "--config", "mine.yaml", "--nproc", "2", "output_dir=run")
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ledger, began = tmp_path / "run" / "ledger", time.monotonic()
        while not ledger.exists() or ledger.stat().st_size < 10_000:
            assert process.poll() is None and time.monotonic() - began < 120
            time.sleep(0.1)
        children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        found = [address for pid in [str(process.pid), *children] for address in listening(pid)]
        assert len(children) == 2 and found and set(found) == {"0100007F"}, found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
