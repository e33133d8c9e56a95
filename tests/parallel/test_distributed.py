"""Several processes: the bits of one where rows per product agree, its losses within rounding where they do not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

from zoft.config.schema import Config, Task
from zoft.errors import UserError
from zoft.ledger.log import read_ledger
from zoft.method.space import Trained
from zoft.parallel import world
from zoft.parallel.world import World, probe_grid, weights_digest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = ranks.make_place(tmp_path_factory.mktemp("work"))
    assert ranks.zoft(folder, "output_dir=one", "snapshot_every=20") == [0]
    return folder


def said(place, rank=0):
    return (place / f"said-{rank}").read_text()


def same(place, name, other="one"):
    return all(
        (place / name / f).read_bytes() == (place / other / f).read_bytes()
        for f in ("ledger", "model/model.safetensors")
    )


def losses(folder):
    return np.array([r.losses for r in read_ledger(folder / "ledger").records])


def test_probes_over_two_processes_are_the_run_of_one_to_the_bit(place):
    assert ranks.zoft(place, "output_dir=probes", "snapshot_every=20", size=2) == [0, 0]
    assert same(place, "probes")
    assert "parallel=probes: each has 1 of 2 probes per step, 4 of 4 examples per batch" in said(place)
    assert said(place, 1) == ""  # rank 0 alone speaks
    result = json.loads((place / "probes" / "result.json").read_text())
    assert result["wire_bytes"] == 50 * 16  # a loss sum and a count in fp64: one probe a process a step
    one = json.loads((place / "one" / "result.json").read_text())
    assert result["after"] == one["after"] and result["before"] == one["before"]
    assert (place / "probes" / "snapshots").is_dir()


def test_directions_over_two_processes(place):
    keys = ["q=3", "steps=10", "meazo=0.9", "clip=5", "accumulate=2", "noise=rademacher"]
    assert ranks.zoft(place, "output_dir=q-one", *keys) == [0]
    assert ranks.zoft(place, "output_dir=q-two", *keys, size=2) == [0, 0]
    assert same(place, "q-two", "q-one")
    assert json.loads((place / "q-two" / "result.json").read_text())["wire_bytes"] == 10 * 3 * 16


@pytest.mark.parametrize("kind", ["gaussian", "rank1"])
def test_a_direction_per_example_over_two_processes(place, kind):
    """Probes dealt out: the bits of one process. Examples dealt out: each process asks its own about their directions."""
    keys = ["steps=10", "accumulate=2", "directions=example", f"noise={kind}", "save_model=false"]
    names = [f"{kind}-{how}" for how in ("one", "probes", "data")]
    assert ranks.zoft(place, f"output_dir={names[0]}", *keys) == [0]
    assert ranks.zoft(place, f"output_dir={names[1]}", "parallel=probes", *keys, size=2) == [0, 0]
    assert (place / names[1] / "ledger").read_bytes() == (place / names[0] / "ledger").read_bytes()
    assert ranks.zoft(place, f"output_dir={names[2]}", "parallel=data", "lr=0", *keys, size=2) == [0, 0]
    first = losses(place / names[0])[0], losses(place / names[2])[0]
    assert len(first[0]) == 2 * 8 and len(np.unique(first[0])) == 16
    np.testing.assert_allclose(first[1], first[0], rtol=2e-5)


@pytest.mark.parametrize(
    "how,size,keys", [("data", 2, []), ("data", 3, ["batch_size=4"]), ("2d", 4, ["q=1"])]
)
def test_shards_of_the_batch_within_rounding(place, how, size, keys):
    """lr=0: each step's losses are those of the same weights."""
    name, keys = f"{how}{size}", [*keys, "lr=0", "steps=8", "accumulate=2", "save_model=false"]
    if not (place / "still").exists():
        assert ranks.zoft(place, "output_dir=still", *keys) == [0]
    assert ranks.zoft(place, f"output_dir={name}", f"parallel={how}", *keys, size=size) == [0] * size
    want = losses(place / "still")
    assert np.ptp(want) > 1e-2  # steps differ
    np.testing.assert_allclose(losses(place / name), want, rtol=2e-6)


def test_a_sharded_run_in_fp64_is_that_of_one_process(place):
    keys = ["storage=fp64", "compute=fp64", "steps=20", "save_model=false"]
    assert ranks.zoft(place, "output_dir=d64", "parallel=data", *keys, size=2) == [0, 0]
    assert ranks.zoft(place, "output_dir=s64", *keys) == [0]
    np.testing.assert_allclose(losses(place / "d64"), losses(place / "s64"), rtol=1e-6)


