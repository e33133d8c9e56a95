"""Runs of a table, several at a time, over the devices."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Job, Done = TypeVar("Job"), TypeVar("Done")


def spread(
    work: Callable[[Job, str], Done], jobs: Sequence[Job], devices: Sequence[str], at_once: int
) -> list[Done]:
    """work(job, device) of each job in their order, `at_once` of them at a time, as many on each device."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for i in range(at_once):
        free.put(devices[i % len(devices)])

    def one(job: Job) -> Done:
        device = free.get()
        try:
            return work(job, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, jobs))
