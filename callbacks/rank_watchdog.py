"""When one rank fails, dies or hangs, all others stop, and say why."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Client, Listener
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import (
    _ChildProcessObserver,
    _launch_process_observer,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_diffusion.rank_watch import Patience, RankWatch, Surroundings
from lightning_diffusion.ranks import LONGEST, Rank, RankFailure

_OF_AN_EXCHANGE = re.compile(r"gloo|nccl|connection (reset|closed)|broken pipe|timed? ?out", re.IGNORECASE)
_HERE = ("127.0.0.1", "localhost", "::1")


class RankWatchdog(Callback):
    """Stop all ranks within a minute when one fails, dies, hangs or gets nowhere; each says which one, and why.

    When:   always with several processes: the others would wait for 10 (NCCL) or 30 minutes (gloo), or end by an error
            of their connection that tells nothing. With one process it does nothing.
    Costs:  a thread, a port of its own, and a message of 100 bytes per rank and second to rank 0.
    Knobs:  silent_seconds, more where whole machines freeze for that long; stalled_seconds, more where a healthy
            micro-batch, or the data for it, may take longer (five times the longest one seen is always allowed).
    With:   LastCheckpoint, from which the run is resumed. Callbacks, validation and compilation may take any time.

    A rank that can leave by itself raises `RankFailure`, or the error of its connection because of it; one that is
    blocked is ended with status 1. Lightning's observer, which kills the first process without a word when one that it
    started ends, rests meanwhile.

    Args:
        silent_seconds: after which a rank that is not heard of counts as hanging.
        stalled_seconds: after which ranks, none of which gets on with its micro-batch, count as hanging.
        leaving_seconds: until a blocked process is ended.

    Raises:
        ValueError: if one of them is not positive.
    """

    def __init__(
        self, silent_seconds: float = 30.0, stalled_seconds: float = 40.0, leaving_seconds: float = 10.0
    ) -> None:
        self.patience = Patience(silent_seconds, stalled_seconds, leaving_seconds)
        if min(self.patience) <= 0:
            raise ValueError(f"found {self.patience}, expected numbers of seconds above 0.")
        self._watch: RankWatch | None = None
        self._processes = Processes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and self._watch is None:
            own, others = _connected(trainer)
            started = getattr(trainer.strategy.launcher, "procs", [])
            self._processes = Processes(started, others[0].name == _name(os.getppid()))
            self._watch = RankWatch(own, others, self.patience, self._processes)
            self._watch.start()
            self._processes.put_observer_to_rest()

    def on_train_batch_start(self, *_: Any) -> None:
        self._pass_mark()

    def on_before_backward(self, *_: Any) -> None:
        self._pass_mark()

    def on_train_batch_end(self, *_: Any) -> None:
        self._pass_mark()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        watch, self._watch = self._watch, None
        if watch is None or isinstance(exception, RankFailure):
            return
        if isinstance(exception, SIGTERMException):
            watch.finish(5.0)  # which all ranks get together
        elif _OF_AN_EXCHANGE.search(str(exception)) and (verdict := watch.expect_verdict(5.0)):
            exception.__cause__ = RankFailure(verdict.said)
            exception.add_note(verdict.said)
        else:
            watch.fail(f"{type(exception).__name__}: {exception}"[:2000])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.finish()
            self._processes.wake_observer()

    def _pass_mark(self) -> None:
        if self._watch is not None:
            self._watch.pass_mark()
            if self._watch.verdict is not None and (verdict := self._watch.expect_verdict(0.0)):
                raise RankFailure(verdict.said)


class Processes(Surroundings):
    """The processes of this machine that one of Lightning's launchers started from this one, or this one from.

    Args:
        started: of ranks 1, 2, ...; empty on all ranks but the first, and where something else starts processes.
        by_first: whether rank 0 started this one.
    """

    def __init__(self, started: Sequence[subprocess.Popen[Any]] = (), by_first: bool = False) -> None:
        self.started, self.by_first = list(started), by_first

    def how_it_ended(self, rank: int) -> str:
        if not 1 <= rank <= len(self.started):
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.started[rank - 1].wait(2.0)
            return f", by {signal.Signals(-status).name}" if status < 0 else f", with status {status}"
        return ""

    def end_hanging(self, rank: int) -> None:
        if 1 <= rank <= len(self.started):
            self.started[rank - 1].kill()
        if rank == 0 and self.by_first:
            os.kill(os.getppid(), signal.SIGKILL)

    def end_this(self, said: str) -> None:
        for process in self.started:
            process.kill()
        sys.stdout.flush()
        os.write(2, f"\nThis process ends: {said}\n".encode())
        os._exit(1)

    def put_observer_to_rest(self) -> None:
        """Lightning's thread that kills this process as soon as one of those started ends."""
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver):
                thread._child_processes = []

    def wake_observer(self) -> None:
        if self.started:
            _launch_process_observer(self.started)


def _name(process: int) -> str:
    return f"{platform.node()}, process {process}"


def _connected(trainer: Trainer) -> tuple[Rank, list[Rank]]:
    """This rank, and those that it is, or comes to be, connected with."""
    own = Rank(trainer.global_rank, _name(os.getpid()))
    host = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
    place = "127.0.0.1" if host in _HERE else ""
    key = secrets.token_bytes(32)
    listener = Listener((place, 0), backlog=trainer.world_size, authkey=key) if own.number == 0 else None
    port = listener.address[1] if listener else 0
    host, port, key, name = trainer.strategy.broadcast((host, port, key, own.name))
    if listener is None:
        return own, [_reached(Rank(0, name), own, (host, port), key)]
    others = [Rank(number) for number in range(1, trainer.world_size)]
    threading.Thread(target=_let_in, args=(listener, others), daemon=True, name="rank-watch-door").start()
    return own, others


def _reached(first: Rank, own: Rank, address: tuple[str, int], key: bytes) -> Rank:
    try:
        first.connection = Client(address, authkey=key)
    except OSError as error:
        warnings.warn(f"{own} cannot reach {address} ({error}): its failures show late.", stacklevel=2)
    first.send({"number": own.number, "name": own.name})
    return first


def _let_in(listener: Listener, others: Sequence[Rank]) -> None:
    """Every other rank, once; whoever does not know the key is turned away."""
    with listener:
        while any(one.connection is None for one in others):
            with contextlib.suppress(Exception):
                connection = listener.accept()
                hello = json.loads(connection.recv_bytes(LONGEST))
                rank = others[hello["number"] - 1]
                rank.name, rank.connection = hello["name"], connection