def stop_at(step):
    """Signals this process in that step of its own."""
    from zoft.train.trainer import Trainer

    plain = Trainer.losses_at

    def losses_at(self, t, probes, batches):
        if t == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, t, probes, batches)

    Trainer.losses_at = losses_at


def stop_one(rank):
    if rank == 1:
        stop_at(17)


def test_a_signal_to_one_stops_all_after_the_same_step_and_any_number_goes_on(place):
    assert ranks.zoft(place, "output_dir=stopped", "snapshot_every=20", size=2, hook=stop_one) == [75, 75]
    assert said(place).splitlines()[-1] == "stopped; continue with `zoft train --resume stopped`"
    assert len(read_ledger(place / "stopped" / "ledger").records) == 18
    assert ranks.zoft(place, "--resume", "stopped", size=1, hook=stop_at_30) == [75]
    assert ranks.zoft(place, "--resume", "stopped", size=2) == [0, 0]
    assert same(place, "stopped")


def stop_at_30(rank):
    stop_at(30)


def slow_steps(rank):
    """Steps that leave time to be killed in."""
    import time

    from zoft.train.trainer import Trainer

    plain = Trainer.losses_at

    def losses_at(self, *args):
        time.sleep(0.02)
        return plain(self, *args)

    Trainer.losses_at = losses_at


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_loses_nothing(place, victim):
    name = f"killed{victim}"
    processes = ranks.launch(place, f"output_dir={name}", "snapshot_every=20", size=2, hook=slow_steps)
    metrics = place / name / "metrics.jsonl"
    ranks.until(lambda: metrics.exists() and metrics.read_text().count("\n") > 10)
    os.kill(processes[victim].pid, signal.SIGKILL)
    codes = ranks.ended(processes)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 75
    assert "another process of this run is gone: stopped; continue with" in said(place, 1 - victim)
    assert 9 < len(read_ledger(place / name / "ledger").records) < 50
    assert ranks.zoft(place, "--resume", name, size=2) == [0, 0]
    assert same(place, name)


def corrupt(rank):
    """One bit of one weight of rank 1, after step 12."""
    from zoft.train.trainer import Trainer

    plain = Trainer.losses_at

    def losses_at(self, t, probes, batches):
        if rank == 1 and t == 12:
            self.axis.trained[3].stored.view(torch.int16).flatten()[5] ^= 1
        return plain(self, t, probes, batches)

    Trainer.losses_at = losses_at


def test_weights_that_differ_stop_all_with_both_values(place):
    codes = ranks.zoft(place, "output_dir=bent", "check_every=5", size=2, hook=corrupt)
    assert codes == [2, 2]
    line = said(place).splitlines()[-1]
    values = [x.split()[0].strip(",)") for x in line.split(" has ")[1:]]
    assert (
        line.startswith("error: step 15: weights differ between processes (rank 0 has ")
        and len(set(values)) == 2
    )
    assert len(read_ledger(place / "bent" / "ledger").records) == 15


def other_data(rank):
    if rank == 1:
        from zoft.data import tasks

        plain = tasks.load_task

        def load(task, *more):
            data = plain(task, *more)
            data.train.reverse()
            return data

        tasks.load_task = load


def test_other_data_on_one_process_is_refused(place):
    codes = ranks.zoft(place, "output_dir=other", size=2, hook=other_data)
    assert codes == [75, 2] and "was begun on other training data" in said(place, 1)


