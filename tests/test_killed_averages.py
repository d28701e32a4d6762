"""A run that was killed ten times, also while it was writing, leaves the averages of one that never was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(tmp_path):
    script = Path(__file__).parent / "killed_averages.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "10 kills" in done.stdout
