"""Reads what W&B has written offline: records in the log format of LevelDB, blocks of 32 KiB behind 7 bytes."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7
_FULL, _LAST = 1, 4


def payloads(data: bytes):
    """Whole payloads, put together from their fragments."""
    at, part = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        part += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (_FULL, _LAST):
            yield part
            part = b""


def records(folder: Path, timeout: float = 30.0) -> list[Record]:
    """Of the one run in a folder `wandb`; W&B writes behind the back of `finish`, up to the record `exit`."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        (file,) = [*folder.glob("*run-*/run-*.wandb")] or [None]
        data = file.read_bytes() if file else b""
        found = [Record.FromString(payload) for payload in payloads(data)]
        if found and any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"no record `exit` in {folder}")


def history(found: list[Record]) -> list[dict[str, object]]:
    """What was logged, by name; pictures as dicts."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows.append({name: json.loads(value) for name, value in items.items()})
    return rows


def config(found: list[Record]) -> dict[str, object]:
    """Of the run."""
    updates = [update for record in found for update in record.config.update]
    return {update.key: json.loads(update.value_json) for update in updates}
