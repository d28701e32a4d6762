"""A stopped run leaves a checkpoint from which it goes on unchanged, and a status that tells."""

import os
import signal
import subprocess
import sys
import textwrap

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from processes_of_tests import run
from torch.utils.data import DataLoader

from lightning_diffusion.callbacks import SaveOnSignal

BATCHES, EPOCHS = 6, 3


class Counting(BoringModel):
    """Trains on one image, so that the result depends on the number of steps alone."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(BATCHES, 32))

    def val_dataloader(self):
        return DataLoader(torch.ones(4, 32))


class Signal(Callback):
    """Sends `number` to this process the second time that `hook` is called, after training has begun."""

    def __init__(self, hook, number):
        self.number, self.calls = number, 0
        setattr(self, hook, self.send)

    def send(self, trainer, *_):
        self.calls += not trainer.sanity_checking
        if self.calls == 2:
            os.kill(os.getpid(), self.number)


def fit(folder, *callbacks, resume=None, module=None, **options):
    torch.manual_seed(0)
    module = module or Counting()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, ckpt_path=resume)
    return module, trainer


HOOKS = ["on_train_batch_start", "on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, hook, number, status):
    stopping = SaveOnSignal(tmp_path / "checkpoints")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, Signal(hook, number), stopping, val_check_interval=3)
    assert stop.value.code == status
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    straight, whole = fit(tmp_path, val_check_interval=3)
    resumed, rest = fit(tmp_path, resume=stopping.path, val_check_interval=3)
    assert rest.global_step == whole.global_step == BATCHES * EPOCHS
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


def test_what_other_callbacks_do_at_the_end_of_the_batch_is_saved_too(tmp_path):
    class Late(Callback):
        batches = 0

        def on_train_batch_end(self, *_):
            self.batches += 1

        def state_dict(self):
            return {"batches": self.batches}

    stopping = SaveOnSignal()
    with pytest.raises(SystemExit):
        fit(tmp_path, stopping, Signal("on_train_batch_start", signal.SIGTERM), Late())
    saved = torch.load(stopping.path, weights_only=True)
    assert {"batches": 2} in saved["callbacks"].values()
    assert saved["global_step"] == 2


def test_the_checkpoint_lies_beside_those_of_model_checkpoint(tmp_path):
    stopping = SaveOnSignal()
    with pytest.raises(SystemExit):
        fit(tmp_path, stopping, Signal("on_train_batch_start", signal.SIGTERM), enable_checkpointing=True)
    assert stopping.path == tmp_path / "checkpoints" / "last.ckpt"
    assert [path.name for path in stopping.path.parent.iterdir()] == ["last.ckpt"]


def test_a_run_that_is_not_stopped_ends_as_always(tmp_path):
    stopping = SaveOnSignal(tmp_path / "none")
    fit(tmp_path, stopping)
    assert stopping.path is None
    assert not (tmp_path / "none").exists()


def test_no_checkpoint_is_written_for_an_error_in_the_middle_of_a_batch(tmp_path):
    class Broken(Callback):
        def on_before_backward(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)
            raise ArithmeticError("broken")

    stopping = SaveOnSignal(tmp_path / "none")
    with pytest.raises(ArithmeticError, match="broken"):
        fit(tmp_path, stopping, Broken())
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "status"), [(["SIGTERM"], 143), (["SIGINT"], 130), (["SIGINT", "SIGINT"], 130)]
)
def test_the_process_ends_with_the_status_of_its_signal(tmp_path, signals, status):
    script = f"""
    import os, signal, sys, time
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    from test_save_on_signal import Callback, SaveOnSignal, fit
    class Stop(Callback):
        def on_train_batch_start(self, *_):
            for name in {signals!r}:
                os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.01)
    fit({str(tmp_path)!r}, Stop(), SaveOnSignal({str(tmp_path)!r}))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert "Finishing the batch" in ended.stderr
    assert (tmp_path / "last.ckpt").exists() == (len(signals) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_the_workers_too_changes_nothing(tmp_path, hook, name, status):
    """Terminals signal the whole group, schedulers every process of a job."""
    script = f"""
    import os, signal, sys, time
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    from test_save_on_signal import Callback, Counting, DataLoader, SaveOnSignal, fit, torch
    class Loading(Counting):
        def train_dataloader(self):
            return DataLoader(torch.ones(6, 32), num_workers=2)
        def val_dataloader(self):
            return DataLoader(torch.ones(4, 32), num_workers=2)
    class ToAll(Callback):
        def {hook}(self, trainer, *_):
            if trainer.global_step >= 2:
                os.killpg(os.getpgrp(), signal.{name})
                time.sleep(1)
    fit({str(tmp_path)!r}, ToAll(), SaveOnSignal({str(tmp_path)!r}), module=Loading(), val_check_interval=3)
    """
    line = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(
        line, capture_output=True, text=True, check=False, start_new_session=True, timeout=120
    )
    assert ended.returncode == status, ended.stderr
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_all_processes_stop_at_the_same_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_save_on_signal import Callback, SaveOnSignal, fit
        class OneOfTwo(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_rank == 1 and batch_idx == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
        folder = {str(tmp_path)!r}
        fit(folder, SaveOnSignal(folder), OneOfTwo(), devices=2, strategy="ddp", use_distributed_sampler=False)
        """)
    )
    assert run([sys.executable, script]).returncode == 143
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
