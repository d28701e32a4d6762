"""PostHocEMA in a foreign project: the averages that were not kept, from those that were."""

from __future__ import annotations

import pytest
import torch
from foreign import Classifier, averages, checkpointing, fit, same
from torch.testing import assert_close

from lightning_diffusion.callbacks import EMA, PostHocEMA
from lightning_diffusion.posthoc import solve_coefficients
from lightning_diffusion.profiles import FixedDecay, PowerFunction
from lightning_diffusion.recorder import Snapshots
from lightning_diffusion.snapshots import combine, list_snapshots


def rebuild(folder, sigma_rel: float) -> dict[str, torch.Tensor]:
    snapshots = list_snapshots(folder)
    times, widths = [s.time for s in snapshots], [s.sigma_rel for s in snapshots]
    found = solve_coefficients(times, widths, times[-1], sigma_rel, "random_walk")
    return combine(snapshots, found[:, None])[0]


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("storage", ["float32", "difference"])
@pytest.mark.parametrize("sigma_rel", [0.07, 0.2])
def test_an_average_that_was_not_kept_is_rebuilt(tmp_path, sigma_rel, storage):
    kept, online = (
        PostHocEMA(every_n_steps=4, directory=tmp_path, storage=storage),
        EMA(PowerFunction(sigma_rel)),
    )
    module = Classifier()
    fit(module, kept, max_steps=128)
    fit(Classifier(), online, max_steps=128)
    assert len(list_snapshots(tmp_path)) == 2 * 32
    rebuilt = rebuild(tmp_path, sigma_rel)
    want, now = flat(averages(online)), flat({name: module.get_parameter(name).detach() for name in rebuilt})
    assert (flat(rebuilt) - want).norm() < 2e-3 * (want - now).norm()


def test_the_kept_averages_are_the_online_ones(tmp_path):
    kept = PostHocEMA(sigma_rels=(0.05, 0.1), every_n_steps=4, directory=tmp_path)
    fit(Classifier(), kept, max_steps=10)
    assert sorted({s.step for s in list_snapshots(tmp_path)}) == [4, 8, 10]
    last = list_snapshots(tmp_path)[-2:]
    for snapshot, found in zip(last, combine(last, torch.eye(2, dtype=torch.float64)), strict=True):
        assert_close(found, averages(kept, f"{snapshot.sigma_rel:g}"))


@pytest.mark.parametrize("storage", ["float32", "difference"])
def test_a_resumed_run_leaves_the_same_files(tmp_path, storage):
    def new(folder):
        return PostHocEMA(every_n_steps=2, directory=tmp_path / folder, storage=storage)

    fit(Classifier(), new("straight"), max_steps=48)
    saving = checkpointing(tmp_path, every_n_train_steps=6)
    fit(Classifier(), new("stopped"), saving, enable_checkpointing=True, max_steps=34)
    fit(Classifier(), new("stopped"), max_steps=48, ckpt_path=tmp_path / "step=24.ckpt")
    straight, resumed = (list_snapshots(tmp_path / folder) for folder in ("straight", "stopped"))
    assert [s.path.name for s in straight] == [s.path.name for s in resumed]
    everything = torch.eye(len(straight), dtype=torch.float64)
    for a, b in zip(combine(straight, everything), combine(resumed, everything), strict=True):
        assert same(a, b)


def test_another_run_may_not_write_into_the_folder(tmp_path):
    fit(Classifier(), PostHocEMA(every_n_steps=2, directory=tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"holds snapshots of another run\. Give this one a directory of its own"
    ):
        fit(Classifier(), PostHocEMA(every_n_steps=2, directory=tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_errors_of_writing_surface(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        fit(Classifier(), PostHocEMA(every_n_steps=2, directory=blocked / "snapshots"))


def test_old_snapshots_are_thinned(tmp_path):
    fit(Classifier(), PostHocEMA(every_n_steps=2, directory=tmp_path, keep=5), max_steps=40)
    assert len({s.step for s in list_snapshots(tmp_path)}) == 5


def test_snapshots_are_a_64th_of_the_run_apart_and_lie_in_its_folder(tmp_path):
    fit(Classifier(), PostHocEMA(), max_steps=128, default_root_dir=tmp_path)
    assert sorted({s.step for s in list_snapshots(tmp_path / "snapshots")}) == list(range(2, 129, 2))
    with pytest.raises(ValueError, match=r"has no end.* give every_n_steps"):
        fit(Classifier(), PostHocEMA(), max_steps=-1, max_epochs=-1, default_root_dir=tmp_path / "endless")


def test_only_power_functions_can_be_rebuilt():
    with pytest.raises(ValueError, match=r"not FixedDecay\(decay=0\.9\)\. Write decay=.*or use PostHocEMA"):
        EMA(FixedDecay(0.9), snapshots=Snapshots())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"storage": "bfloat16"},
            "storage='bfloat16' is not known: write one of float32, float16, difference",
        ),
        ({"every_n_steps": 0}, "every_n_steps has to be at least 1"),
        ({"keep": 1}, "keep at least 2"),
        ({"keep": 9, "storage": "difference"}, "files that differences build on: write storage='float32'"),
        ({"sigma_rels": (0.05, 0.3)}, r"write a number between 0 and 0\.2887"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PostHocEMA(**options)
