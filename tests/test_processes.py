"""What holds over two gloo processes: each module asserts for itself, on every process."""

import pytest
from processes_of_tests import run_processes

MODULES = {
    "learning_processes": "an adaptive density learns on two processes what it learns on one",
    "guarded_processes": "processes skip and roll back alike, with whole and with sharded weights",
    "sharded_clipping": "shards are clipped as the whole",
    "sharded_ema": "each process averages its own shard",
    "sharded_precision": "shards compute in bfloat16 and add up in float32",
    "measuring_processes": "two processes measure what one does, and an error of the first ends both",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    try:
        run_processes("two_processes.py", folder, *MODULES)
    except AssertionError as error:
        return folder, str(error)
    return folder, ""


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_two_processes(ran, module):
    folder, printed = ran
    for rank in range(2):
        report = folder / f"{module}-{rank}.txt"
        assert report.exists(), printed or "it did not run"
        assert not report.read_text(), report.read_text()
