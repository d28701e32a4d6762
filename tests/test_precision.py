"""What runs in which type under the precision plugins, and that modules are left as they were found."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from commands import CONFIG
from foreign import QUIET, Classifier, points
from foreign import fit as fit_foreign
from precision_recorder import Recorder
from small_module import fit, module
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.cli import main
from lightning_diffusion.datamodules import DigitsDataModule

LOW = ["bf16-mixed", "bf16-true"]
F32, BF16 = {torch.float32}, {torch.bfloat16}


def unet():
    torch.manual_seed(0)
    return ld.UNet((1, 8, 8), channels=16, num_blocks=1, attention_levels=(1,), num_classes=10)


class Recorded(ld.DiffusionModule):
    """Records its third training step, backward too, and what the objective is given."""

    def training_step(self, batch, batch_idx):
        self.batch = batch["image"].dtype
        if batch_idx != 2:
            return super().training_step(batch, batch_idx)
        self.recorder = Recorder(self)
        with self.recorder:
            loss = super().training_step(batch, batch_idx)
        self.states = {s.dtype for o in self.optimizers().state.values() for s in o.values() if s.ndim}
        self.kinds = {name: p.dtype for name, p in self.network.named_parameters()}
        return loss


@pytest.fixture(scope="module", params=LOW)
def recorded(request):
    model = Recorded(network=unet(), representation=ld.Standardize())
    fit(model, steps=3, plugins=[ld.DiffusionPrecision(request.param)])
    model.low = request.param
    return model


def test_products_and_activations_run_in_low_precision(recorded):
    assert recorded.recorder.of("convolution") == BF16
    assert recorded.recorder.of("addmm", "modulation") == BF16
    assert recorded.recorder.of("silu", "down") == BF16


def test_what_must_be_float32_is(recorded):
    of = recorded.recorder.of
    assert of("native_group_norm") == F32
    assert of("cos", "noise") == of("sin", "noise") == F32
    assert of("addmm", "embedding") == of("silu", "embedding") == F32
    assert of("softmax") == F32
    assert of("bmm", "attention") == F32  # logits, inside of torch's kernel


def test_outside_of_the_network_nothing_is_low(recorded):
    outside = {op: types for (name, op), types in recorded.recorder.types.items() if not name}
    assert {"randn", "pow", "mean", "rsqrt", "log"} <= outside.keys()
    assert all(torch.bfloat16 not in types for op, types in outside.items() if op != "_to_copy")
    assert recorded.batch is recorded.report.level.sigma.dtype is torch.float32
    assert recorded.report.per_sample.dtype is recorded.report.loss.dtype is torch.float32


def test_parameters_and_optimizer_are_float32_unless_the_precision_is_true(recorded):
    kept = {"embedding", "norm", "norm1", "norm2"}
    expected = torch.float32 if recorded.low == "bf16-mixed" else torch.bfloat16
    for name, dtype in recorded.kinds.items():
        assert dtype is (torch.float32 if kept & set(name.split(".")) else expected), name
    assert recorded.states == (
        {torch.float32} if recorded.low == "bf16-mixed" else {torch.float32, torch.bfloat16}
    )


def test_everything_is_as_before_when_it_is_over(recorded):
    assert {p.dtype for p in recorded.parameters()} | {b.dtype for b in recorded.network.buffers()} == F32
    assert not [part for part in recorded.modules() if "forward" in part.__dict__]
    assert recorded.sample(2, sampler=ld.Euler(2)).dtype is torch.float32


class Sampling(L.Callback):
    """Draws with guidance in the midst of training, as SampleGrid does."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.inside = Recorder(pl_module)
        guidance, labels = ld.ClassifierFree(2.0), {"label": torch.arange(4)}
        with self.inside:
            self.drawn = pl_module.sample(4, labels, sampler=ld.Heun(2), guidance=guidance)


@pytest.mark.parametrize("precision", LOW)
def test_guidance_and_sampler_state_are_float32_while_the_network_is_not(precision):
    sampling = Sampling()
    fit(module(), steps=1, plugins=[ld.DiffusionPrecision(precision)], callbacks=[sampling])
    assert sampling.inside.of("convolution") == BF16
    outside = {op: types for (name, op), types in sampling.inside.types.items() if not name}
    assert {"sub", "mul", "div"} <= outside.keys()
    assert all(torch.bfloat16 not in types for types in outside.values())
    assert sampling.drawn.dtype is torch.float32


class Watched(Classifier):
    """Of another project: no doors, batch norm, a loss module."""

    def __init__(self):
        super().__init__()
        self.distance, self.seen_types = nn.MSELoss(), {}
        for name in ("body", "body.0", "body.1", "head", "distance"):
            self.get_submodule(name).register_forward_hook(
                lambda part, given, out, name=name: self.seen_types.update(
                    {name: (given[0].dtype, out.dtype)}
                )
            )

    def training_step(self, batch, batch_idx):
        out = self.body(batch[0])
        self.kinds = {name: p.dtype for name, p in self.named_parameters()}
        return super().training_step(batch, batch_idx) + self.distance(self.head(out), torch.zeros(4, 2))