def test_nproc_starts_and_watches_them(place):
    command = [sys.executable, "-m", "zoft", "train", "--config", "mine.yaml", "--nproc", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "output_dir=spawned", "snapshot_every=20"],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("50 steps, 400 forwards") == 1
    assert same(place, "spawned")
    done = subprocess.run(
        [*command, "output_dir=spawned"], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: output_dir=spawned: it holds a run")


def test_grid():
    def of(size, **keys):
        return probe_grid(Config(model="m", task=Task(name="x"), **{"batch_size": 16, **keys}), size)

    assert of(2) == (2, 1) and of(4) == (2, 2) and of(3) == (1, 3) and of(8, q=4) == (8, 1)
    assert of(6, q=1, batch_size=3) == (2, 3) and of(4, q=8) == (4, 1)
    assert of(2, parallel="data") == (1, 2) and of(4, q=2, parallel="2d") == (2, 2)
    assert of(2, perturb="inplace") == (1, 2)
    for size, keys, text in [
        (3, {"parallel": "probes"}, "parallel=probes: 2 probes per step"),
        (2, {"parallel": "2d"}, "make no grid"),
        (8, {"batch_size": 3}, "batch_size=3: is cut into 4"),
        (2, {"parallel": "probes", "perturb": "inplace"}, "perturb=inplace"),
    ]:
        with pytest.raises(UserError, match=text):
            of(size, **keys)


@pytest.mark.parametrize("parts,shards,n", [(2, 1, 5), (1, 3, 5), (2, 3, 7)])
def test_shares_are_the_whole_and_do_not_overlap(parts, shards, n):
    worlds = [World(r, parts * shards, parts, shards) for r in range(parts * shards)]
    seen = [(p, e) for w in worlds for p in range(12)[w.probes(12)] for e in w.examples(range(n))]
    assert sorted(seen) == [(p, e) for p in range(12) for e in range(n)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_digest_sees_one_bit_and_an_exchange(dtype):
    def trained(x):
        return [Trained("w", 1, torch.nn.Parameter(x, requires_grad=False), x, dtype, True)]

    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    one = weights_digest(trained(x))
    assert one == weights_digest(trained(x.clone())) and len(one) == 16
    y = x.clone()
    y.view(torch.uint8)[1234] ^= 1
    assert weights_digest(trained(y)) != one
    y = x.clone()
    y[[5, 6]] = x[[6, 5]]
    assert weights_digest(trained(y)) != one


def test_alone_nothing_is_said_or_sent():
    assert world.this_world().size == 1 and world.this_world().broadcast(lambda: 3) == 3


@pytest.mark.slow
def test_the_benchmark_on_a_tiny_model(tmp_path):
    out = tmp_path / "out.json"
    script = str(ROOT / "scripts" / "bench_distributed.py")
    cells = ["--cell", "tiny:data:4x16", "--cell", "tiny:probes:4x16"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *cells, "--device", "cpu", "--steps", "3", "--json", str(out)],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    data, probes = json.loads(out.read_text())["rows"]
    assert data["many"]["agree"] and probes["many"]["agree"]
    assert (data["one"]["batch"], data["many"]["batch"], probes["many"]["batch"]) == (4, 8, 4)
    assert (data["many"]["wire_bytes_per_step"], probes["many"]["wire_bytes_per_step"]) == (32, 16)
    assert probes["one"]["losses"] == pytest.approx(probes["many"]["losses"], rel=1e-5)
    assert "| tiny data 4×16 |" in done.stdout


def cannot_stack(rank):
    """Rank 1 finds at the start that probes cannot share a forward."""
    if rank == 1:
        from dataclasses import replace

        from zoft.probe import proof

        plain = proof.find_sites
        proof.find_sites = lambda *args: replace(plain(*args), stacked=False, note="as asked")


def cannot_stack_at_7(rank):
    """Rank 1 meets a batch at step 7 that cannot be stacked."""
    if rank == 1:
        from zoft.probe.rows import Unfit
        from zoft.train.trainer import Trainer

        plain = Trainer.sums_at

        def sums_at(self, step, probes, batch):
            if step == 7 and len(probes) == 2 == self.settings.probes_per_forward:
                self.alone(step, Unfit("as asked"))
            return plain(self, step, probes, batch)

        Trainer.sums_at = sums_at


def kept(place, name):
    from zoft.method.configured import load_run

    return load_run(place / name).probes_per_forward


def test_one_process_that_cannot_stack_makes_all_run_one_probe_a_forward(place):
    keys = ["q=2", "steps=10", "save_model=false"]
    assert ranks.zoft(place, "output_dir=agree1", *keys) == [0]
    hooked = [*keys, "probes_per_forward=auto"]
    assert ranks.zoft(place, "output_dir=agree2", *hooked, size=2, hook=cannot_stack) == [0, 0]
    assert kept(place, "agree2") == 1 and "rank 1: as asked" in said(place).splitlines()
    assert (place / "agree2" / "ledger").read_bytes() == (place / "agree1" / "ledger").read_bytes()


def test_a_fall_in_mid_run_is_that_of_all(place):
    keys = ["q=2", "steps=10", "save_model=false", "probes_per_forward=2"]
    assert ranks.zoft(place, "output_dir=fallen", *keys, size=2, hook=cannot_stack_at_7) == [0, 0]
    assert kept(place, "fallen") == 1
    assert (
        "step 7: one probe per forward from here on: so does another process of this run"
        in said(place).splitlines()
    )


def fast_meeting(rank):
    import datetime

    world.MEETING = datetime.timedelta(seconds=2)


def test_processes_that_do_not_meet_say_why_in_a_line(place):
    import socket

    def says(rank, size, port, env=None):
        process = ranks.start(place, [*TRAIN, "output_dir=lost"], rank, size, port, env or fast_meeting)
        assert ranks.ended([process]) == [2], said(place, rank)
        return said(place, rank).splitlines()

    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        line = (
            f"error: MASTER_PORT={port}: this port is in use; choose another one, the same for all processes"
        )
        assert says(0, 2, port) == [line]
    line = "error: WORLD_SIZE=2: not all of them came within 2 s; start 2, with RANK 0 to 1"
    assert says(0, 2, ranks.free_port()) == [line]
    (line,) = says(1, 2, port)
    assert line.startswith(
        f"error: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 0 does not answer there within 2 s"
    )
    assert says(0, 2, 0, no_master)[-1].startswith("error: MASTER_ADDR=: says where rank 0 is")
    assert says(5, 2, 0)[-1].startswith("error: RANK=5, WORLD_SIZE=2: ranks go from 0")
    assert says(0, 2, "many")[-1].startswith("error: MASTER_PORT=many: is no port")


TRAIN = ["train", "--config", "mine.yaml"]


def no_master(rank):
    del os.environ["MASTER_ADDR"]


def test_all_have_a_gpu_or_none_uses_one(capsys):
    def of(device, have):
        return world.all_on_gpu(Config(model="m", task=Task(name="x"), device=device), have)

    assert of("auto", [True, True]) and not of("auto", [False, False]) and not of("cpu", [False, False])
    assert not of("auto", [True, False]) and "all work on CPUs" in capsys.readouterr().err
    with pytest.raises(UserError, match="device=cuda: no CUDA device at rank 1, 2;"):
        of("cuda", [True, False, False])


@pytest.mark.parametrize(
    "env,text",
    [({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: a whole number"), ({"WORLD_SIZE": "2"}, "RANK is not set")],
)
def test_ranks_that_are_none(monkeypatch, env, text):
    from zoft.parallel import launch as processes

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.process_place() == (0, 1)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=text):
        processes.process_place()


def test_another_number_of_processes_shares_the_machine_anew(place):
    """`threads` that were auto are resolved for those that are there; what was given by hand is left alone."""
    from zoft.method.configured import load_run

    keys = ["output_dir=cores", "threads=auto", "snapshot_every=20", "probes_per_forward=2"]
    assert ranks.zoft(place, *keys, size=2, hook=stops_on_4_threads) == [75, 75], said(place, 1)
    assert load_run(place / "cores").threads == 4
    assert ranks.zoft(place, "--resume", "cores", hook=stops_on_8_threads_alone) == [75], said(place)
    config = load_run(place / "cores")
    assert (config.threads, config.probes_per_forward) == (4, 1)  # as begun, but for what decides bits
    text = (place / "cores" / "config.yaml").read_text()
    (place / "cores" / "config.yaml").write_text(text.replace("threads: 4", "threads: 3"))
    assert ranks.zoft(place, "--resume", "cores", hook=stops_on_3_threads) == [75], said(place)


def stops(threads, step, alone=False):
    """Stops this process in that step if it has so many threads, and else it breaks."""
    from zoft.probe.rows import Unfit
    from zoft.train.trainer import Trainer

    torch.set_num_threads(8)
    plain = Trainer.losses_at

    def losses_at(self, t, probes, batches):
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        if alone:
            self.alone(t, Unfit("as asked"))
        if t == step:
            os.kill(os.getpid(), signal.SIGTERM)
        values = plain(self, t, probes, batches)
        torch.set_num_threads(threads)
        return values

    Trainer.losses_at = losses_at


def stops_on_4_threads(rank):
    stops(4, 3)


def stops_on_8_threads_alone(rank):
    stops(8, 6, alone=True)


def stops_on_3_threads(rank):
    stops(3, 9)
