from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_diffusion import DiffusionModule, Heun, UNet
from lightning_diffusion.callbacks import PowerFunctionEMA, SampleGrid
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.plots import image_grid, to_pixels

ALONE = SimpleNamespace(world_size=1)


class Drawing(LightningModule):
    """Trains on noise from the global generator; its samples show the class, and waste random numbers."""

    def __init__(
        self, num_classes: int = 3, averages: dict[str, Any] | None = None, grey: float = 0.0
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.num_classes, self.averages, self.grey = num_classes, averages or {}, grey
        self.calls: list[dict[str, Any]] = []
        self.losses: list[float] = []

    def sample(self, num_samples: int, condition: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
        torch.rand(7)
        self.calls.append({"num_samples": num_samples, **options})
        images = torch.full((num_samples, 1, 4, 4), self.grey)
        return (
            images
            if condition is None
            else images + condition["label"].reshape(-1, 1, 1, 1) / self.num_classes
        )

    def training_step(self, batch: Tensor) -> Tensor:
        loss = (self.layer(batch) - torch.randn(batch.shape)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(
    module: LightningModule, folder: Path, *callbacks: Callback, data: Any = None, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    settings = {"max_steps": 5, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_model_summary=False,
        **(settings | options),
    )
    trainer.fit(module, data or DataLoader(torch.ones(12, 1)))
    return trainer


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "samples").iterdir())


def test_pictures_appear_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    fit(Drawing(), tmp_path, SampleGrid(every_n_steps=2))
    assert pictures(tmp_path) == ["step=000002.png", "step=000004.png", "step=000005.png"]


def test_the_last_step_is_drawn_once(tmp_path: Path) -> None:
    module = Drawing()
    fit(module, tmp_path, SampleGrid(every_n_steps=5))
    assert pictures(tmp_path) == ["step=000005.png"]
    assert len(module.calls) == 1


def test_micro_batches_are_not_steps(tmp_path: Path) -> None:
    module = Drawing()
    fit(module, tmp_path, SampleGrid(every_n_steps=2), accumulate_grad_batches=3, max_steps=4)
    assert pictures(tmp_path) == ["step=000002.png", "step=000004.png"]
    assert len(module.calls) == 2


def test_each_row_shows_one_class(tmp_path: Path) -> None:
    fit(Drawing(num_classes=4, grey=-1.0), tmp_path, SampleGrid(columns=3, scale=1))
    pixels = np.asarray(Image.open(tmp_path / "samples" / "step=000005.png"))
    assert pixels.shape == (4 * 5 + 1, 3 * 5 + 1)
    rows = [np.unique(pixels[1 + 5 * row : 5 + 5 * row, 1:5]).tolist() for row in range(4)]
    assert rows == [[0], [32], [64], [96]]


def test_many_classes_are_cut_and_no_class_is_drawn_in_a_square() -> None:
    many, none = Drawing(num_classes=1000), Drawing(num_classes=0)
    assert len(SampleGrid(rows=2, columns=3)._sample(ALONE, many)) == 6
    assert len(SampleGrid(rows=2, columns=3)._sample(ALONE, none)) == 6


@pytest.mark.parametrize(
    ("averages", "weights", "expected"),
    [({}, None, "online"), ({"ema": {}}, None, "ema"), ({"ema": {}}, "ema:slow", "ema:slow")],
)
def test_averaged_weights_draw_where_there_are_any(
    averages: dict[str, Any], weights: str, expected: str
) -> None:
    module = Drawing(averages=averages)
    SampleGrid(weights=weights, seed=7)._sample(ALONE, module)
    assert module.calls[0]["weights"] == expected
    assert module.calls[0]["seed"] == 7


def test_training_draws_the_same_random_numbers_with_and_without_pictures(tmp_path: Path) -> None:
    plain, drawn = Drawing(), Drawing()
    drawn.load_state_dict(plain.state_dict())
    fit(plain, tmp_path)
    fit(drawn, tmp_path, SampleGrid(every_n_steps=1))
    assert len(drawn.calls) == 5
    assert drawn.losses == plain.losses


def test_pictures_lie_in_the_run_folder(tmp_path: Path) -> None:
    trainer = fit(Drawing(), tmp_path, SampleGrid(), logger=CSVLogger(tmp_path, name="run"))
    assert trainer.log_dir is not None
    assert pictures(Path(trainer.log_dir)) == ["step=000005.png"]


def test_fast_dev_run_draws_but_writes_nothing(tmp_path: Path) -> None:
    module = Drawing()
    fit(module, tmp_path, SampleGrid(), fast_dev_run=True)
    assert len(module.calls) == 1
    assert not list(tmp_path.iterdir())


def test_a_diverged_model_gets_a_warning_and_goes_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Samples at step 5 hold NaN"):
        fit(Drawing(grey=float("nan")), tmp_path, SampleGrid())
    assert not (tmp_path / "samples").exists()


def test_wandb_gets_pixels_that_are_not_black(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    fit(Drawing(grey=-0.5), tmp_path, SampleGrid(columns=2, scale=1), logger=logger)
    logger.experiment.finish()
    (image,) = (tmp_path / "wandb").rglob("media/images/samples*.png")
    assert np.asarray(Image.open(image).convert("L"))[1, 1] == 64


def test_tensorboard_gets_height_width_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        images: list[Any] = []  # noqa: RUF012

        def add_image(self, tag: str, image: np.ndarray, step: int, dataformats: str) -> None:
            self.images.append((tag, image.shape, image.dtype, step, dataformats))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    class Logger(TensorBoardLogger):
        experiment = property(lambda self: Writer())  # type: ignore[assignment]

    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    fit(Drawing(), tmp_path, SampleGrid(columns=2, scale=1), logger=Logger(tmp_path))
    assert Writer.images == [("samples", (16, 11, 3), np.uint8, 5, "HWC")]


def test_pictures_show_averaged_weights_and_leave_training_bit_identical(tmp_path: Path) -> None:
    def train(folder: Path, *callbacks: Callback) -> DiffusionModule:
        torch.manual_seed(0)
        network = UNet((1, 8, 8), 8, multipliers=(1,), num_blocks=1, attention_levels=(), num_classes=10)
        module = DiffusionModule(network, sampler=Heun(3))
        fit(module, folder, PowerFunctionEMA(), *callbacks, data=DigitsDataModule(16), limit_val_batches=0)
        return module

    plain, drawn = train(tmp_path / "plain"), train(tmp_path / "drawn", SampleGrid(2, columns=3, scale=1))
    assert pictures(tmp_path / "drawn") == ["step=000002.png", "step=000004.png", "step=000005.png"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), drawn.parameters(), strict=True))
    label = torch.arange(10).repeat_interleave(3)
    averaged = drawn.sample(30, {"label": label}, weights="ema", seed=0)
    shown = np.asarray(Image.open(tmp_path / "drawn" / "samples" / "step=000005.png"))
    assert (shown == np.asarray(image_grid(averaged, columns=3, scale=1))).all()


def test_a_module_that_cannot_sample_is_refused(tmp_path: Path) -> None:
    class Classifier(Drawing):
        sample = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="Classifier has no method `sample`"):
        fit(Classifier(), tmp_path, SampleGrid())


