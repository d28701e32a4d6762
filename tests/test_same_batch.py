"""The same global batch on any number of processes: data, mirroring, latents, levels, drops; the same gradient."""

import pytest
import torch
from processes_of_tests import run_script
from torch.testing import assert_close

pytest.importorskip("litdata")

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_batch")
    run_script("same_batch_processes.py", folder)
    return folder


def global_batches(folder, job, world):
    """Of each process together, samples in their order, (micro-batches, samples, ...); the mean of losses."""
    ranks = [torch.load(folder / f"{job}-{world}-{rank}.pt") for rank in range(world)]
    dealt = {
        name: torch.stack([rank[name] for rank in ranks], 2).flatten(1, 2)
        for name in ("x0", "level", "label")
    }
    gradients = [rank["gradient"] for rank in ranks]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    loss = torch.stack([rank["loss"] for rank in ranks]).mean(0)
    return dealt, loss, gradients[0]


@pytest.mark.parametrize(("job", "worlds"), [("pixels", (2, 4)), ("latents", (2,))])
def test_several_processes_take_the_step_of_one(seen, job, worlds):
    expected, loss, gradient = global_batches(seen, job, 1)
    assert expected["level"].shape == (6, GLOBAL_BATCH)
    assert len(gradient) == 4
    assert expected["level"].unique().numel() == 6 * GLOBAL_BATCH
    assert 0 < (expected["label"] == 2).sum() < 6 * GLOBAL_BATCH / 2, "some labels are dropped"
    for world in worlds:
        dealt, its_loss, its_gradient = global_batches(seen, job, world)
        for name, value in expected.items():
            assert torch.equal(dealt[name], value), (world, name)
        assert_close(its_loss, loss, rtol=1e-5, atol=0)
        apart = (its_gradient - gradient).norm(dim=1) / gradient.norm(dim=1)
        assert apart.max() < 1e-5, (world, apart)
