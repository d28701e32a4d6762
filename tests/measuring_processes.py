"""GenerativeMetrics on two processes: the figures of one, and an error of the first process ends both."""

import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_module import fit
from test_generative_metrics import FIGURES, NUMBER, expected, metrics, small

FOUND = "lightning_diffusion.callbacks.generative_metrics.get_ready"


def measure(model: torch.nn.Module) -> dict[str, float]:
    model.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    trainer = fit(
        model, None, 1, callbacks=[metrics()], strategy="ddp", devices=2, limit_val_batches=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    figures = {name: trainer.callback_metrics.get(f"metrics/{name}_pixels_{NUMBER}") for name in FIGURES}
    return {name: value.item() for name, value in figures.items() if value is not None}


def main(_: Path) -> None:
    asked = []

    def broken(*_: object) -> None:
        asked.append(os.environ["RANK"])  # by the first process alone
        raise ValueError("no weights to be had")

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIGHTNING_DIFFUSION_CACHE"] = folder
        torch.manual_seed(0)
        model = small()
        found = measure(model)
        alone = expected(model, "online")
        assert found == pytest.approx({name: alone[name] for name in FIGURES[:-1]}, rel=1e-5), (
            "nothing is held out"
        )
        with mock.patch(FOUND, broken), pytest.raises(Exception, match="no weights to be had"):
            measure(small())
    assert asked == ["0"] * (os.environ["RANK"] == "0")
