"""A real Slurm of one node for the tests: its own munge, ports and folders; everything is stopped by its process id."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")


def unavailable():
    """Why Slurm cannot be started here; "" where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed (no {missing[0]}): make slurm"
    return "" if os.geteuid() == 0 else "starting Slurm needs root"


@contextmanager
def cluster(cpus=2):
    """Start munged, slurmctld and slurmd; yields the environment in which Slurm's commands talk to them."""
    folder = Path(
        tempfile.mkdtemp(prefix="zslurm-")
    )  # a short path: a socket's name has 107 characters at most
    daemons = []
    try:
        env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurm.conf").write_text(conf(folder, cpus))
        names = {n: folder / f"munge.{n}" for n in ("socket", "log", "pid", "seed")}
        munge = [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder / 'munge.key'}",
            f"--socket={names['socket']}",
        ]
        munge += [f"--log-file={names['log']}", f"--pid-file={names['pid']}", f"--seed-file={names['seed']}"]
        for command in (munge, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "one"]):
            with (folder / f"{command[0]}.out").open("wb") as out:
                daemons.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
            if command is munge:
                wait(lambda: names["socket"].exists(), daemons, folder)
        wait(lambda: "idle" in said(["sinfo", "-h", "-o", "%t"], env), daemons, folder)
        yield env
    finally:
        if len(daemons) == 3:  # a job outlives the daemons
            subprocess.run(["scancel", "--full", "--user=root"], env=env, capture_output=True)
            end = time.monotonic() + 30
            while said(["squeue", "-h"], env).strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def conf(folder, cpus):
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host, ports = socket.gethostname(), free_ports(2)
    return f"""
ClusterName=zoft
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=5
MinJobAge=86400
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000
PartitionName=tests Nodes=one Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def said(command, env):
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout


def wait(until, daemons, folder, seconds=60):
    end = time.monotonic() + seconds
    while not until():
        dead = [d.args[0] for d in daemons if d.poll() is not None]
        if dead or time.monotonic() > end:
            logs = {
                p.name: p.read_text(errors="replace")[-1500:]
                for p in folder.glob("*.*")
                if p.suffix in (".out", ".log")
            }
            raise RuntimeError(f"Slurm does not start ({dead or 'no answer'}): {logs}")
        time.sleep(0.1)
