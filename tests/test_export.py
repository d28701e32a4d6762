"""What is exported is the same model elsewhere; and what it is fine-tuned from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported_modules import LABEL, NOISE, TORCH, dit, drawn, module, spread, unet
from small_module import fit
from small_module import module as digits
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA
from lightning_diffusion.cli import main


@pytest.fixture(scope="module")
def averaged():
    """A trained module with averages that differ from its weights."""
    model = digits(network=ld.UNet((1, 8, 8), 8, (1,), 1, (), num_classes=10))
    fit(model, steps=4, callbacks=[EMA(0.5)])
    return model


def test_a_file_holds_one_choice_of_weights_and_how_to_build_the_rest(averaged, tmp_path):
    for weights in ("online", "ema"):
        ld.export_safetensors(averaged, tmp_path / f"{weights}.safetensors", weights)
        loaded = ld.load_module(tmp_path / f"{weights}.safetensors")
        label = {"label": torch.arange(4)}
        assert torch.equal(loaded.sample(4, label), averaged.sample(4, label, weights=weights))
        assert not loaded.averages
        as_weights = averaged.sample(4, label, weights=str(tmp_path / f"{weights}.safetensors"))
        assert torch.equal(as_weights, loaded.sample(4, label))


def test_files_that_are_no_exports_are_named(averaged, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds weights and no configuration"):
        ld.load_module(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist: give a run folder"):
        ld.load_module(tmp_path / "b.safetensors")


def test_the_command_exports_and_others_take_it(trained, folder, capsys):
    run = str(trained)
    assert main(["export", "--checkpoint", run, "--to", "safetensors", "--out", "m.safetensors"]) == 0
    assert "m.safetensors: safetensors, ema weights" in capsys.readouterr().out
    for place, out in ((run, "a.npz"), ("m.safetensors", "b.npz")):
        assert main(["sample", "--checkpoint", place, "--num", "4", "--out", out]) == 0
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    guided = ["--guidance", "3", "--guide", "m.safetensors", "--guidance-interval", "0.1,5"]
    assert main(["sample", "--checkpoint", run, "--num", "4", "--out", "c.npz", *guided]) == 0
    assert_close(read("c.npz"), read("a.npz"), rtol=0, atol=1e-4)  # guided by itself
    guided += ["--guide-weights", "online"]
    assert main(["sample", "--checkpoint", run, "--num", "4", "--out", "d.npz", "--steps", "9", *guided]) == 0


def read(path):
    import numpy as np

    return torch.tensor(np.load(path)["images"])


REFUSED = [
    (["sample", "--out", "x.npz", "--guide", "m"], "--guide needs a scale beside it: give --guidance SCALE"),
    (["sample", "--out", "x.npz", "--guidance", "2", "--guide", "m"], "--guide m does not exist"),
    (["sample", "--out", "x.npz", "--guidance", "2", "--guide-weights", "ema"], "without --guide"),
    (
        ["sample", "--out", "x.npz", "--guidance", "2", "--guidance-interval", "3"],
        "expected LOW,HIGH such as",
    ),
    (["evaluate", "--guidance-rescale", "0.7"], "--guidance-rescale needs a scale"),
    (["export", "--to", "onnx", "--out", "x"], "--to"),
    (["export", "--to", "torch-export", "--out", "x.safetensors"], "expected a name that ends in .pt2"),
    (["export", "--to", "diffusers", "--out", "x", "--sampler", "euler"], "diffusers has no UNet"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_what_cannot_be_is_said_in_one_line(trained, folder, capsys, arguments, said):
    assert main([arguments[0], "--checkpoint", str(trained), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_training_goes_on_from_an_export(averaged, tmp_path):
    """Averages of its own; a fresh process needs no path."""
    ld.export_safetensors(averaged, tmp_path / "m.safetensors")
    network = ld.load_network(str(tmp_path / "m.safetensors"))
    tuned = digits(network=network)
    assert torch.equal(network.head.weight, averaged.averages["ema"]["network.head.weight"])
    trainer = fit(tuned, steps=3, callbacks=[EMA(0.9)], precision="bf16-mixed")
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    (tmp_path / "m.safetensors").unlink()
    again = ld.load_module(tmp_path / "tuned.ckpt")
    assert again.averages.keys() == {"ema"}
    assert torch.equal(again.network.head.weight, tuned.network.head.weight)


def test_the_command_line_fine_tunes(trained, folder):
    quick = ["--config", "tiny.yaml", "--trainer.max_steps", "1", "--trainer.val_check_interval", "null"]
    start = ["--model.network", "lightning_diffusion.load_network", "--model.network.path", str(trained)]
    assert main(["fit", *quick, "--trainer.limit_val_batches", "0", "--optimizer.lr", "0", *start]) == 2
    quick += ["--trainer.limit_val_batches", "0", "--model.optimizer.lr", "0", "--name", "tuned"]
    assert main(["fit", *quick, *start]) == 0
    tuned, before = (ld.load_module(run) for run in ("runs/tuned-1", trained))
    for name, value in tuned.averaged_parameters().items():
        assert torch.equal(value, before.averages[next(iter(before.averages))][name])


@pytest.mark.slow
def test_a_program_runs_with_torch_alone_in_a_fresh_process(tmp_path):
    model = module(dit(), ld.DDPM(ld.CosineSchedule(), ld.V()), sampler=ld.Euler(6),
                   representation=ld.Standardize([0.1] * 3, [0.4] * 3, 1.0))  # fmt: skip
    ld.export_program(model, tmp_path / "it.pt2")
    torch.save((NOISE, LABEL), tmp_path / "given.pt")
    script = f"""{TORCH}
