"""The shipped configurations: every recipe is the paper's objective over the digits job, and trains."""

import math
from pathlib import Path

import pytest
import torch
import yaml

import lightning_diffusion as ld
from lightning_diffusion.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
SMALL = (
    "--model.network.channels=8",
    "--model.network.attention_levels=[]",
    "--data.batch_size=32",
    "--trainer.max_steps=3",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_train_batches=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=[PowerFunctionEMA]",
)
OBJECTIVES = {
    "ddpm": ld.DDPM(),
    "edm": ld.EDM(),
    "edm2": ld.EDM2(),
    "improved_ddpm": ld.DDPM(schedule=ld.CosineSchedule()),
    "min_snr_epsilon": ld.DDPM(schedule=ld.CosineSchedule(), weighting=ld.MinSNR(5.0)),
    "min_snr_v": ld.VPrediction(weighting=ld.MinSNR(5.0)),
    "p2": ld.DDPM(weighting=ld.P2()),
    "progressive_distillation": ld.VPrediction(weighting=ld.MaxSNR()),
    "rectified_flow": ld.RectifiedFlow(),
    "v_zero_terminal_snr": ld.VPrediction(ld.ScaledLinearSchedule(zero_terminal_snr=True)),
}


AXIS = torch.linspace(-7, 7, 57, dtype=torch.float64)
CURVES = {
    "edm_stable_target": (0.5, torch.exp(-((AXIS - 2.4) ** 2) / (2 * 2.4**2))),
    "latent_diffusion": (1.0, None),
    "score_matching": (0.5, (AXIS + 2 * math.log(0.5)).sigmoid()),
    "vdm_plus_plus": (1.0, AXIS.sigmoid() * (2 - AXIS).sigmoid()),
}
"""sigma_data, and the effective weight on the residual, up to a factor, by the formula of each paper: Karras et al.'s
log-normal; epsilon errors alike on a geometric range of sigma; sigmoid(2 - log-SNR) on epsilon."""


def test_all_fourteen_recipes_are_there():
    assert {recipe.stem for recipe in RECIPES} == set(OBJECTIVES) | set(CURVES)


def train(recipe):
    arguments = ["--config", str(CONFIGS / "digits.yaml"), "--config", str(recipe)]
    assert main(["fit", *arguments, *SMALL, "--name", recipe.stem]) == 0
    return Path("runs", f"{recipe.stem}-1")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_trains_as_its_first_line_says(recipe, folder):
    first = recipe.read_text().splitlines()[0]
    assert (
        first
        == f"# lightning-diffusion fit --config configs/digits.yaml --config configs/recipes/{recipe.name}"
    )
    run = train(recipe)
    loaded = ld.DiffusionModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert all(p.isfinite().all() for p in loaded.state_dict().values())
    header, *rows = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    losses = [float(row[header.index("val/loss")]) for row in rows if row[header.index("val/loss")]]
    assert losses
    assert all(map(math.isfinite, losses))
    if recipe.stem in OBJECTIVES:
        assert_same_training(loaded.objective, OBJECTIVES[recipe.stem])
    else:
        assert_same_curve(loaded.objective, *CURVES[recipe.stem])


def assert_same_curve(objective, sigma_data, expected):
    assert objective.sigma_data == sigma_data
    weight = objective.effective_weight(AXIS)
    expected = ld.DDPM(ld.ScaledLinearSchedule()).effective_weight(AXIS) if expected is None else expected
    inside = weight > 0
    ratio = (weight / expected)[inside]
    assert inside.sum() > 40
    assert ratio.std() / ratio.mean() < 1e-5


def assert_same_training(objective, expected):
    """No argument of the digits job's own objective has stayed behind."""
    level = expected.schedule(torch.linspace(0.05, 0.95, 7))
    x0, noise = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Identity()
    network.forward = lambda x, c_noise: x * c_noise[:, None].tanh()
    losses = [o.loss_at(network, x0, noise, level).per_sample for o in (objective, expected)]
    assert torch.equal(*losses)
    key = ld.RandomKey(3)
    assert torch.equal(objective.draw(x0, key)[0].sigma, expected.draw(x0, key)[0].sigma)
    assert objective.stable_target is expected.stable_target is None


def test_another_class_starts_from_its_own_defaults(folder):
    """Not from arguments of the same names that the class before had."""
    options = ["--model.objective", "DDPM", "--model.objective.target", "V", "--trainer.max_steps", "1"]
    assert main(["fit", "--config", "tiny.yaml", *options]) == 0
    objective = yaml.safe_load(Path("runs/tiny-1/config.yaml").read_text())["model"]["objective"]["init_args"]
    classes = {name: part["class_path"].split(".")[-1] for name, part in objective.items() if part}
    assert classes == {
        "schedule": "LinearSchedule",
        "target": "V",
        "weighting": "Constant",
        "density": "UniformTime",
    }


def test_the_same_class_keeps_what_a_file_said(folder):
    assert main(["fit", "--config", "tiny.yaml", "--model.objective", "EDM", "--trainer.max_steps", "1"]) == 0
    objective = yaml.safe_load(Path("runs/tiny-1/config.yaml").read_text())["model"]["objective"]["init_args"]
    assert objective["density"]["init_args"]["mean"] == -0.8
