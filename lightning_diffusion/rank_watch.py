"""Ranks that tell each other when one of them fails, dies, hangs or gets nowhere.

Rank 0 has a connection to each other rank, beside those of the process group, which block. Every rank says once a
second how far it has come. What rank 0 hears, or does not hear, becomes a verdict, one line that all ranks get:

    failed    a rank says that it failed, and why
    died      a connection ends without a farewell: the system closes it with the process, however that ended
    silent    nothing is heard: the process is stopped, or its machine or the network is gone
    stalled   all speak, but none gets on with its micro-batch, and none does what may take long

If it is rank 0 that died or is silent, each other rank finds that for itself. Seconds are those in which the listener
ran too: a job that is suspended as a whole blames nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import NamedTuple

from lightning_diffusion.main_thread import whereabouts
from lightning_diffusion.ranks import STATE, Message, Rank, Stalls, Verdict

TICK = 1.0  # seconds


class Patience(NamedTuple):
    """Seconds after which a rank that is not heard counts as hanging; after which ranks that do not get on do; until a
    process is ended that has not left by itself after a verdict."""

    silent: float = 30.0
    stalled: float = 40.0
    leaving: float = 10.0


class Surroundings:
    """What a rank can do about processes; here nothing."""

    def how_it_ended(self, rank: int) -> str:
        """What is known of the end of a rank's process, to be appended to a sentence."""
        return ""

    def end_hanging(self, rank: int) -> None:
        """End the process of a rank that hangs, where that is this one's to do."""

    def end_this(self, said: str) -> None:
        """End this process, whose main thread does not come out."""


class RankWatch:
    """The part of one rank, in a thread of its own.

    Args:
        own: this rank.
        others: those that it is connected with: all others on rank 0, else rank 0 alone.
        patience: see `Patience`.
        surroundings: see `Surroundings`.
    """

    def __init__(
        self, own: Rank, others: Sequence[Rank], patience: Patience, surroundings: Surroundings
    ) -> None:
        self.own, self.others, self.patience, self.surroundings = own, others, patience, surroundings
        self.verdict: Verdict | None = None
        self._marks = 0
        self._main_left = False
        self._decided, self._settled, self._over = (threading.Event() for _ in range(3))
        self._deciding, self._speaking = threading.Lock(), threading.Lock()
        self._stalls = Stalls(patience.stalled)
        self._thread = threading.Thread(target=self._run, daemon=True, name="rank-watch")

    def start(self) -> None:
        """Begin to speak and to listen."""
        self._thread.start()

    def pass_mark(self) -> None:
        """This rank has got on: a micro-batch is begun, its loss is known, it is done."""
        self._marks += 1

    def fail(self, message: str) -> None:
        """Tell all others why this rank fails; returns once they know, or soon."""
        self._main_left = True
        if self.own.number == 0:
            self._decide(Verdict(f"{self.own} failed: {message}", 0))
        else:
            self._tell({"failed": message})
        self._close(5.0)

    def expect_verdict(self, seconds: float) -> Verdict | None:
        """What made an exchange with others fail, if it becomes known within so many seconds."""
        self._decided.wait(seconds)
        if self.verdict is not None:
            self._main_left = True
            self._close(5.0)
        return self.verdict

    def finish(self, seconds: float = 60.0) -> None:
        """This rank is done; rank 0 stays until all are, or for so many seconds."""
        self._main_left = True
        self._tell({"done": True})
        if self.own.number != 0:
            self._settled.set()
        self._close(seconds)

    def _close(self, seconds: float) -> None:
        self._settle()
        self._settled.wait(seconds)
        self._over.set()

    def _run(self) -> None:
        since_verdict = 0.0
        while not self._over.is_set():
            self._listen()
            self.own.is_at(self._marks, *whereabouts())
            self._tell({name: getattr(self.own, name) for name in STATE})
            if self.verdict is None:
                self._judge()
            else:
                since_verdict += TICK
                self._leave(since_verdict, self.verdict)

    def _listen(self) -> None:
        until = time.monotonic() + TICK
        while (left := until - time.monotonic()) > 0 and not self._over.is_set():
            present = {id(one.connection): one for one in self._present()}
            for connection in wait([one.connection for one in present.values()], min(left, 0.1)):  # type: ignore[misc]
                self._hear(present[id(connection)])

    def _hear(self, other: Rank) -> None:
        try:
            for message in other.received():
                self._act_on(message, other)
        except (EOFError, OSError):
            other.left = True
            how = self.surroundings.how_it_ended(other.number)
            self._decide(Verdict(f"{other} ended without a word{how}", other.number))
        self._settle()

    def _act_on(self, message: Message, other: Rank) -> None:
        if "failed" in message:
            self._decide(Verdict(f"{other} failed: {message['failed']}", other.number))
        if "verdict" in message:
            self._tell({"done": True})
            self._decide(Verdict(*message["verdict"]))
        other.left |= "done" in message

    def _judge(self) -> None:
        for one in (self.own, *self.others):
            one.wait(TICK)
        present = self._present()
        for one in present:
            if one.silent > self.patience.silent:
                said = f"{one} has not answered for {one.silent:.0f} s: it is stopped, or cannot be reached"
                self._decide(Verdict(said, one.number, hangs=True))
        if self.own.number == 0 and len(present) == len(self.others):
            stalled = self._stalls.look([self.own, *present])
            if stalled is not None:
                self._decide(stalled)

    def _decide(self, verdict: Verdict) -> None:
        with self._deciding:
            if self.verdict is not None or self._over.is_set():
                return
            self.verdict = verdict
        if self.own.number == 0:
            self._tell({"verdict": verdict})
        else:
            self._settled.set()
        self._decided.set()
        if verdict.hangs:
            self.surroundings.end_hanging(verdict.blamed)

    def _leave(self, seconds: float, verdict: Verdict) -> None:
        """Who is to blame goes first: others then learn it from their connections."""
        is_to_blame = verdict.blamed == self.own.number
        if not self._main_left and (is_to_blame or seconds > self.patience.leaving):
            self.surroundings.end_this(verdict.said)

    def _settle(self) -> None:
        if self.own.number == 0 and not self._present():
            self._settled.set()

    def _present(self) -> list[Rank]:
        return [one for one in self.others if one.connection is not None and not one.left]

    def _tell(self, message: Message) -> None:
        with self._speaking:
            for other in self.others:
                other.send(message)
