"""The doctor examines where the Trainer would train: on tensors of a GPU without data, nothing meets the CPU."""

import lightning as L
import pytest
import torch
from foreign import QUIET
from small_module import module, network
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lightning_diffusion as ld
from lightning_diffusion.analysis import level_profile as profiles
from lightning_diffusion.analysis.doctor import examine
from lightning_diffusion.analysis.drawn_data import DrawnData
from lightning_diffusion.analysis.examinations import conditioning
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.resume import RandomKey

LEVEL = torch.tensor(0.5, dtype=torch.float64)
OBJECTIVES = [ld.EDM(), ld.DDPM(), ld.VPrediction(), ld.RectifiedFlow(), ld.EDM2()]


GPU = torch.device("cuda", 0)


def move_(model, device):
    """Its tensors are on a device, without their values."""
    for part in model.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device))
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device=device)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_level_is_measured_where_the_module_is(objective, monkeypatch):
    """On fake tensors, which a GPU need not have, and whose operators refuse to mix devices."""
    model = module(objective=objective, representation=ld.Standardize([0.0], [0.5], objective.sigma_data))
    backward = lambda loss, parameters, **_: [torch.zeros_like(p) for p in parameters]  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", backward)  # its engine needs a GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_(model, GPU)
        data = DrawnData(torch.empty(8, 1, 8, 8), {"label": torch.empty(8, dtype=torch.int64)}).to(GPU)
        assert profiles._moments(model, data, 4, LEVEL, RandomKey()).device == GPU
        assert profiles.gradient_norm(model, data.first(4), LEVEL, RandomKey()).device == GPU


@pytest.mark.parametrize("accelerator", [None, "auto", "gpu", "cuda"])
def test_the_device_is_the_trainers_as_far_as_there_is_one(accelerator, monkeypatch):
    settings = TrainerSettings({"accelerator": accelerator})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings.device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings.device == torch.device("cuda")
    assert TrainerSettings({"accelerator": "cpu"}).device == torch.device("cpu")


def test_a_trainer_made_in_python_says_its_accelerator(monkeypatch):
    settings = TrainerSettings.of(L.Trainer(**QUIET))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings.device == torch.device("cpu")


def test_what_does_not_fit_into_the_device_is_examined_on_the_cpu(monkeypatch):
    asked, measured = [], conditioning._measured

    def small(patient, device):
        asked.append(device)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(patient, device)

    monkeypatch.setattr(conditioning, "_measured", small)
    monkeypatch.setattr(TrainerSettings, "device", torch.device("cuda"))
    one = Patient(module(network=network()), DigitsDataModule(batch_size=8), TrainerSettings(), steps=2)
    report = examine(one, ["conditioning"])
    assert asked == [torch.device("cuda"), torch.device("cpu")]
    assert not report.findings


def test_the_report_has_the_parameters_gradient_norm_of_each_level():
    """Two routes: the table's, and backward of the loss at that level."""
    one = Patient(module(network=network()), DigitsDataModule(batch_size=8), TrainerSettings(), steps=2)
    table = examine(one, ["conditioning"]).sections[-1].tables[1]
    assert table.header[-1] == "parameters' gradient norm"
    assert len(table.rows) == 8
    data, key, model = one.drawn.first(8), RandomKey(0, batch=14), one.prepared()
    noise = torch.randn(16, 1, 8, 8, generator=key.generator("examined noise"))[:8]
    log_snr = model.objective.density.quantile(torch.tensor([0.001]).double(), model.objective.schedule)
    level = model.objective.schedule.at(log_snr).to(data.x0).expand(8)
    model.objective.loss_at(model.network, data.x0, noise, level, data.condition).loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.network.parameters() if p.grad is not None]).norm()
    assert float(table.rows[-1][-1]) == pytest.approx(norm.item(), rel=5e-3)
