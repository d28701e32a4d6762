"""What one rank knows of another, and when ranks that all answer get nowhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

Message = dict[str, Any]

LONGEST = 16_384  # bytes of a message
STATE = ("marks", "place", "may_take_long")
FIRST, LEARNED, SLOWER = 3, 9, 5  # marks: of one micro-batch, of three; how many times slower


class RankFailure(RuntimeError):  # noqa: N818  (the failure is another rank's)
    """Another rank failed, or none gets on; the message says which, and why."""


class Verdict(NamedTuple):
    """What stops all ranks, the number of the rank to blame (-1: none alone), and whether that hangs."""

    said: str
    blamed: int = -1
    hangs: bool = False


@dataclass
class Rank:
    """A rank, and what is known of it.

    Args:
        number, name: of the rank; host and process.
        connection: to it; None to oneself, and before there is one.
        marks: that it has passed, three in each micro-batch: begun, loss known, done.
        place, may_take_long: see `Whereabouts`.
        silent, idle: seconds since it was heard of, since it passed a mark.
        left: whether it has said farewell, or has ended.
    """

    number: int
    name: str = ""
    connection: Connection | None = None
    marks: int = 0
    place: str = "its start"
    may_take_long: bool = True
    silent: float = 0.0
    idle: float = 0.0
    left: bool = False

    def __str__(self) -> str:
        return f"rank {self.number} ({self.name})"

    def send(self, message: Message) -> None:
        """Whether it arrives shows in what is heard."""
        if self.connection is not None and not self.left:
            with contextlib.suppress(OSError):
                self.connection.send_bytes(json.dumps(message).encode())

    def received(self) -> Iterator[Message]:
        """What is there to be read; raises EOFError or OSError at the end."""
        while self.connection is not None and self.connection.poll():
            message = json.loads(self.connection.recv_bytes(LONGEST))
            self.silent = 0.0
            if "marks" in message:
                self.is_at(*(message[name] for name in STATE))
            yield message

    def is_at(self, marks: int, place: str, may_take_long: bool) -> None:
        """Take note of where it is."""
        self.idle = self.idle if marks == self.marks else 0.0
        self.marks, self.place, self.may_take_long = marks, place, may_take_long

    def wait(self, seconds: float) -> None:
        """So much time has passed."""
        self.silent, self.idle = self.silent + seconds, self.idle + seconds


class Stalls:
    """Notices when no rank has passed a mark for too long.

    Args:
        seconds: that are too long, or five times the longest seen, if that is more. The first two micro-batches are
            only learned from.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._longest = self._last = 0.0

    def look(self, ranks: Sequence[Rank]) -> Verdict | None:
        """Once a tick. What may take long, on any rank, stops the clock of all."""
        if any(one.may_take_long for one in ranks):
            for one in ranks:
                one.idle = 0.0
        least, idle = min(one.marks for one in ranks), min(one.idle for one in ranks)
        if idle < self._last and least > FIRST:
            self._longest = max(self._longest, self._last)
        self._last = idle
        too_long = least >= LEARNED and idle > max(self.seconds, SLOWER * self._longest)
        return _stalled(ranks, idle) if too_long else None


def _stalled(ranks: Sequence[Rank], seconds: float) -> Verdict:
    """Whoever is behind is to blame, unless all are."""
    least = min(one.marks for one in ranks)
    behind = [one for one in ranks if one.marks == least]
    places = "; ".join(f"{one} is in {one.place}" for one in behind[:8])
    said = f"no rank has got on for {seconds:.0f} s: {places}"
    if len(behind) == len(ranks):
        return Verdict(said)
    return Verdict(f"{said}; the others wait for it", behind[0].number)