@pytest.mark.parametrize("name", ["every_n_steps", "rows", "columns"])
def test_a_grid_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected 1 or more"):
        SampleGrid(**{name: 0})


def test_pixels_are_rounded_to_the_nearest_level_and_clipped() -> None:
    """All 256 levels survive a round trip, and so do they 0.49 levels off."""
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    for shift in (-0.49, 0.0, 0.49):
        images = (levels + shift) / 127.5 - 1
        assert (to_pixels(images).ravel() == np.arange(256)).all()
    assert to_pixels(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).ravel().tolist() == [0, 255]


def test_a_colour_grid_keeps_channels_and_enlarges_by_whole_pixels() -> None:
    images = torch.stack([torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, 1.0])]).reshape(
        2, 3, 1, 1
    )
    grid = np.asarray(image_grid(images.expand(2, 3, 2, 2), columns=1, scale=3))
    assert grid.shape == (2 * 7 + 1, 8, 3)
    assert (grid[1:7, 1:7] == [255, 0, 0]).all()
    assert (grid[8:14, 1:7] == [0, 0, 255]).all()


def test_small_images_are_enlarged_and_large_ones_are_not() -> None:
    assert image_grid(torch.zeros(1, 1, 8, 8)).size == (50, 50)
    assert image_grid(torch.zeros(4, 1, 64, 64)).size == (131, 131)


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 4, 8, 8)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 1, H, W\) or \(N, 3, H, W\)"):
        image_grid(torch.zeros(shape))
