"""A reader of a file sees the old one or the new one, whole; never anything between."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_diffusion.io import (
    AtomicCheckpointIO,
    checkpoint_of,
    keep_earlier,
    load_checkpoint,
    new_run_folder,
    refuse_other_weights,
    run_folder_of,
    write_atomically,
)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_is_whole_and_alone(tmp_path):
    write_atomically(tmp_path / "new" / "a.bin", lambda file: file.write(b"abc"))
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    assert files_in(tmp_path / "new") == ["a.bin"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.bin", fail)
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert files_in(tmp_path) == ["a.bin"]


def test_a_process_killed_while_writing_leaves_the_old_file_and_its_rest_is_swept(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    script = f"""
    import os, signal
    from lightning_diffusion.io import write_atomically
    def die(file):
        file.write(b"half"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
    write_atomically({str(tmp_path / "a.bin")!r}, die)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert len(files_in(tmp_path)) == 2
    write_atomically(tmp_path / "b.bin", lambda file: file.write(b"new"))
    assert files_in(tmp_path) == ["a.bin", "b.bin"]


def test_files_of_living_processes_and_of_other_machines_are_not_swept(tmp_path):
    import platform

    mine = f".x.ckpt.{platform.node()}.{os.getppid()}.tmp"
    for name in (mine, ".x.ckpt.elsewhere.999999999.tmp"):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b""))
    assert len(files_in(tmp_path)) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")


def test_a_target_that_cannot_be_replaced_is_an_error(tmp_path):
    (tmp_path / "a.ckpt" / "full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert files_in(tmp_path) == ["a.ckpt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_named_and_the_checkpoint_before_is_whole(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)
    with monkeypatch.context() as patch:
        full = lambda name, mode="r": open("/dev/full" if mode == "wb" else name, mode)  # noqa: E731, SIM115
        patch.setattr("lightning_diffusion.io.open", full, raising=False)
        with pytest.raises(
            OSError, match=r"disk is full .*free some space and resume.*is whole: .*last\.ckpt"
        ):
            writer.save_checkpoint({"weight": torch.zeros(100_000)}, path)
    assert load_checkpoint(path) == {"step": 1}


def test_a_trainer_saves_and_loads_through_it(tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu", plugins=[AtomicCheckpointIO()], logger=False, enable_checkpointing=False
    )
    module = BoringModel()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert torch.equal(
        load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["layer.weight"], module.layer.weight
    )
    assert files_in(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1], ids=str)
def test_a_truncated_checkpoint_is_named(tmp_path, kept):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    for load in (load_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=r"a\.ckpt \(\d+ bytes\) is truncated or no checkpoint"):
            load(path)


def test_a_checkpoint_that_could_run_code_is_refused(tmp_path):
    torch.save({"path": tmp_path, "number": np.float64(1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt holds \S*(pathlib|numpy)\S*: only tensors"):
        load_checkpoint(tmp_path / "a.ckpt")


def test_another_file_is_no_checkpoint(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        load_checkpoint(tmp_path / "a.ckpt")
    torch.save([1, 2], tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"b\.ckpt holds a list, not a checkpoint"):
        load_checkpoint(tmp_path / "b.ckpt")


def test_a_run_folder_stands_for_its_last_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint_of(tmp_path)
    for age, name in enumerate(["last.ckpt", "epoch=3.ckpt"]):
        (folder / name).touch()
        os.utime(folder / name, (age, age))
    assert checkpoint_of(tmp_path) == folder / "last.ckpt"
    assert checkpoint_of(folder / "epoch=3.ckpt") == folder / "epoch=3.ckpt"
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt does not exist"):
        checkpoint_of(tmp_path / "absent.ckpt")


def test_the_run_folder_of_a_checkpoint_is_the_one_with_a_configuration(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert run_folder_of(checkpoint) is None
    (tmp_path / "config.yaml").touch()
    assert run_folder_of(checkpoint) == run_folder_of(tmp_path) == tmp_path
    assert run_folder_of(tmp_path / "absent") is None


def test_weights_of_another_network_are_refused_by_name():
    here = {"a": torch.zeros(2), "b": torch.zeros(3)}
    refuse_other_weights(dict(here), here, "x.ckpt")
    with pytest.raises(
        ValueError, match=r"x\.ckpt is of another network: .*missing \(first: b\).*here \(2,\)"
    ):
        refuse_other_weights({"a": torch.zeros(5), "c": torch.zeros(3)}, here, "x.ckpt")


def test_run_folders_are_always_new(tmp_path):
    (tmp_path / "runs" / "digits-9").mkdir(parents=True)
    (tmp_path / "runs" / "digits-x").mkdir()
    names = [new_run_folder("digits", tmp_path / "runs").name for _ in range(2)]
    assert names == ["digits-10", "digits-11"]
    assert new_run_folder("other", tmp_path / "runs").name == "other-1"


def test_earlier_files_are_kept_under_the_next_free_name(tmp_path):
    assert keep_earlier(tmp_path / "metrics.csv") is None
    for text in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(text)
        keep_earlier(tmp_path / "metrics.csv")
    assert [(tmp_path / f"metrics-{n}.csv").read_text() for n in (1, 2)] == ["first", "second"]
    assert not (tmp_path / "metrics.csv").exists()
