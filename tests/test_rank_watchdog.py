"""A rank that fails, dies or hangs stops all, with its message; the run goes on from its last checkpoint."""

import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from failing_ranks import BATCH_SIZE, BATCHES, EPOCHS, FAULTS
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from processes_of_tests import run_script

from lightning_diffusion.callbacks import RankWatchdog
from lightning_diffusion.callbacks.rank_watchdog import Processes
from lightning_diffusion.io import load_checkpoint
from lightning_diffusion.ranks import Rank, Stalls

SAID = {
    "SIGKILL": r"rank 1 \(\S+, process \d+\) ended without a word",
    "SIGSTOP": r"rank 1 \(\S+, process \d+\) has not answered for \d+ s: it is stopped, or cannot be reached",
    "exception": r"rank 1 \(\S+, process \d+\) failed: ArithmeticError: on purpose",
    "exception of the first": r"rank 0 \(\S+, process \d+\) failed: ArithmeticError: on purpose",
    "stall": r"no rank has got on for \d+ s: rank 1 \(.*\) is in training_step \(failing_ranks.py, line \d+\); the",
    "broken file": r"rank 1 \(.*\) failed: BrokenImageError: found a file that is no whole image: '.*\.png'",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    run_script("failing_ranks.py", folder)
    return folder


def how_it_ended(folder, attempt=0):
    return json.loads((folder / f"ended-{attempt}.json").read_text())


@pytest.mark.parametrize("kind", FAULTS)
def test_all_ranks_stop_with_the_message_and_the_last_checkpoint_is_whole(ended, kind):
    folder, other = ended / kind, int(kind == "exception of the first")
    end = how_it_ended(folder)
    assert end["statuses"][other] == 1
    assert end["statuses"][1 - other] == (-9 if kind.startswith("SIG") else 1)
    assert end["seconds"] < 30, "with three seconds of patience"
    errors = (folder / f"errors-0-{other}.txt").read_text()
    assert re.search(SAID[kind], errors), errors[-3000:]
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 9


def steps(folder, attempts):
    """Images of each step of the weights at the end, over both ranks."""
    kept = {}
    for attempt in range(attempts):
        for rank in range(2):
            for line in (folder / f"seen-{attempt}-{rank}.txt").read_text().splitlines():
                step, *images = map(int, line.split())
                kept[step, rank] = images
    return kept


def test_a_run_with_a_killed_rank_goes_on_to_the_same_end(ended):
    assert how_it_ended(ended / "resumed", 1)["statuses"] == [0, 0]
    straight, resumed = steps(ended / "none", 1), steps(ended / "resumed", 2)
    assert straight == resumed
    for epoch in range(EPOCHS):
        part = range(epoch * BATCHES + 1, (epoch + 1) * BATCHES + 1)
        images = [image for (step, _), images in straight.items() if step in part for image in images]
        assert sorted(images) == list(range(2 * BATCHES * BATCH_SIZE))
    expected, found = (torch.load(ended / name / "end.pt") for name in ("none", "resumed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def ranks(*marks, **given):
    return [
        Rank(number, "host", marks=mark, may_take_long=False, **given) for number, mark in enumerate(marks)
    ]


def looks(stalls, ranks, seconds):
    """The first verdict within so many ticks."""
    for _ in range(seconds):
        for one in ranks:
            one.wait(1.0)
        if (verdict := stalls.look(ranks)) is not None:
            return verdict
    return None


def test_who_is_behind_is_to_blame():
    verdict = looks(Stalls(5.0), ranks(20, 19, 20), 7)
    assert verdict.blamed == 1
    assert verdict.said == (
        "no rank has got on for 6 s: rank 1 (host) is in its start; the others wait for it"
    )
    assert looks(Stalls(5.0), ranks(20, 20), 7).blamed == -1


def test_first_micro_batches_and_what_may_take_long_stop_the_clock():
    assert looks(Stalls(5.0), ranks(2, 2), 100) is None
    busy = ranks(20, 20)
    busy[0].may_take_long = True
    stalls = Stalls(5.0)
    assert looks(stalls, busy, 100) is None
    busy[0].may_take_long = False
    assert looks(stalls, busy, 5) is None
    assert looks(stalls, busy, 1) is not None


def test_five_times_the_longest_micro_batch_is_always_allowed():
    stalls, slow = Stalls(5.0), ranks(4, 4)
    assert looks(stalls, slow, 10) is None
    for one in slow:
        one.is_at(20, "training_step", False)
    assert looks(stalls, slow, 50) is None
    assert looks(stalls, slow, 1).said.startswith("no rank has got on for 51 s")


def test_lightnings_observer_rests_meanwhile():
    """It would kill this process."""
    child = SimpleNamespace(poll=lambda: None, returncode=1, send_signal=None, pid=0)
    observer = _ChildProcessObserver(main_pid=-1, child_processes=[child], sleep_period=0)
    observer._finished = True
    processes, seen = Processes([child]), []
    thread = threading.Thread(target=lambda: seen.append(observer._run()))
    registered = threading.enumerate
    threading.enumerate = lambda: [*registered(), observer]
    try:
        processes.put_observer_to_rest()
    finally:
        threading.enumerate = registered
    thread.start()
    thread.join()
    assert seen == [True]


def test_one_process_needs_no_watch():
    watchdog = RankWatchdog()
    watchdog.setup(SimpleNamespace(world_size=1), None, "fit")
    watchdog.on_train_batch_start(None)
    watchdog.on_exception(None, None, ValueError())
    watchdog.teardown(None, None, "fit")
    assert not [thread for thread in threading.enumerate() if thread.name == "rank-watch"]
    with pytest.raises(ValueError, match=r"silent=0.*expected numbers of seconds above 0"):
        RankWatchdog(silent_seconds=0)
