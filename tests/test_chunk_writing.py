"""prepare FOLDER OUT: stopped in any way it goes on to the same files; nothing that is half written looks whole."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from commands import files_in, line
from pictures import save, two_classes
from small_autoencoder import Gaussian
from torch.testing import assert_close

import lightning_diffusion as ld

pytest.importorskip("litdata")

from lightning_diffusion import io
from lightning_diffusion.cli import main
from lightning_diffusion.datamodules import ImageFolderDataModule, StreamingDataModule
from lightning_diffusion.datamodules.chunk_writing import ChunkWriter

ONE_IMAGE = 3 * 8 * 8
LATENT = """\
model:
  network: {class_path: UNet, init_args: {image_shape: [12, 4, 4], channels: 8, num_blocks: 1, num_classes: 2}}
  representation:
    class_path: LatentRepresentation
    init_args: {autoencoder: {class_path: PatchPCA, init_args: {channels: 12, image_channels: 3}}}
  objective: EDM
trainer: {max_steps: 2, accelerator: cpu, logger: false, limit_val_batches: 0}
"""


@pytest.fixture
def photos(tmp_path):
    return two_classes(tmp_path / "photos")


def folder_of(photos, **options):
    return ImageFolderDataModule(photos, 8, held_out=0.25, in_memory=False, num_workers=0, **options)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def writer(**options):
    return ChunkWriter(**{"chunk_bytes": 4 * ONE_IMAGE, "batch_size": 3, **options})


def test_chunks_hold_the_images_of_the_folder(photos, tmp_path):
    prepared = writer().write(folder_of(photos), tmp_path / "out")
    assert (prepared.training, prepared.held_out, prepared.classes) == (18, 6, ("cats", "dogs"))
    data = StreamingDataModule(str(tmp_path / "out"), 2)
    for part, count in (("training_data", 18), ("held_out_data", 6)):
        found, expected = (getattr(d, part)().__getitems__(range(count)) for d in (data, folder_of(photos)))
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["label"], expected["label"])
    assert len(list((tmp_path / "out" / "training").glob("*.bin"))) == 6


class StopError(Exception):
    """What stops a writing in these tests."""


def stop_after(monkeypatch, files, error):
    """The disk refuses the file number `files` and all later ones."""
    publish, left = io.publish, [files]

    def refuse(temporary, path):
        left[0] -= 1
        if left[0] < 0:
            raise error
        publish(temporary, path)

    monkeypatch.setattr(io, "publish", refuse)


def measured():
    return ld.PatchPCA(12, image_channels=3)


@pytest.mark.parametrize("autoencoder", [None, Gaussian, measured], ids=["pixels", "random", "measured"])
def test_stopped_before_any_file_it_ends_with_the_same_files(photos, tmp_path, autoencoder):
    def write(out):
        made = autoencoder and autoencoder()
        writer(autoencoder=made).write(folder_of(photos), out)

    write(tmp_path / "straight")
    expected = contents(tmp_path / "straight")
    for files in range(len(expected) - (autoencoder is not None)):
        out = tmp_path / f"stopped-{files}"
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, files, StopError())
            with pytest.raises(StopError):
                write(out)
        whole = files + (autoencoder is not None)  # whose parameters are written by another way
        assert len(files_in(out)) <= whole, "something unfinished is left"
        with pytest.raises((ValueError, FileNotFoundError), match=r"is not whole|holds no prepared.json"):
            StreamingDataModule(str(out))
        write(out)
        assert contents(out) == expected


def test_a_killed_process_is_gone_on_with(photos, tmp_path):
    """SIGKILL in the midst, from the command line; then to its end, and once more, which does nothing."""
    arguments = ["prepare", str(photos), str(tmp_path / "out"), "--image-size", "8", "--held-out", "0.25"]
    script = "import lightning_diffusion.datamodules.chunk_writing as w, time; real = w.write_chunk\n"
    script += "w.write_chunk = lambda *a: (real(*a), time.sleep(60))\n" + line()[2]
    process = subprocess.Popen(
        [line()[0], "-c", script, *arguments, "--workers", "1"], start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("training/chunk-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = contents(tmp_path / "out")
    assert "training/chunk-0-0.bin" in first
    assert "prepared.json" not in first
    for _ in range(2):
        assert main([*arguments, "--workers", "0"]) == 0
    whole = contents(tmp_path / "out")
    assert whole.items() >= first.items()
    straight = [tmp_path / "straight" if word == str(tmp_path / "out") else word for word in arguments]
    assert main([*map(str, straight), "--workers", "0"]) == 0
    assert contents(tmp_path / "straight") == whole


def test_a_full_disk_gets_one_line(photos, tmp_path, monkeypatch, capsys):
    arguments = ["prepare", str(photos), str(tmp_path / "out"), "--image-size", "8", "--workers", "0"]
    stop_after(monkeypatch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "the disk is full (No space left on device)" in said[0]
    assert "start the same command again, it goes on where it was" in said[0]
    assert not [name for name in files_in(tmp_path / "out") if name.endswith(".tmp")]
    monkeypatch.undo()
    assert main(arguments) == 0


def test_without_litdata_it_says_what_to_install(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "litdata", None)
    assert main(["prepare", str(photos), str(tmp_path / "out"), "--image-size", "8"]) == 2
    assert "run `pip install 'lightning-diffusion[streaming]'`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_broken_files_are_named_or_left_out(photos, tmp_path):
    broken = [photos / "cats" / "03.png", photos / "dogs" / "07.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"no whole image: .*0[37].png"):
        writer().write(folder_of(photos), tmp_path / "out")
    data = folder_of(photos, skip_broken=True)
    with pytest.warns(UserWarning, match="Left out"):
        prepared = writer().write(data, tmp_path / "skipped")
    assert prepared.training + prepared.held_out == 22
    seen = StreamingDataModule(str(tmp_path / "skipped")).training_data()
    assert len(seen.__getitems__(range(prepared.training))["label"]) == prepared.training


def test_what_was_begun_otherwise_is_overwritten_only_when_asked(photos, tmp_path):
    out = tmp_path / "out"
    writer().write(folder_of(photos), out)
    with pytest.raises(FileExistsError, match="prepared from other images or with other options"):
        writer(chunk_bytes=9 * ONE_IMAGE).write(folder_of(photos), out)
    save(photos / "cats" / "99.png", np.zeros((9, 9, 3)))
    with pytest.raises(FileExistsError, match="prepared from other images"):
        writer().write(folder_of(photos), out)
    assert writer(overwrite=True).write(folder_of(photos), out).training > 18
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds other files: give a folder that is empty"):
            writer(overwrite=overwrite).write(folder_of(photos), tmp_path / "mine")


def test_latents_from_the_command_line_train(photos, folder, capsys):
    (folder / "latent.yaml").write_text(LATENT)
    options = ["--image-size", "8", "--latents", "latent.yaml", "--workers", "0", "--device", "cpu"]
    assert main(["prepare", "images", "chunks", *options]) == 2, "there is no folder of that name"
    assert "found no folder 'images'" in capsys.readouterr().err
    assert main(["prepare", "images", str(photos), "chunks", *options]) == 0
    said = capsys.readouterr().out
    assert "chunks: 24 training and 0 held-out latents of 12 x 4 x 4, 0.0 MB in 1 files" in said
    fit = next(line for line in said.splitlines() if "  train  " in line).split()[2:]
    assert fit == ["fit", "--config", "latent.yaml", "--config", "chunks/latents.yaml"]
    code = ld.PretrainedAutoencoder(measured(), "chunks/autoencoder.safetensors")
    found = StreamingDataModule("chunks").training_data().__getitems__(range(24))
    images = ImageFolderDataModule(photos, 8, held_out=0.0).training_data().__getitems__(range(24))
    assert_close(code.decode(found["image"]), images["image"], rtol=0, atol=1e-5)
    shutil.rmtree(photos)
    assert main([*fit, "--data.batch_size", "8"]) == 0


MISTAKES = [
    (["prepare", "absent", "out", "--image-size", "8"], "found no folder 'absent'"),
    (["prepare", "photos", "out"], "--image-size is needed"),
    (["prepare", "photos", "out", "--image-size", "0"], "--image-size is 0, expected 1 or more"),
    (["prepare", "photos", "out", "--image-sise", "8"], "--image-sise; did you mean --image-size"),
    (
        ["prepare", "photos", "out", "--image-size", "8", "--latents", "tiny.yaml"],
        "found model.representation Identity",
    ),
    (["prepare", "imags", "--image-size", "8"], "there is no `prepare imags`; did you mean images"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_gets_one_line_and_leaves_nothing(folder, photos, capsys, arguments, expected):
    before = files_in(folder)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert expected in said[0]
    assert files_in(folder) == before
