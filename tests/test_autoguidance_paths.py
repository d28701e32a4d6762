"""AutoGuidance by every way in which samples are drawn: networks that denoise to a known grey, so images are known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_module import fit
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA, GenerativeMetrics, SampleGrid
from lightning_diffusion.cli import main
from lightning_diffusion.exported import export_safetensors
from lightning_diffusion.generative import Draws, drawn_features
from lightning_diffusion.guidance import Guidance
from lightning_diffusion.plots import to_pixels

MODEL, GUIDE, SCALE = 0.25, 0.1, 3.0
EXPECTED = GUIDE + SCALE * (MODEL - GUIDE)  # Karras et al. 2024, eq. 3: 0.55
DATA = ["--data", "DigitsDataModule"]


def constant(grey):
    """Predicts x_0 = grey whatever it is given: the UNet's last bias, all else of the last layer zero."""
    torch.manual_seed(0)
    network = ld.UNet((1, 8, 8), 8, (1,), 1, attention_levels=(), num_classes=10)
    parts = (ld.FlowSchedule(), ld.UniformTime(), ld.DDPMPreconditioning(target=ld.X0()), ld.Constant())
    model = ld.DiffusionModule(network, ld.DiffusionObjective(*parts), sampler=ld.Euler(2))
    last = [p for p in network.parameters() if p.ndim == 1][-1]
    last.data.fill_(grey)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Exported model and guide."""
    folder = tmp_path_factory.mktemp("pair")
    for name, grey in (("model", MODEL), ("guide", GUIDE)):
        export_safetensors(constant(grey), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DIFFUSION_CACHE", str(tmp_path / "cache"))


def test_the_denoisers_are_constants():
    assert torch.allclose(constant(MODEL).sample(3), torch.tensor(MODEL), atol=1e-6)


@pytest.fixture
def trained(files, tmp_path):
    """Of a step that changes nothing, with everything that draws, and the checkpoint of it."""
    guidance = ld.AutoGuidance(str(files / "guide.safetensors"), SCALE)
    model = constant(MODEL)
    model.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    pixels = ld.ModuleFeatures(nn.Flatten(), "pixels", channels=1, mean=[0.0], std=[1.0])
    metrics = GenerativeMetrics(pixels, num_samples=70, guidance=guidance)
    grid = SampleGrid(rows=2, columns=2, scale=1, guidance=guidance)
    options = {"default_root_dir": tmp_path, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = fit(model, None, 1, callbacks=[EMA(0.5), metrics, grid], **options)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return model, trainer, guidance


def test_pictures_and_metrics_show_what_the_formula_gives(trained, tmp_path):
    model, trainer, _ = trained
    picture = np.asarray(Image.open(tmp_path / "samples" / "step=000001.png"))
    assert (picture[1:9, 1:9] == to_pixels(torch.full((1, 1, 1, 1), EXPECTED)).item()).all()
    (own,) = [c for c in trainer.callbacks if isinstance(c, GenerativeMetrics)]
    assert "metrics/frechet_pixels_70_autoguidance3" in trainer.callback_metrics
    seen = []
    looking = lambda images: (seen.append(images), images.flatten(1).float())[1]  # noqa: E731
    drawn_features(model, own.draws[0], looking, torch.arange(10))
    assert isinstance(own.draws[0], Draws)
    assert seen[0].unique().tolist() == [round((EXPECTED + 1) * 127.5)]


def test_nothing_of_the_guide_is_in_model_or_checkpoint(trained, tmp_path):
    model, _, guidance = trained
    names = constant(MODEL).state_dict().keys()
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert model.state_dict().keys() == saved["state_dict"].keys() == names
    assert not any(part is guidance.model for part in model.modules())
    averages = next(iter(model.averages.values()))
    assert averages.keys() == model.averaged_parameters().keys()
    grey = [p for p in guidance.model.network.parameters() if p.ndim == 1][-1]
    values = [x for x in saved["state_dict"].values() if x.shape == grey.shape]
    assert not any(torch.equal(x, grey) for x in values)
    assert isinstance(guidance, Guidance)


def test_the_commands_draw_what_the_formula_gives(files, folder):
    guided = ["--guidance", str(SCALE), "--guide", str(files / "guide.safetensors")]
    model = ["--checkpoint", str(files / "model.safetensors")]
    assert main(["sample", *model, *guided, "--num", "5", "--out", "a.npz"]) == 0
    images = np.load("a.npz")["images"]
    assert np.allclose(images, EXPECTED, atol=1e-5)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        from lightning_diffusion import generative

        kept = generative.extract
        patch.setattr(generative, "extract", lambda n, x, e: (seen.append(x), kept(n, x, e))[1])
        quick = ["--num", "20", "--extractor.steps", "1", "--extractor.num_features", "4", "--out", "out"]
        assert main(["evaluate", *model, *guided, *DATA, *quick]) == 0
    assert seen[-1].unique().tolist() == [round((EXPECTED + 1) * 127.5)]
    (row,) = json.loads((folder / "out" / "evaluation.json").read_text())["rows"]
    assert row["evaluations"] == 2 * 2, "both networks, each step"
    assert row["guide"] == str(files / "guide.safetensors")
    assert row["guide_weights"] == "online"
