"""The audit finds what is planted where it is planted, mends it, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import lightning as L
import pytest
import torch
import yaml
from foreign import QUIET
from planted_violations import PLANTED, SAFE, batches, bf16_mixed
from small_module import fit
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from violations_by_others import OTHERS

import lightning_diffusion as ld
from lightning_diffusion.analysis.doctor import examine
from lightning_diffusion.analysis.number_formats import hardware_of, recommended_precision
from lightning_diffusion.analysis.operator_recorder import Recorder
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.precision_examination import examine_precision
from lightning_diffusion.analysis.precision_report import OperatorRecord, PrecisionReport
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.callbacks import PrecisionAudit
from lightning_diffusion.datamodules import DigitsDataModule


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def trained(module, precision, steps=2, **trainer) -> PrecisionReport:
    """The report of a short training."""
    audit = PrecisionAudit(steps, write=False)
    given = {"precision": precision} if isinstance(precision, str) else {"plugins": [precision]}
    options = {
        **QUIET,
        **given,
        "max_steps": steps,
        "enable_checkpointing": False,
        "callbacks": [audit],
        **trainer,
    }
    L.Trainer(**options).fit(module, DataLoader(batches(steps), batch_size=None))
    return audit.report


def made(planted):
    torch.manual_seed(0)
    return planted.host(planted.net())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("planted", [*PLANTED, *OTHERS], ids=lambda p: p.check)
def test_finds_what_is_planted_where_it_is(planted):
    report = trained(made(planted), planted.precision(), **planted.trainer)
    found = [v for v in report.verdicts if v.check == planted.check]
    assert found, report.findings
    assert planted.module is None or planted.module in {v.module for v in found}
    assert all(v.format in ("bfloat16", "float16") for v in found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAFE)
def test_finds_nothing_where_nothing_is_wrong(name):
    safe = SAFE[name]
    assert trained(made(safe), safe.precision(), **safe.trainer).findings == ()


def digits_module(**network):
    torch.manual_seed(0)
    options = {
        "channels": 8,
        "num_blocks": 1,
        "multipliers": (1, 2),
        "attention_levels": (1,),
        "num_classes": 10,
    }
    return ld.DiffusionModule(ld.UNet((1, 8, 8), **{**options, **network}), representation=ld.Standardize())


class TwoBatches(DigitsDataModule):
    """Digits, of which little is needed."""

    def __init__(self):
        super().__init__(batch_size=8)


def unet():
    return ld.UNet((1, 8, 8), 8, (1, 2), 1, (1,), num_classes=10)


def dit(options=ld.DiTOptions()):
    return ld.DiT((1, 8, 8), 2, ld.DiTSize(32, 2, 2), 10, options)


def magnitude_preserving():
    return ld.MagnitudePreservingUNet((1, 8, 8), 8, (1, 2), 1, (1,), num_classes=10, head_channels=16)


def original_dit():
    return dit(ld.DiTOptions.original())


SLOW = [(dit, "16-mixed"), (original_dit, "bf16-mixed"), (original_dit, "16-mixed")]
SLOW += [(magnitude_preserving, "bf16-mixed"), (magnitude_preserving, "16-mixed")]
SHIPPED = [(unet, "bf16-mixed"), (unet, "16-mixed"), (dit, "bf16-mixed")]
SHIPPED += [pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("network", "precision"), SHIPPED)
def test_finds_nothing_in_the_shipped_networks(network, precision):
    torch.manual_seed(0)
    module = ld.DiffusionModule(network(), ld.EDM(stable_target=ld.StableTarget()), ld.Standardize())
    report = examine_precision(module, TwoBatches(), ld.DiffusionPrecision(precision), steps=2)
    assert report.findings == ()
    low = {name for r in report.records if r.module.startswith("network.") for name in r.outputs}
    assert {"bf16-mixed": "bfloat16", "16-mixed": "float16"}[precision] in low
    assert {r.phase for r in report.records} >= {"forward", "backward", "sampling"}


def repaired():
    """Planted in a module, with the names that the audit says are to be named."""
    checks = {"softmax", "attention-scores", "gate", "decoder"}  # the others cast by hand
    return [p for p in PLANTED if p.check in checks and p.precision is bf16_mixed]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("planted", repaired(), ids=lambda p: p.check)
def test_what_it_says_to_write_mends_it(planted):
    remedies = [f.remedy for f in trained(made(planted), planted.precision()).findings]
    plugins = [yaml.safe_load(remedy)["trainer.plugins"][0]["init_args"] for remedy in remedies]
    names = [name for arguments in plugins for name in arguments["fp32_modules"]]
    again = trained(made(planted), ld.DiffusionPrecision("bf16-mixed", names))
    assert again.findings == ()


@pytest.mark.filterwarnings("ignore")
def test_watching_changes_nothing():
    def weights(callbacks):
        module = digits_module(multipliers=(1,), attention_levels=())
        fit(module, TwoBatches(), steps=2, plugins=[ld.DiffusionPrecision("bf16-mixed")], callbacks=callbacks)
        return [p.detach() for p in module.parameters()]

    plain, watched = weights([]), weights([PrecisionAudit(2, write=False)])
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


class Known(nn.Module):
    """Two products of known magnitude: 3 times a matrix of ones over 8, forward; its transpose, backward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        nn.init.constant_(self.first.weight, 3.0)
        nn.init.constant_(self.second.weight, 0.5)

    def forward(self, x):
        return self.second(self.first(x))


