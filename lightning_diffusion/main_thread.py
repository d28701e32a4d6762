"""Where the main thread is, as another thread sees it: for messages, and to tell what may take long from what hangs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_MAY_TAKE_LONG = (
    "evaluation_loop.py",
    "prediction_loop.py",
    "torch/_dynamo/",
    "torch/_inductor/",
    "litdata/",
)
_COMMUNICATES = "torch/distributed/"


class Whereabouts(NamedTuple):
    """Function, file and line; whether something that may take long is under way: a hook, validation, compilation."""

    place: str = "its start"
    may_take_long: bool = True


def whereabouts() -> Whereabouts:
    """Of the main thread now. Waiting for other ranks is not what may take long, wherever it happens."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = list(_outwards(frame))
    if not frames:
        return Whereabouts()
    waits = any(_COMMUNICATES in one.f_code.co_filename for one in frames)
    return Whereabouts(_described(frames[0]), not waits and any(map(_takes_long, frames)))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _takes_long(frame: FrameType) -> bool:
    """A callback's or a module's own hook of Lightning's, other than those that make the step."""
    name, file = frame.f_code.co_name, frame.f_code.co_filename.replace("\\", "/")
    if name == "_call_lightning_module_hook":
        return str(frame.f_locals.get("hook_name", "")).startswith("on_")
    return name == "_call_callback_hooks" or any(part in file for part in _MAY_TAKE_LONG)


def _described(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
