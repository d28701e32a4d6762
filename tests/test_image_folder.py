"""Files of all kinds are read right, broken ones are named, each image comes once an epoch."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import save, two_classes
from PIL import Image

from lightning_diffusion.datamodules import ImageFolderDataModule
from lightning_diffusion.datamodules.images import BrokenImageError, list_images, read_image


@pytest.fixture
def folder(tmp_path):
    return two_classes(tmp_path)


def brightness(batch):
    """The 8-bit grey level of each image of one brightness."""
    return (batch["image"].mean((1, 2, 3)) + 1).mul(127.5).round().int().tolist()


def all_of(loader):
    return [grey for batch in loader for grey in brightness(batch)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_training_image_comes_once_per_epoch_in_another_order(folder, workers):
    data = ImageFolderDataModule(folder, 8, 1, held_out=0.25, in_memory=False, num_workers=workers)
    loader, epochs = data.train_dataloader(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(all_of(loader))
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    held = all_of(data.val_dataloader())
    assert len(held) == 6
    assert sorted(epochs[0] + held) == [100 * number + 8 * index for number in (0, 1) for index in range(12)]


def test_memory_and_disk_give_the_same(folder):
    memory, disk = (
        ImageFolderDataModule(folder, 6, 4, in_memory=kept, num_workers=0) for kept in (True, False)
    )
    for expected, found in zip(memory.train_dataloader(), disk.train_dataloader(), strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_labels_are_the_sub_folders_in_order(folder):
    data = ImageFolderDataModule(folder, 8, 4)
    assert (data.classes, data.num_classes) == (["cats", "dogs"], 2)
    for batch in data.train_dataloader():
        assert [grey >= 100 for grey in brightness(batch)] == batch["label"].bool().tolist()


def test_a_flat_folder_has_no_labels(folder):
    data = ImageFolderDataModule(folder / "cats", 8, 4)
    assert data.num_classes == 0
    assert set(next(iter(data.train_dataloader()))) == {"image"}


def test_the_held_out_part_may_be_a_folder(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("held")
    for name in ("cats", "dogs"):
        save(other / name / "x.png", np.full((9, 9, 3), 77))
    data = ImageFolderDataModule(folder, 8, 4, held_out=other)
    assert all_of(data.val_dataloader()) == [77, 77]
    assert len(data.training_data()) == 24
    (other / "dogs" / "x.png").unlink()
    with pytest.raises(ValueError, match=r"found classes \['cats'\].*expected those of.*\['cats', 'dogs'\]"):
        ImageFolderDataModule(folder, 8, 4, held_out=other)


def test_nothing_held_out_means_no_validation(folder):
    assert ImageFolderDataModule(folder, 8, 4, held_out=0).val_dataloader() == []


def gradient(height, width):
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.zeros_like(red)], -1).round()


def test_images_cover_the_size_and_are_cropped_about_the_centre(tmp_path):
    """Of a picture twice as wide as high, the middle half of the width remains, unsqueezed."""
    image = read_image(save(tmp_path / "a.png", gradient(100, 200)), (50, 50), 3).float()
    assert image.shape == (3, 50, 50)
    assert image[0, 25, 0] == pytest.approx(255 / 4, abs=3)
    assert image[0, 25, -1] == pytest.approx(255 * 3 / 4, abs=3)
    assert image[1, 0, 25] == pytest.approx(0, abs=3)
    assert image[1, -1, 25] == pytest.approx(255, abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
    """Stored as cameras do: the pixels turned, and a note how to turn them back."""
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", np.ascontiguousarray(stored(gradient(24, 16))), exif=exif)
    upright = read_image(save(tmp_path / "b.png", gradient(24, 16)), (24, 16), 3)
    assert torch.equal(read_image(path, (24, 16), 3), upright)


def test_all_kinds_of_pixels_become_8_bit(tmp_path):
    half = np.full((8, 8), 128)
    see_through = np.dstack([half, half, half, np.where(np.arange(8) < 4, 255, 0)[None].repeat(8, 0)])
    palette = Image.fromarray(np.uint8(half), "L").convert("P")
    palette.save(tmp_path / "palette.png")
    paths = {
        "grey": save(tmp_path / "grey.png", half),
        "16-bit": save(tmp_path / "deep.png", half * 257, dtype=np.uint16),
        "palette": tmp_path / "palette.png",
        "see-through": save(tmp_path / "alpha.png", see_through),
    }
    for name, path in paths.items():
        for channels in (1, 3):
            image = read_image(path, (8, 8), channels)
            assert (image[:, :, :4] == 128).all(), name
            assert (image[:, :, 4:] == (255 if name == "see-through" else 128)).all(), name


def without_end(path):
    path.write_bytes(path.read_bytes()[:45])


def not_an_image(path):
    path.write_text("<html>404</html>")


def empty(path):
    path.write_bytes(b"")


def damaged(path):
    """The pixels' checksum holds, what it protects is garbage."""
    body = b"IDAT" + zlib.compress(b"nonsense")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(path.read_bytes()[:33] + chunk)


