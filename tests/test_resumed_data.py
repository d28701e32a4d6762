"""With our datamodules any LightningModule goes on where it was stopped, with the images that would have come."""

import lightning
import numpy as np
import pytest
import torch
from pictures import save
from processes_of_tests import run_processes

from lightning_diffusion.datamodules import DigitsDataModule, ImageFolderDataModule

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Seeing(lightning.LightningModule):
    """Remembers the images that it is trained on; knows nothing of resuming."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.begun = [], []

    def on_train_epoch_start(self):
        self.begun.append(self.current_epoch)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["image"]))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated = batch["image"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, folder, resume=None, **options):
    module = Seeing()
    trainer = lightning.Trainer(**{**QUIET, "max_epochs": 2, **options})
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "end.ckpt")
    return module.seen, module


def same(some, others):
    return [place[:2] for place in some] == [place[:2] for place in others] and all(
        torch.equal(a[2], b[2]) for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize(
    ("accumulate", "stop"), [(1, n) for n in range(1, 13)] + [(4, n) for n in range(1, 5)]
)
def test_any_module_resumes_after_any_step(tmp_path, accumulate, stop):
    """Six micro-batches an epoch, so with four to a step every second step is short."""
    data, options = DigitsDataModule(220), {"accumulate_grad_batches": accumulate}
    straight, _ = fit(data, tmp_path, **options)
    first, before = fit(data, tmp_path, max_epochs=-1, max_steps=stop, **options)
    rest, after = fit(data, tmp_path, tmp_path / "end.ckpt", **options)
    assert len(straight) == 12
    assert before.begun + after.begun == [0, 1]
    assert same(first + rest, straight)


def test_a_place_within_a_window_is_rounded_down(tmp_path):
    """Saved by hand after five micro-batches of steps of three: the fourth and fifth come again."""
    data = DigitsDataModule(220)

    class SaveWithin(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 4):
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    straight, _ = fit(data, tmp_path, accumulate_grad_batches=3, callbacks=[SaveWithin()])
    rest, _ = fit(data, tmp_path, tmp_path / "within.ckpt", accumulate_grad_batches=3)
    assert same(rest, straight[9:])


def test_another_batch_size_goes_on_at_the_same_image(tmp_path):
    fit(DigitsDataModule(220), tmp_path, max_epochs=-1, max_steps=8)
    whole, _ = fit(DigitsDataModule(110), tmp_path / "whole")
    rest, _ = fit(DigitsDataModule(110), tmp_path / "rest", tmp_path / "end.ckpt")
    assert same(rest, whole[13 + 4 :])
    with pytest.warns(
        UserWarning, match="440 samples of epoch 1 in batches of 220.* 140 are trained on again"
    ):
        rest, _ = fit(DigitsDataModule(300), tmp_path / "rest", tmp_path / "end.ckpt")
    whole, _ = fit(DigitsDataModule(300), tmp_path / "whole")
    assert same(rest, whole[5 + 1 :])


def test_validating_a_checkpoint_does_not_move_the_next_fit(tmp_path):
    data = DigitsDataModule(220)
    straight, module = fit(data, tmp_path, max_epochs=-1, max_steps=3)
    lightning.Trainer(**QUIET).validate(module, data, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert same(fit(data, tmp_path, max_epochs=-1, max_steps=3)[0], straight)


def test_half_of_the_training_images_are_mirrored_others_in_each_epoch(tmp_path, tmp_path_factory):
    pictures = tmp_path_factory.mktemp("pictures")
    for index in range(64):
        picture = np.zeros((6, 6))
        picture[:, 0] = 3 * index
        save(pictures / f"{index:02}.png", picture)
    data = ImageFolderDataModule(pictures, 6, 8, 1, flip=True, held_out=0.25)
    seen, module = fit(data, tmp_path)
    plain, _ = fit(ImageFolderDataModule(pictures, 6, 8, 1, held_out=0.25), tmp_path)
    mirrored = [(a[2] != b[2]).flatten(1).any(1) for a, b in zip(seen, plain, strict=True)]
    for (_, _, image), (_, _, original), chosen in zip(seen, plain, mirrored, strict=True):
        assert torch.equal(image, torch.where(chosen[:, None, None, None], original.flip(-1), original))
    assert 0.3 < torch.cat(mirrored).float().mean() < 0.7
    assert not torch.equal(torch.cat(mirrored[:6]), torch.cat(mirrored[6:]))
    assert torch.equal(module.validated, data.held_out_data().__getitems__(range(8, 16))["image"])
    assert same(fit(data, tmp_path)[0], seen)


TWO_PROCESSES = """
import sys, lightning, torch
from test_resumed_data import QUIET, Seeing
from lightning_diffusion.datamodules import DigitsDataModule

class Saving(Seeing):
    def on_fit_end(self):
        torch.save(self.seen, f"{sys.argv[1]}/{self.global_rank}.pt")

torch.set_num_threads(1)
together = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
lightning.Trainer(**QUIET, **together, max_epochs=2).fit(Saving(), DigitsDataModule(110))
"""


@pytest.mark.slow
def test_two_processes_share_the_global_batch_of_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    run_processes(tmp_path / "two.py", tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone, _ = fit(DigitsDataModule(220), tmp_path)
    together = [(*a[:2], torch.stack([a[2], b[2]], 1).flatten(0, 1)) for a, b in zip(*ranks, strict=True)]
    assert same(together, alone)
