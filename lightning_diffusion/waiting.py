"""A progress bar for what turns out to take more than two seconds."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Waiting:
    """`with Waiting(total, "images") as waiting: ... waiting.advance(n)`; on standard error, in a terminal only.

    Args:
        total, unit: how many of what.
        patience_seconds: nothing is shown before.
        shown: False for a bar that is never shown, as in all processes but the first.
    """

    def __init__(self, total: int, unit: str, patience_seconds: float = 2.0, shown: bool = True) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=Console(file=sys.stderr), transient=True)
        self._task = self._progress.add_task(unit, total=total)
        self._timer = threading.Timer(patience_seconds, self._progress.start)
        self._shown = shown and self._progress.console.is_terminal

    def __enter__(self) -> Waiting:
        if self._shown:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._progress.live.is_started:
            self._progress.stop()

    def advance(self, number: int) -> None:
        """`number` more are done."""
        self._progress.advance(self._task, number)
