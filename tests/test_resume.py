"""A run that was stopped, however and wherever, ends as if it had not been: bit for bit."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from resumable_runs import BATCHES, EPOCHS, Run, Server, steps_per_epoch

from lightning_diffusion.datamodules.base import rescale
from lightning_diffusion.resume import (
    Place,
    RandomKey,
    ResumableSampler,
    StreamSampler,
    hash_seed,
    place_of,
    put_,
)

ENDS_WITH = {"SIGKILL": -9, "SIGTERM": 143, "exception": 1}


@pytest.fixture(scope="module")
def run():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """Uninterrupted runs, by micro-batches per step."""
    folders = {accumulate: tmp_path_factory.mktemp(f"straight{accumulate}") for accumulate in (1, 3)}
    for accumulate, folder in folders.items():
        assert run(Run(str(folder), accumulate=accumulate)) == 0, (folder / "log.txt").read_text()
    return folders


def place_to_stop(kind, accumulate, at_epoch_end):
    """Epoch and micro-batch, and how often to save; a SIGKILL comes after the first checkpoint."""
    dice = random.Random(hash_seed(kind, accumulate, at_epoch_end))
    if at_epoch_end:
        return {"epoch": dice.randrange(2), "batch": -1, "save_every": steps_per_epoch(accumulate)}
    within_a_window = [batch for batch in range(BATCHES - 1) if batch % accumulate == accumulate // 2]
    return {"epoch": 1, "batch": dice.choice(within_a_window), "save_every": 2}


CASES = list(itertools.product(ENDS_WITH, (0, 2), (1, 3), (False, True)))


@pytest.mark.parametrize(("kind", "workers", "accumulate", "at_epoch_end"), CASES)
def test_a_stopped_and_resumed_run_ends_bit_identical(
    run, straight, tmp_path, kind, workers, accumulate, at_epoch_end
):
    limit = ("max_epochs", "max_steps")[CASES.index((kind, workers, accumulate, at_epoch_end)) // 3 % 2]
    stopped = Run(
        str(tmp_path), workers, accumulate, limit, kind, **place_to_stop(kind, accumulate, at_epoch_end)
    )
    assert run(stopped) == ENDS_WITH[kind], (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "end.ckpt").exists()
    resumed = replace(stopped, kind=None, resume=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert run(resumed) == 0, (tmp_path / "log.txt").read_text()
    assert_same_end(straight[accumulate], tmp_path)
    assert_same_trace(straight[accumulate], tmp_path)


def assert_same_end(straight, resumed):
    """Weights, averages, optimizer state, learning rates, the Trainer's counts, and samples."""
    expected, found = (torch.load(folder / "end.ckpt") for folder in (straight, resumed))
    expected["callbacks"], found["callbacks"] = (
        {name: state for name, state in end["callbacks"].items() if "ModelCheckpoint" not in name}
        for end in (expected, found)
    )
    assert set(expected["callbacks"]) >= {"EMA"}
    assert_identical(expected, found)
    assert_identical(*(torch.load(folder / "samples.pt") for folder in (straight, resumed)))


def assert_identical(expected, found, path=""):
    assert type(expected) is type(found), path
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), path
    elif isinstance(expected, dict):
        assert list(expected) == list(found), path
        for key in expected:
            assert_identical(expected[key], found[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found), path
        for index, pair in enumerate(zip(expected, found, strict=True)):
            assert_identical(*pair, f"{path}/{index}")
    else:
        assert expected == found, path


def assert_same_trace(straight, resumed):
    """Every micro-batch, those done twice too, had the same loss, step and learning rate; none was left out."""
    expected, found = ((folder / "trace.txt").read_text().splitlines() for folder in (straight, resumed))
    assert len(expected) == EPOCHS * BATCHES == len(set(expected))
    assert set(found) == set(expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_sampler_deals_the_global_order_out(world_size):
    """Sample j of rank r is number j * world_size + r, so the order is the same for any number of processes."""
    ranks = [list(ResumableSampler(range(18), world_size, rank, seed=3)) for rank in range(world_size)]
    dealt = [index for together in zip(*ranks, strict=True) for index in together]
    assert dealt == list(ResumableSampler(range(18), seed=3))
    assert sorted(dealt) == list(range(18))


def test_epochs_and_seeds_differ_and_the_same_repeat():
    def order(seed, epoch):
        sampler = ResumableSampler(range(100), seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = {order(seed, epoch) for seed, epoch in itertools.product(range(4), repeat=2)}
    assert len(orders) == 16  # seed + epoch, as torch's own sampler has it, gives 7
    assert order(1, 2) == order(1, 2)


def test_only_the_resumed_epoch_begins_in_its_midst():
    whole, resumed = (ResumableSampler(range(10), 2, 1, seed=0) for _ in range(2))
    resumed.start_at(4, 3)
    for epoch, skipped in ((4, 3), (5, 0)):
        whole.set_epoch(epoch)
        resumed.set_epoch(epoch)
        assert list(resumed) == list(whole)[skipped:]
        assert len(resumed) == 5


@pytest.mark.parametrize(("drop_last", "expected"), [(True, 10), (False, 12)])
def test_what_does_not_divide_is_left_out_or_repeated(drop_last, expected):
    samplers = [ResumableSampler(range(11), 2, rank, seed=0, drop_last=drop_last) for rank in range(2)]
    dealt = [index for sampler in samplers for index in sampler]
    assert len(dealt) == expected == sum(map(len, samplers))
    assert len(set(dealt)) == min(expected, 11)


def test_a_stream_never_repeats():
    sampler, seen = StreamSampler(range(6), 2, 1), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen += sampler
    assert seen == [1, 3, 5, 7, 9, 11, 13, 15, 17]


def test_the_run_seed_is_that_of_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert list(ResumableSampler(range(50))) == list(ResumableSampler(range(50), seed=7))


def test_global_draws_do_not_depend_on_the_number_of_processes():
    whole = RandomKey(1, 2, 3).uniform("levels", 12)
    shares = [RandomKey(1, 2, 3, rank=rank, world_size=3).uniform("levels", 4) for rank in range(3)]
    assert torch.equal(torch.stack(shares, 1).flatten(), whole)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 3)])