@pytest.mark.parametrize("break_", [without_end, not_an_image, empty, damaged])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_broken_file_is_named_and_refused(folder, break_, in_memory):
    path = folder / "dogs" / "05.png"
    break_(path)
    data = ImageFolderDataModule(folder, 8, 2, held_out=0, in_memory=in_memory, num_workers=0)
    with pytest.raises(BrokenImageError, match=r"no whole image: .*dogs/05\.png.*skip_broken=True"):
        list(data.train_dataloader())


def test_a_broken_file_in_a_worker_is_named_too(folder):
    not_an_image(folder / "dogs" / "05.png")
    data = ImageFolderDataModule(folder, 8, 2, held_out=0, in_memory=False, num_workers=1)
    with pytest.raises(BrokenImageError, match=r"dogs/05\.png"):
        list(data.train_dataloader())


@pytest.mark.parametrize(("in_memory", "count"), [(True, 23), (False, 24)])
def test_broken_files_are_left_out_when_asked_with_a_warning(folder, in_memory, count):
    """From disk the next whole file takes the place, so that the length of an epoch stays."""
    not_an_image(folder / "cats" / "11.png")
    data = ImageFolderDataModule(
        folder, 8, 1, held_out=0, skip_broken=True, in_memory=in_memory, num_workers=0
    )
    with pytest.warns(UserWarning, match=r"Left out: .*cats/11\.png"):
        batches = list(data.train_dataloader())
    found = [(brightness(batch)[0], batch["label"].item()) for batch in batches]
    assert len(found) == count
    assert (88, 0) not in found
    assert found.count((100, 1)) == 1 + (not in_memory)


def test_only_broken_files_are_refused_whatever_was_asked(tmp_path):
    not_an_image(tmp_path / "a.png")
    for in_memory in (True, False):
        data = ImageFolderDataModule(
            tmp_path, 8, 1, held_out=0, skip_broken=True, in_memory=in_memory, num_workers=0
        )
        with (
            pytest.warns(UserWarning, match="Left out"),
            pytest.raises(BrokenImageError, match="no whole image among the files"),
        ):
            list(data.train_dataloader())


def test_folders_that_are_not_there_or_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no folder .*nowhere.*check the path"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.png").write_text("")
    with pytest.raises(FileNotFoundError, match=r"found no image in .*expected files ending in .*\.png"):
        list_images(tmp_path)
    save(tmp_path / "a.png", np.zeros((2, 2)))
    save(tmp_path / "class" / "b.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"both in .* sub-folders \['class'\]"):
        list_images(tmp_path)


def test_the_examples_in_the_docs_run(folder, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    folder.rename(folder.with_name("photos"))
    monkeypatch.chdir(folder.parent)
    names, (first, *others) = {}, re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(first, names)
    assert (names["data"].image_shape, names["data"].num_classes) == ((3, 64, 64), 2)
    for example in others:
        exec(example, names)
