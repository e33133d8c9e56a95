"""Several processes, one run: each evaluates its share of a step's (probe, example) pairs, and only losses travel.

The processes that `zoft train --nproc N` or torchrun started stand in a grid of parts × shards: a part has an equal run
of a step's probes, a shard a slice of each batch's examples. Sums and counts are gathered and added up in one fixed
order, so that all of them make the same coefficients, and from these the same weights: no weight is ever sent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.ledger.format import decode
from zoft.ledger.log import Ledger
from zoft.method.estimators.named import probes_per_step, second_probes
from zoft.models.fingerprint import Stored
from zoft.parallel.launch import environment_number, process_place, with_parent
from zoft.signals import Stop, Stopped

T = TypeVar("T")
MEETING = timedelta(minutes=5)  # for all processes to be there
WAITING = timedelta(days=1)  # for one that evaluates or saves; one that dies closes its connections
STEPPING = timedelta(minutes=30)  # for a GPU's losses: kernels may have to be compiled first
CHUNK = 1 << 24  # numbers of a weight that are summed at a time
STOP, ALONE = 1, 2  # bits of what processes tell each other beside their losses


@dataclass
class World:
    """Describe this process among those of a run. parts × shards = size; rank = part · shards + shard."""

    rank: int = 0
    size: int = 1
    parts: int = 1  # of a step's probes
    shards: int = 1  # of each batch's examples
    local_size: int = 1  # processes on this machine
    folder: str = ""
    cuda: bool | None = None  # whether all of them have a GPU; None: one process sees for itself
    wire: Any = None  # the process group that losses travel by; None is the default one, on CPUs
    stop: Stop | None = None  # of this process
    failed: bool = False  # this process has to stop, for an error that it tells once all are at one step
    sent: int = 0  # bytes of losses that this process handed to the others
    auto: dict[str, Any] = field(
        default_factory=dict
    )  # keys that were `auto`, decide no weight, and what they became

    def probes(self, count: int) -> slice:
        """Return which of a step's `count` probes this process evaluates."""
        assert count % self.parts == 0, f"{count} probes in {self.parts} parts"
        each = count // self.parts
        part = self.rank // self.shards
        return slice(part * each, (part + 1) * each)

    def examples(self, batch: Sequence[T]) -> Sequence[T]:
        """Return which examples of a batch this process evaluates: shards are disjoint, and all of them are the batch."""
        shard, n = self.rank % self.shards, len(batch)
        return batch[shard * n // self.shards : (shard + 1) * n // self.shards]

    def exchange(self, mine: Tensor, alone: bool = False) -> tuple[Tensor, Tensor]:
        """Turn this process's totals fp64 [m, K], sums and a count, into (those of all probes [parts·m, K], flags int64 []).

        Shards are added up in their order, on each process alike. The last column is a count, whole and never negative: its
        sign carries the flag STOP (a signal, or an error, of this process), a half more the flag ALONE (it runs one probe
        a forward, and so shall all). Where `mine` is on a GPU nothing waits for it.
        """
        count = mine[:, -1:] + 0.5 * alone
        if self.failed or (self.stop is not None and self.stop.number):
            count = -count
        mine = torch.cat([mine[:, :-1], count], 1)
        self.sent += mine.numel() * mine.element_size()
        gathered = mine.new_empty(self.size, *mine.shape)
        if mine.is_cuda:
            with self.together(dist.DistError):
                dist.all_gather_into_tensor(gathered.flatten(0, 1), mine, group=self.wire)
        else:
            with self.together():
                dist.all_gather(list(gathered), mine)
        counts = gathered[..., -1]
        asked = (torch.signbit(counts) & ~counts.isnan()).any()
        flags = asked * STOP + (counts.abs().frac() == 0.5).any() * ALONE
        counts.abs_().floor_()
        grid = gathered.view(self.parts, self.shards, *mine.shape)
        total = grid[:, 0].clone()
        for shard in range(1, self.shards):
            total += grid[:, shard]
        return total.flatten(0, 1), flags

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return what rank 0's make() gives, on all processes, as JSON has it."""
        if self.size == 1:
            return make()
        text = json.dumps(make()).encode() if self.rank == 0 else b""
        return json.loads(self._from_first(text))

    def all_gather(self, value: Any) -> list[Any]:
        """Return each process's value, in the order of ranks, as JSON has them."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.together():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(text)]))
            longest = max(int(n) for n in sizes)
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(parts, sizes)]

    def _from_first(self, data: bytes) -> bytes:
        with self.together():
            size = torch.tensor([len(data)])
            dist.broadcast(size, 0)
            text = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
            dist.broadcast(text, 0)
        return text.numpy().tobytes()

    @contextmanager
    def together(self, gone: type[Exception] = RuntimeError) -> Iterator[None]:
        """Raise Stopped where another process is gone: what the ledger has can be resumed."""
        try:
            yield
        except gone as error:
            why = f"rank {self.rank}: another process of this run is gone"
            raise Stopped(0, self.folder, why) from error

    def ledger(self, mine: Ledger | None) -> Ledger:
        """Return the run's ledger: rank 0's own, a copy in a nameless file for the others."""
        if self.size == 1:
            assert mine is not None
            return mine
        if mine is not None:
            self._from_first(mine.path.read_bytes())
            return mine
        data = self._from_first(b"")
        log, size, crc = decode(data, "the ledger of rank 0")
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            return Ledger(os.dup(file.fileno()), Path(self.folder) / "ledger", log, size, crc, "end")

    def check(self, step: int, trained: Sequence[Stored]) -> None:
        """Raise UserError, on every process, where their weights differ. trained: with all updates in."""
        if self.size == 1:
            return
        seen = self.all_gather(weights_digest(trained))
        if any(x != seen[0] for x in seen):
            values = ", ".join(f"rank {r} has {x}" for r, x in enumerate(seen))
            raise UserError(
                f"step {step}: weights differ between processes ({values}): some memory or device is at fault, or they are "
                f"not of one kind; steps since the last check are not to be trusted; start again, or lower check_every={step}"
            )

    def minimum(self, value: int) -> int:
        """Return the least of all processes' values."""
        return min(self.all_gather(value))

    def all(self, value: bool) -> bool:
        """Say whether all processes say so: what one cannot do, none does."""
        return all(self.all_gather(bool(value)))


_current = [World()]


def this_world() -> World:
    """Return the processes of the run that this one takes part in."""
    return _current[-1]


@contextmanager
def alone_here() -> Iterator[None]:
    """Let this process do all of its work itself in this context, as if there were no others."""
    _current.append(World(cuda=this_world().cuda))
    try:
        yield
    finally:
        _current.pop()


def weights_digest(trained: Sequence[Stored]) -> str:
    """Return 16 hexadecimal digits of the stored bits of all trained tensors: the same bits on any device give the same digits.

    Of each tensor the sum of its numbers' bits in each of 1024 columns, modulo 2⁶⁴: one read of the weights, no more.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    h = hashlib.blake2b(digest_size=8)
    for t in trained:
        bits = t.stored.detach().contiguous().flatten().view(integers[t.stored.element_size()])
        columns = torch.zeros(1024, dtype=torch.int64, device=bits.device)
        for part in bits.split(CHUNK):
            whole = part.numel() // 1024 * 1024
            columns += part[:whole].view(-1, 1024).sum(0, dtype=torch.int64)
            columns[: part.numel() - whole] += part[whole:]
        h.update(t.name.encode())
        h.update(columns.cpu().numpy().tobytes())
    return h.hexdigest()


def probe_grid(config: Config, size: int) -> tuple[int, int]:
    """Return (parts of the probes, shards of the batches) for that many processes.

    auto: as many parts as divide both the step's probes and the processes, shards for the rest. A process with fewer probes makes less
    noise and writes fewer perturbed weights besides running less; one with fewer examples only runs less, so that
    large models on small batches, where noise is most of a step, gain little from shards.
    Raises UserError where it does not come out even.
    """
    how, probes = config.parallel, probes_per_step(config)
    if config.perturb == "inplace" and how in ("probes", "2d"):
        raise UserError(
            f"parallel={how}: with perturb=inplace each process moves through all probes, for rounding is part of the run; "
            "use parallel=data or perturb=probes"
        )
    both = [p for p in range(1, size + 1) if size % p == 0 and probes % p == 0]
    if (
        how == "data" or config.perturb == "inplace" or second_probes(config)
    ):  # two rounds: no one deal fits both
        parts = 1
    elif how == "probes":
        if size not in both:
            raise UserError(
                f"parallel=probes: {probes} probes per step (q={config.q}) cannot be divided evenly among {size} processes; "
                f"use parallel=auto, another q, or as many processes as divide {probes}"
            )
        parts = size
    elif how == "2d":
        inner = [p for p in both if 1 < p < size]
        if not inner:
            raise UserError(
                f"parallel=2d: {size} processes and {probes} probes per step (q={config.q}) make no grid; use parallel=auto"
            )
        parts = inner[-1]
    else:
        parts = both[-1]
    shards = size // parts
    if shards > config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size}: is cut into {shards} here, at least one example each; raise it, or use fewer "
            "processes"
        )
    return parts, shards


@contextmanager
def joined_processes(config: Config, folder: str) -> Iterator[World]:
    """Connect the processes that were started together (RANK and WORLD_SIZE, as torchrun sets them); one process is its own group.

    Others than rank 0 keep quiet. Raises UserError for a grid that does not come out even, or a GPU that is not there.
    """
    rank, size = process_place()
    if size == 1:
        if config.parallel != "auto":
            print(
                f"parallel={config.parallel}: one process here; see `zoft train --nproc`",
                file=sys.stderr,
            )
        yield World()
        return
    with_parent()
    parts, shards = probe_grid(config, size)
    local, local_size = (
        environment_number("LOCAL_RANK", rank),
        environment_number("LOCAL_WORLD_SIZE", size),
    )
    cuda = on_gpu(config, local, local_size)
    with ExitStack() as stack:
        if rank:
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        meet(rank, size)
        world = World(rank, size, parts, shards, local_size, folder)
        world.cuda = all_on_gpu(config, world.all_gather(cuda))
        if world.cuda:
            connect(world)
        _current.append(world)
        probes = probes_per_step(config)
        how = "data" if parts == 1 else "probes" if shards == 1 else "2d"
        print(
            f"{size} processes, parallel={how}: each has {probes // parts} of {probes} probes per step, "
            f"{config.batch_size / shards:g} of {config.batch_size} examples per batch",
            file=sys.stderr,
        )
        try:
            yield world
            dist.destroy_process_group()
        except UserError as error:
            raise UserError(f"rank {rank}: {error}" if rank else str(error)) from error.__cause__
        finally:
            _current.pop()


def meeting_store(size: int) -> dist.Store | None:
    """Return the store in the private file that `zoft train --nproc` names; None without one.

    torch's own store listens on every interface, and whoever connects may read and write it. A file has an owner.
    """
    path = os.environ.pop("ZOFT_MEETING", None)  # it is used once
    if path is None:
        return None
    store = dist.FileStore(path, size)
    store.set_timeout(MEETING)
    return store


def meet(rank: int, size: int) -> None:
    """Make the process group that everything but a GPU's losses goes by. Raises UserError where they do not find each other."""
    private = "ZOFT_MEETING" in os.environ
    where = [f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT")]
    try:
        with quiet():
            store = meeting_store(size) or next(dist.rendezvous("env://", rank, size, timeout=MEETING))[0]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WAITING)
    except (RuntimeError, ValueError, OSError) as error:
        said, time = " ".join(str(error).split()), f"{MEETING.total_seconds():.0f} s"
        if private:
            why = f"--nproc {size}: the processes could not meet within {time} ({said[:200]}); start all of them again"
        elif not os.environ.get("MASTER_ADDR"):
            why = f"{where[0]}: says where rank 0 is; set it, or let `zoft train --nproc` or torchrun do so"
        elif not os.environ.get("MASTER_PORT", "").isdigit():
            why = f"{where[1]}: is no port; give a number, such as 29500"
        elif "EADDRINUSE" in said:
            why = f"{where[1]}: this port is in use; choose another one, the same for all processes"
        elif "waiting for clients" in said:
            why = f"WORLD_SIZE={size}: not all of them came within {time}; start {size}, with RANK 0 to {size - 1}"
        elif rank and ("connect" in said or "address" in said):
            why = f"{' '.join(where)}: rank 0 does not answer there within {time}; start it, or mend the address"
        else:
            why = (
                f"{' '.join(where)}: {size} processes could not meet ({said[:200]}); start all of them again"
            )
        raise UserError(why) from None


def connect(world: World) -> None:
    """Connect the group that losses on GPUs travel by, and try it once. Raises UserError where NCCL does not work."""
    try:
        world.wire = dist.new_group(backend="nccl", timeout=STEPPING)
        world.exchange(torch.ones(1, 2, dtype=torch.float64, device="cuda"))
        torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"device=cuda: NCCL does not connect {world.size} processes ({said}); use device=cpu, or one process"
        ) from None
    world.sent = 0


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what C++ writes to stderr: torch says there with a stack what is raised as well."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def all_on_gpu(config: Config, have: Sequence[bool]) -> bool:
    """Say whether a run's processes work on GPUs: all do, or none. Raises UserError where device=cuda asks for what some lack."""
    if config.device.startswith("cuda") and not all(have):
        lack = ", ".join(str(r) for r, has in enumerate(have) if not has)
        raise UserError(
            f"device={config.device}: no CUDA device at rank {lack}; use device=cpu, or start them elsewhere"
        )
    if any(have) and not all(have):
        print("device=auto: not every process has a CUDA device; all work on CPUs", file=sys.stderr)
    return all(have)


def on_gpu(config: Config, local: int, local_size: int) -> bool:
    """Say whether this run's processes have a GPU each; if so, this one takes its own."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return False
    if ":" in config.device:
        raise UserError(f"device={config.device}: each process takes a GPU of its own; use device=cuda")
    count = torch.cuda.device_count()
    if local_size > count:
        raise UserError(f"{local_size} processes: {count} CUDA devices here; start fewer, or use device=cpu")
    torch.cuda.set_device(local)
    return True


def threads_each(world: World) -> int:
    """Return the CPU threads of this process where they are `auto`: its share of what it may use."""
    return max(1, math.floor(torch.get_num_threads() / world.local_size))
