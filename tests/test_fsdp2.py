"""Shards: written by two processes, read by one, with FSDP2 and without, and in one file."""

from __future__ import annotations

import io
import pickle
import shutil

import lightning as L
import pytest
import torch
from processes_of_tests import run_processes
from sharded_job import QUIET, module
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.cli import main
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.io import checkpoint_of, load_checkpoint, publish
from lightning_diffusion.sharded_checkpoints import INDEX, _Index, check_whole, named, numbered


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six steps on two processes; the script itself looks at what is sharded, and at a mesh that is refused."""
    folder = tmp_path_factory.mktemp("sharded")
    run_processes("sharded_job.py", "begin", folder, 2, processes=2)
    return folder


@pytest.fixture
def copied(shards, tmp_path):
    return shutil.copytree(shards / "last.ckpt", tmp_path / "last.ckpt")


def test_one_process_goes_on_from_two(shards):
    run_processes("sharded_job.py", "go_on", shards, 1, processes=1)


def test_shards_are_read_by_all_and_exported_into_one_file(shards, tmp_path, capsys):
    expected = torch.load(shards / "whole.pt")
    file = tmp_path / "one.ckpt"
    assert (
        main(["export", "--checkpoint", str(shards / "last.ckpt"), "--to", "checkpoint", "--out", str(file)])
        == 0
    )
    assert "step 6, in one file" in capsys.readouterr().out
    checkpoint = load_checkpoint(file)
    assert_close(checkpoint["callbacks"]["EMA"]["averages"]["ema"], expected["ema"], rtol=0, atol=0)
    for place in (file, shards / "last.ckpt"):
        loaded = ld.load_module(place)
        assert_close(loaded.sample(2, weights="ema"), expected["drawn"], rtol=0, atol=1e-5)


def test_one_device_goes_on_from_shards(shards, tmp_path):
    model = module()
    trainer = L.Trainer(
        max_steps=7,
        default_root_dir=tmp_path,
        plugins=[ld.AtomicCheckpointIO()],
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(model, datamodule=DigitsDataModule(32), ckpt_path=shards / "last.ckpt")
    assert trainer.global_step == 7
    steps = {float(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {7.0}


def test_damaged_shards_are_refused(copied):
    shard = max(copied.glob("*.distcp"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"is damaged: the shard .* has 1000 of \d+ bytes. Use another checkpoint"
    ):
        check_whole(copied)
    (copied / "meta.pt").unlink()
    with pytest.raises(ValueError, match=r"is unfinished: it lacks meta\.pt"):
        load_checkpoint(copied)


OF_A_CLASS = b"cbuiltins\ngetattr\n(ctorch\nSize\nVcount\ntR."  # getattr(torch.Size, "count")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (pickle.dumps(eval), r"it names builtins\.eval"),
        (OF_A_CLASS, r"it asks <class 'torch\.Size'> for count"),
    ],
)
def test_an_index_runs_nothing(copied, index, said):
    (copied / INDEX).write_bytes(index)
    with pytest.raises(ValueError, match=said):
        check_whole(copied)


def test_members_of_enumerations_are_read_as_any_python_writes_them():
    kind = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    index = b"cbuiltins\ngetattr\n(" + kind + b"VTORCH_CHANNELS_LAST\ntR."
    assert _Index(io.BytesIO(index)).load() is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


def test_a_folder_that_was_being_replaced_is_found(copied, tmp_path):
    new = shutil.copytree(copied, tmp_path / "new")
    publish(new, copied)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    copied.rename(tmp_path / ".last.ckpt.before")  # killed between the two renames
    assert checkpoint_of(copied) == copied
    check_whole(copied)


def test_optimizers_by_number_and_by_name():
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = named(optimizer.state_dict(), [["weight", "bias"]])
    assert set(state["state"]) == {"weight", "bias"}
    assert_close(numbered(state), optimizer.state_dict())
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, this run's has \[1\]"):
        named(optimizer.state_dict(), [["weight"]])
