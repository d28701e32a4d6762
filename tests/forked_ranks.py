"""For fresh scripts only, never within pytest: ranks that share one import, as `fork` has them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What Lightning's own launcher gives to a process that it started."""
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def start(function: Callable[..., object], *arguments: object, **environment: str) -> int:
    """The process in which function(*arguments) runs; it ends with status 0, or 1 after an error."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_ranks(world: int, function: Callable[..., object], *arguments: object) -> None:
    """function(rank, world, *arguments) on `world` ranks; once one fails, the others are killed."""
    port, left = free_port(), set[int]()
    for rank in range(world):
        left.add(start(function, rank, world, *arguments, **environment_of(rank, world, port)))
    failed = False
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not failed:
            failed = True
            for other in left:
                os.kill(other, signal.SIGKILL)
    assert not failed, f"one of {world} ranks failed"
