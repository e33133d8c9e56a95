"""Run several forwards of one model in lockstep: all of them pass a layer before it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Lockstep:
    """Run n forwards by turns, one at a time: each goes on to its next meeting point, and the last one there acts for all.

    No forward is restated: every forward has a thread of its own, a baton says whose turn it is, and a layer calls
    `meet`. One forward needs no thread. An error in one forward ends all of them and is raised by `run`.
    """

    def __init__(self, n: int) -> None:
        self.n, self.turn, self.failed = n, 0, False
        self.changed = threading.Condition()
        self.items: list[Any] = []
        self.local = threading.local()

    def meet(self, item: Any, act: Callable[[list[Any]], None]) -> None:
        """Hand over `item`; whoever comes last calls act(items, in the order of the forwards) before any goes on."""
        self.items.append(item)
        if len(self.items) == self.n:
            items, self.items = self.items, []
            act(items)
        if self.n > 1:
            self._pass_on()
            self._wait()

    def run(self, forwards: Sequence[Callable[[], Any]]) -> None:
        """Run the forwards [n], without gradients."""
        assert len(forwards) == self.n, (len(forwards), self.n)
        if self.n == 1:
            with torch.no_grad():
                forwards[0]()
            return
        errors: list[BaseException] = []
        # A new thread would launch on the default stream, and outside of a graph that is being captured.
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

        def work(i: int) -> None:
            self.local.i = i
            try:
                self._wait()
                with torch.no_grad(), torch.cuda.stream(stream):
                    forwards[i]()
            except BaseException as error:  # raised again by the caller, below
                if not isinstance(error, _Ended):
                    errors.append(error)
                self.failed = True
            with self.changed:
                self.turn = (i + 1) % self.n
                self.changed.notify_all()

        threads = [threading.Thread(target=work, args=(i,), name=f"zoft-rows-{i}") for i in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _pass_on(self) -> None:
        with self.changed:
            self.turn = (self.local.i + 1) % self.n
            self.changed.notify_all()

    def _wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.failed or self.turn == self.local.i)
        if self.failed:
            raise _Ended


class _Ended(Exception):
    """Another forward has failed."""