@pytest.mark.parametrize("precision", LOW)
def test_modules_of_other_projects_run_in_low_precision_as_a_whole(precision):
    model = Watched()
    fit_foreign(
        model, plugins=[ld.DiffusionPrecision(precision, fp32_modules=["head"])], val_check_interval=4
    )
    assert model.seen_types["body.0"] == (torch.float32, torch.bfloat16)
    assert model.seen_types["body.1"] == (torch.bfloat16, torch.bfloat16)
    assert model.seen_types["head"] == (torch.bfloat16, torch.float32)
    assert model.seen_types["distance"][1] is torch.float32
    assert model.kinds["head.weight"] is model.kinds["body.1.weight"] is torch.float32
    assert model.kinds["body.0.weight"] is (torch.float32 if precision == "bf16-mixed" else torch.bfloat16)
    assert model.body[1].running_mean.dtype is torch.float32


def test_an_exception_leaves_nothing_behind():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    model = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        fit_foreign(model, plugins=[ld.DiffusionPrecision("bf16-true")])
    assert {p.dtype for p in model.parameters()} == F32
    assert not [part for part in model.modules() if "forward" in part.__dict__]


WRONG = {
    "pattern": (
        lambda: fit(module(), plugins=[ld.DiffusionPrecision(fp32_modules=["network.haed"])]),
        r"fp32_modules: no module is called 'network.haed'; the nearest are .*'network.head'",
    ),
    "precision": (
        lambda: ld.DiffusionPrecision("16-true"),
        "precision='16-true'; expected one of bf16-mixed",
    ),
    "scaling": (lambda: ld.DiffusionPrecision("bf16-true", loss_scaling=ld.LossScaling()), "scales nothing"),
    "beside precision": (
        lambda: L.Trainer(**QUIET, precision="bf16-mixed", plugins=[ld.DiffusionPrecision()]),
        r"both `precision=bf16-mixed` and `plugins=DiffusionPrecision\('bf16-mixed'\)`. Choose one",
    ),
    "trained outside of shards": (
        lambda: ld.DiffusionFSDPPrecision().shard_(module(objective=ld.EDM2()), None),
        r"'objective.weighting\..* are trained but not within what is sharded.*low_precision_modules",
    ),
    "not sharded": (
        lambda: fit(module(), plugins=[ld.DiffusionFSDPPrecision()]),
        "is for ModelParallelStrategy, found SingleDeviceStrategy. Use DiffusionPrecision",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case):
    make, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        make()


def test_true_bfloat16_resumes_exactly(tmp_path):
    def trained(steps, **options):
        model = module()
        trainer = fit(
            model,
            DigitsDataModule(batch_size=16),
            steps,
            plugins=[ld.DiffusionPrecision("bf16-true")],
            **options,
        )
        return model, trainer

    straight, _ = trained(4)
    _, half = trained(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    model = module()
    trainer = L.Trainer(
        **QUIET, max_steps=4, enable_checkpointing=False, plugins=[ld.DiffusionPrecision("bf16-true")]
    )
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=16), ckpt_path=tmp_path / "half.ckpt")
    for name, p in model.named_parameters():
        assert torch.equal(p, straight.get_parameter(name)), name


def test_evaluation_alone_runs_in_it_too():
    model = Watched()
    trainer = L.Trainer(**QUIET, plugins=[ld.DiffusionPrecision("bf16-true", fp32_modules=["head"])])
    trainer.validate(model, points(8), verbose=False)
    assert model.seen_types["body.0"][1] is torch.bfloat16
    assert {p.dtype for p in model.parameters()} == F32


NAMED = """\
  plugins:
    - class_path: DiffusionPrecision
      init_args: {precision: 16-mixed, fp32_modules: [network.head], loss_scaling: {start: 1024.0, floor: 1.0}}
"""


def test_a_configuration_names_it(folder):
    (folder / "half.yaml").write_text(CONFIG + NAMED)
    assert main(["fit", "--config", "half.yaml", "--trainer.max_steps", "2"]) == 0
    written = (folder / "runs" / "half-1" / "config.yaml").read_text()
    assert "class_path: lightning_diffusion.DiffusionPrecision" in written
    saved = torch.load(next((folder / "runs" / "half-1").rglob("*.ckpt")), weights_only=True)
    assert saved["DiffusionPrecision"]["scale"] == 1024


def test_beside_precision_it_is_one_line(folder, capsys):
    (folder / "half.yaml").write_text(CONFIG + NAMED + "  precision: bf16-mixed\n")
    assert main(["fit", "--config", "half.yaml"]) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Received both `precision=bf16-mixed` and `plugins=DiffusionPrecision('16-mixed')`" in error