def test_magnitudes_belong_to_the_module_that_made_them_forward_and_backward():
    net = nn.ModuleDict({"net": Known()})
    recorder = Recorder(net)
    with recorder:
        net["net"](torch.ones(2, 8)).sum().backward()
    found = {
        (o.module, o.phase): m for o, m in recorder.operations.items() if o.operator == "mm" and m.largest
    }
    assert found["net.first", "forward"].largest == 24  # 8 x 1 x 3
    assert found["net.second", "forward"].largest == 96  # 8 x 24 x 0.5
    assert found["net.second", "backward"].largest == 48  # weight: 2 samples x 24
    assert found["net.first", "backward"].largest == 8  # weight: 2 samples x 8 x 0.5
    assert found["net.second", "backward"].calls == 2
    assert found["net.first", "forward"].root_mean_square == 24


def test_counts_what_a_cast_flushes_and_what_is_subnormal():
    values = torch.tensor([0.0, 1e-9, 2e-8, 1e-6, 1.0, 65504.0])
    recorder = Recorder(nn.Identity())
    with recorder:
        values.half()
    (m,) = recorder.operations.values()
    assert (m.nonzero, m.flushed, m.subnormal) == (5, 2, 1)  # half of 2^-24 is 3e-8
    assert m.relative == 1.0
    assert m.overflows == 0


def test_a_forward_that_is_computed_again_in_backward_is_forward():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    recorder = Recorder(net)
    with recorder:
        checkpoint(net[1], net[0](torch.ones(2, 4)), use_reentrant=False).sum().backward()
    found = {(o.module, o.phase.value, o.operator): m.calls for o, m in recorder.operations.items()}
    assert found["1", "forward", "tanh"] == 2
    assert found["1", "backward", "tanh_backward"] == 1


@pytest.mark.filterwarnings("ignore")
def test_writes_its_findings_and_warns(tmp_path, recwarn):
    planted = PLANTED[0]
    audit = PrecisionAudit(1)
    module, options = made(planted), {**QUIET, "max_steps": 1, "default_root_dir": tmp_path}
    trainer = L.Trainer(
        **options, enable_checkpointing=False, plugins=[planted.precision()], callbacks=[audit]
    )
    with pytest.warns(
        UserWarning, match=r"Softmax in bfloat16.*net\.1 \(_softmax\).*fp32_modules: \[net\.1\]"
    ):
        trainer.fit(module, DataLoader(batches(1), batch_size=None))
    said = json.loads((tmp_path / "precision_audit.json").read_text())
    assert said["steps"] == 1
    assert {v["module"] for v in said["verdicts"] if v["rule"] == "softmax"} == {"net.1"}
    assert len(said["records"]) == len(audit.report.records)
    assert (tmp_path / "precision_audit.png").stat().st_size > 10_000


def test_patterns_stand_for_all_modules_of_a_name():
    record = OperatorRecord("", "forward", "add", (), (), 1, 1.0, 1.0, 0.0, 0.0, 0, 0)
    modules = ("a.norm", "b.norm", "a.attention", "b.attention", "c.attention")
    report = PrecisionReport("bf16-mixed", "cpu", 1, tuple(replace(record, module=m) for m in modules), ())
    assert report.patterns(["b.norm", "a.norm", "a.attention", "b.attention", ""]) == [
        "a.attention",
        "b.attention",
        "*.norm",
    ]


def test_no_steps_are_refused():
    with pytest.raises(
        ValueError, match=r"Found steps=0; expected at least 1\. To audit nothing, leave Prec"
    ):
        PrecisionAudit(0)


def test_doctor_says_what_should_be_float32_and_which_precision_to_use():
    module = digits_module(channels=4)
    module.network.head = nn.Sequential(nn.Softmax(1), module.network.head)
    trainer = TrainerSettings({"precision": "bf16-mixed", "accelerator": "cpu"})
    state = {name: x.clone() for name, x in module.network.state_dict().items()}
    report = examine(Patient(module, TwoBatches(), trainer, steps=2), ["precision"])
    found = {finding.check: finding for _, finding in report.findings}
    assert "fp32_modules: [network.head.0]" in found["softmax"].remedy
    assert all(torch.equal(x, module.network.state_dict()[name]) for name, x in state.items())
    (section,) = report.sections
    assert dict(section.tables[0].rows)["recommended"].startswith(
        recommended_precision(hardware_of("cpu")).precision
    )
    assert section.pictures[0].png()[:4] == b"\x89PNG"