def test_each_stratum_gets_one_draw_per_optimizer_step(world_size, accumulate):
    batch = 4
    n = batch * world_size * accumulate
    keys = [
        RandomKey(0, 1, 6 + a, accumulate, rank, world_size)
        for a in range(accumulate)
        for rank in range(world_size)
    ]
    draws = torch.cat([key.stratified_uniform("levels", batch) for key in keys])
    assert sorted((draws * n).floor().tolist()) == list(range(n))


class Loops:
    """Lightning's own fit loop, its counters moved as it moves them, as it would be saved in a hook."""

    def __init__(self, num_batches=7, accumulate=3):
        import lightning

        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
        )
        self.loop, self.num_batches, self.accumulate = trainer.fit_loop, num_batches, accumulate

    @property
    def batches(self):
        return self.loop.epoch_loop.batch_progress

    def start_epoch(self):
        self.loop.epoch_progress.increment_ready()
        self.loop.epoch_progress.increment_started()
        self.batches.reset_on_run()
        return self

    def train(self, count):
        for _ in range(count):
            self.batches.increment_ready()
            self.batches.is_last_batch = self.batches.current.ready == self.num_batches
            self.batches.increment_started()
            self.batches.increment_processed()
            self.batches.increment_completed()
        return self

    def end_epoch(self):
        self.loop.epoch_progress.increment_processed()
        return self

    def place(self):
        return place_of(self.loop.state_dict(), self.accumulate)


def within(loops):
    """In the midst of the next micro-batch."""
    loops.batches.increment_ready()
    loops.batches.is_last_batch = loops.batches.current.ready == loops.num_batches
    loops.batches.increment_started()
    return loops


PLACES = {
    "nothing begun": (lambda x: x, Place(0, 0)),
    "within the first": (lambda x: within(x.start_epoch()), Place(0, 0)),
    "after the first of a window": (lambda x: x.start_epoch().train(4), Place(0, 3)),
    "after a window": (lambda x: x.start_epoch().train(6), Place(0, 6)),
    "within the last": (lambda x: within(x.start_epoch().train(6)), Place(0, 6)),
    "after the last, a short window": (lambda x: x.start_epoch().train(7), Place(1, 0)),
    "epoch over": (lambda x: x.start_epoch().train(7).end_epoch(), Place(1, 0)),
    "within the next epoch": (
        lambda x: within(x.start_epoch().train(7).end_epoch().start_epoch().train(4)),
        Place(1, 3),
    ),
    "cut short by max_steps": (lambda x: x.start_epoch().train(3).end_epoch(), Place(0, 3)),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_place_is_the_first_micro_batch_that_was_not_used(name):
    make, expected = PLACES[name]
    assert make(Loops()).place() == expected


@pytest.mark.parametrize("name", PLACES)
def test_a_place_once_put_stays(name):
    """Also when the run is stopped again before it has trained."""
    make, expected = PLACES[name]
    loops = make(Loops())
    state = loops.loop.state_dict()
    put_(state, expected)
    loops.loop.load_state_dict(state)
    assert loops.place() == expected


def test_a_rewound_count_is_that_of_the_micro_batches_that_are_kept():
    state = Loops().start_epoch().train(7).end_epoch().start_epoch().train(4).loop.state_dict()
    put_(state, Place(1, 3))
    assert state["epoch_loop.batch_progress"]["total"]["processed"] == 10


def test_another_batch_size_goes_on_at_the_same_sample():
    assert rescale(Place(3, 6), 64, 128) == Place(3, 3)
    with pytest.warns(UserWarning, match=r"after 384 samples of epoch 3.*84 are trained on again"):
        assert rescale(Place(3, 6), 64, 100) == Place(3, 3)