import sys
noise, label = torch.load(r"{tmp_path}/given.pt")
x = draw(r"{tmp_path}/it.pt2", noise, label)
images = torch.export.load(r"{tmp_path}/it-decode.pt2").module()(x)
torch.save((x, images), r"{tmp_path}/drawn.pt")
print(any(name.startswith(("lightning", "diffusers")) for name in sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout.split() == ["False"], ended.stderr
    x, images = torch.load(tmp_path / "drawn.pt")
    ours = drawn(model, ld.Euler(6))
    assert_close(x, ours, rtol=0, atol=1e-5)
    assert_close(images, model.representation.decode(ours).clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_programs_take_any_batch_and_a_context(tmp_path):
    network = spread(ld.UNet((2, 8, 8), 8, num_blocks=1, num_classes=3, context_dim=6))
    model = module(network, representation=ld.Identity(False))
    ld.export_program(model, tmp_path / "it.pt2")
    program = torch.export.load(tmp_path / "it.pt2").module()
    for batch, tokens in ((3, 1), (5, 7)):
        x, sigma, context = (
            torch.randn(batch, 2, 8, 8),
            torch.rand(batch) + 0.1,
            torch.randn(batch, tokens, 6),
        )
        label = torch.arange(batch) % 4
        level = ld.EDMSchedule().at(-2 * sigma.log())
        ours = model.denoiser({"label": label, "context": context})(x, level)
        assert_close(program(x, *level, label, context), ours, rtol=1e-5, atol=1e-5)


def test_the_folder_says_what_stays_behind(tmp_path):
    pytest.importorskip("diffusers")
    model = module(unet(), representation=ld.Standardize([0.1, 0.2, 0.3], [0.4] * 3))
    ld.export_diffusers(model, tmp_path / "it", sampler=ld.Euler(3))
    said = json.loads((tmp_path / "it" / "lightning_diffusion.json").read_text())
    assert said["representation"]["class_path"] == "lightning_diffusion.Standardize"
    assert_close(said["representation"]["numbers"]["mean"], [0.1, 0.2, 0.3], rtol=0, atol=1e-6)
    tuned = ld.load_network(str(tmp_path / "it"))
    assert isinstance(tuned, ld.DiffusersUNet)
    assert torch.equal(tuned.model.conv_in.weight, model.network.model.conv_in.weight)


def test_low_rank_adaptation_trains_few_parameters_and_merges(tmp_path):
    """As docs/export.md has it."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import LoraModel

    network = dit(10, ld.DiTOptions())
    small = ld.DiT((1, 8, 8), 2, ld.DiTSize(16, 2, 2), 10)
    before = {name: x.clone() for name, x in small.state_dict().items()}
    tuner = LoraModel(small, peft.LoraConfig(r=2, target_modules=["qkv", "proj"]), "default")
    model = digits(network=small)
    fit(model, steps=3, callbacks=[EMA(0.5)])
    assert all("lora_" in name for name in model.averaged_parameters())
    assert sum(p.numel() for p in model.averaged_parameters().values()) < 0.2 * sum(
        map(torch.numel, before.values())
    )
    label = {"label": torch.arange(4)}
    adapted = model.sample(4, label, weights="ema")
    model.load_state_dict({**model.state_dict(), **model.averages["ema"]})
    model.network = tuner.merge_and_unload()
    assert model.network.state_dict().keys() == before.keys() == network.state_dict().keys()
    assert_close(model.sample(4, label), adapted, rtol=0, atol=1e-4)
    model.averages.clear()
    ld.export_safetensors(model, tmp_path / "merged.safetensors")
    assert torch.equal(
        ld.load_module(tmp_path / "merged.safetensors").sample(4, label), model.sample(4, label)
    )
