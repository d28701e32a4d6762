"""Several processes of a test: fresh ones, that share no lock with pytest, and none of which outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OF_A_WORLD = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
HERE = Path(__file__).parent


def run_processes(script: str | Path, *arguments: object, processes: int = 2, timeout: float = 240) -> str:
    """What `tests/SCRIPT` prints under torchrun on `processes` processes; its errors when it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run_script(script, *arguments, launcher=torchrun, timeout=timeout)


def run_script(
    script: str | Path, *arguments: object, launcher: Sequence[str] = (), timeout: float = 240
) -> str:
    """What `tests/SCRIPT` prints, run by Python itself or by a launcher's module; its errors when it fails."""
    done = run([sys.executable, *launcher, HERE / script, *arguments], timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def run(command: list[object], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run in a session of its own, on one thread, ended with all its children after `timeout` seconds."""
    started = subprocess.Popen(
        [str(part) for part in command], env=environment(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        out, err = started.communicate()
        raise AssertionError(f"{command} did not end within {timeout} s:\n{(out + err)[-6000:]}") from None
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_WORLD}
    paths = os.pathsep.join(filter(None, (str(HERE), kept.get("PYTHONPATH"))))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
