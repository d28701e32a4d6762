"""Streaming from chunks: what was written, each sample once per epoch whatever happens; what is broken is refused."""

import json
import pickle
import random
import shutil
from itertools import pairwise

import lightning as L
import pytest
import torch
from pictures import two_classes
from small_autoencoder import Gaussian
from test_resumed_data import QUIET, fit, same
from torch.testing import assert_close

import lightning_diffusion as ld

pytest.importorskip("litdata")

from lightning_diffusion.chunk_reading import ChunkCache, ChunkReader
from lightning_diffusion.chunks import Prepared, write_chunk, write_index
from lightning_diffusion.datamodules import ImageFolderDataModule, StreamingDataModule, StreamingOptions
from lightning_diffusion.datamodules.base import Ranks
from lightning_diffusion.datamodules.chunk_writing import ChunkWriter
from lightning_diffusion.real_images import RealImages
from lightning_diffusion.resume import Place

COUNT, CHUNK = 960, 50
OPTIONS = StreamingOptions(streams=4, window=32)


def pixels(label):
    return (label % 251).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """960 images in 20 chunks, the last smaller; image i has label i and one grey of its own. Not to be changed."""
    folder, label = tmp_path_factory.mktemp("numbered"), torch.arange(COUNT)
    for number, part in enumerate(label.split(CHUNK)):
        write_chunk(folder / "training", number, {"image": pixels(part), "label": part})
    write_index(folder / "training", 20, {"image": pixels(label[:1]), "label": label[:1]})
    Prepared("pixels", (1, 4, 4), tuple(map(str, range(COUNT))), training=COUNT).write(folder)
    return folder


@pytest.fixture
def copy(numbered, tmp_path):
    return shutil.copytree(numbered, tmp_path / "copy")


def streaming(folder, batch_size=32, num_workers=0, **options):
    return StreamingDataModule(str(folder), batch_size, num_workers=num_workers, options=OPTIONS, **options)


def test_samples_are_those_that_were_written(numbered):
    reader, order = ChunkReader(str(numbered), "training"), torch.randperm(COUNT)[:100]
    found = reader.read(order.tolist())
    assert torch.equal(found["label"], order)
    assert torch.equal(found["image"], pixels(order))
    assert len(pickle.dumps(reader)) < 10_000


def test_metrics_take_a_fixed_choice_of_what_is_streamed(numbered, monkeypatch):
    monkeypatch.setattr("lightning_diffusion.real_images.MOST", 100)
    one, other = (RealImages(streaming(numbered, size).train_dataloader()).content for size in (32, 48))
    assert one.digest == other.digest
    assert len(one.labels.unique()) == 100


def test_litdata_itself_reads_the_chunks(numbered):
    import litdata

    samples = list(litdata.StreamingDataset(str(numbered / "training"), shuffle=False))
    assert [sample["label"] for sample in samples] == list(range(COUNT))


def test_batches_are_in_the_unit_range_with_labels(numbered):
    (batch, *_), data = streaming(numbered).train_dataloader(), streaming(numbered)
    assert batch["image"].dtype == torch.float32
    assert_close(batch["image"][:, 0, 0, 0], (batch["label"] % 251) / 127.5 - 1)
    assert (data.image_shape, data.num_classes, data.val_dataloader()) == ((1, 4, 4), COUNT, [])
    assert "label" not in next(iter(streaming(numbered, labels=False).train_dataloader()))


class OfRank(StreamingDataModule):
    """As in one of several processes."""

    at = Ranks(1, 0)

    def ranks(self):
        return self.at


def labels(folder, ranks, place, batches, workers):
    """What each process sees in `batches` micro-batches from `place` on, (R, batches, B)."""
    seen = []
    for rank in range(ranks):
        data = OfRank(str(folder), 16, num_workers=workers, options=OPTIONS)
        data.at, data._place = Ranks(ranks, rank), place
        loader = data.train_dataloader()
        loader.sampler.set_epoch(place.epoch)
        seen.append([batch["label"].tolist() for batch, _ in zip(loader, range(batches), strict=False)])
    return torch.tensor(seen)


def test_each_index_once_through_two_workers_on_two_ranks_with_five_interruptions(numbered):
    """In two epochs of 30 micro-batches, stopped at drawn places; the order is that of one process."""
    stops = sorted([*random.Random(0).sample(range(1, 60), 5), 0, 30, 60])
    seen = []
    for number, (first, last) in enumerate(pairwise(stops)):
        place = Place(first // 30, first % 30)
        seen.append(labels(numbered, 2, place, last - first, workers=0 if number == 2 else 2))
    steps = torch.cat(seen, 1)
    for epoch, part in enumerate(steps.split(30, 1)):
        assert sorted(part.flatten().tolist()) == list(range(COUNT))
        alone = labels(numbered, 1, Place(epoch, 0), 60, workers=0)
        assert torch.equal(part.permute(1, 2, 0).flatten(), alone.flatten())
    assert not torch.equal(*steps.split(30, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_it_was_stopped(numbered, tmp_path, workers):
    straight, _ = fit(streaming(numbered, 160), tmp_path)
    first, _ = fit(streaming(numbered, 160, workers), tmp_path, max_epochs=-1, max_steps=8)
    rest, _ = fit(streaming(numbered, 160, 2 - workers), tmp_path, tmp_path / "end.ckpt")
    assert same(first + rest, straight)
    half, _ = fit(streaming(numbered, 80), tmp_path, tmp_path / "end.ckpt", max_epochs=3)
    whole, _ = fit(streaming(numbered, 80), tmp_path / "whole", max_epochs=3)
    assert same(half, whole[24:])


def test_a_bucket_is_fetched_once_and_kept_within_bounds(numbered, tmp_path):
    """`local:` is litdata's bucket without a network."""
    bytes_of_chunk = (numbered / "training" / "chunk-0-0.bin").stat().st_size
    cache = ChunkCache(str(tmp_path / "cache"), gigabytes=6.5 * bytes_of_chunk / 1e9)
    options = StreamingOptions(streams=4, window=32, cache=cache)
    data = StreamingDataModule(f"local:{numbered}", 32, options=options, num_workers=2)
    seen = torch.cat([batch["label"] for batch in data.train_dataloader()])
    assert sorted(seen.tolist()) == list(range(COUNT))
    assert 1 <= len(list((tmp_path / "cache").glob("chunks-*/training/*.bin"))) <= 6
    with pytest.raises(FileNotFoundError, match=r"holds no prepared.json: upload the whole folder"):
        StreamingDataModule(
            f"local:{tmp_path}/nowhere", options=StreamingOptions(cache=ChunkCache(str(tmp_path)))
        )


def test_a_bucket_that_was_prepared_anew_is_not_mixed_with_what_was_kept_of_it(copy, tmp_path):
    options = StreamingOptions(streams=4, window=32, cache=ChunkCache(str(tmp_path / "cache")))

    def darkest():
        data = StreamingDataModule(f"local:{copy}", 32, options=options, num_workers=0)
        return min(batch["image"].min().item() for batch in data.train_dataloader())

    assert darkest() == -1
    for number, part in enumerate(torch.arange(COUNT).split(CHUNK)):
        white = torch.full((len(part), 1, 4, 4), 255, dtype=torch.uint8)
        write_chunk(copy / "training", number, {"image": white, "label": part})
    Prepared("pixels", (1, 4, 4), tuple(map(str, range(COUNT))), training=COUNT).write(copy)
    assert darkest() == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_chunk_that_another_process_trims_is_fetched_again(numbered, tmp_path, monkeypatch):
    cache = ChunkCache(str(tmp_path / "cache"))
    reader, trimmed = ChunkReader(f"local:{numbered}", "training", cache), []

    def trim(self, folder, keep):
        if len(trimmed) < 2:
            trimmed.append(keep)
            keep.unlink()

    monkeypatch.setattr(ChunkCache, "trim", trim)
    assert reader.read([3])["label"].tolist() == [3]
    assert len(trimmed) == 2


def truncated(folder):
    path = folder / "training" / "chunk-0-7.bin"
    path.write_bytes(path.read_bytes()[:-9])


def lost(folder):
    (folder / "training" / "chunk-0-7.bin").unlink()


def half_written(folder):
    (folder / "prepared.json").unlink()


def broken_index(folder):
    (folder / "training" / "index.json").write_text('{"chunks": [')


def no_index(folder):
    (folder / "training" / "index.json").unlink()


def other_chunks(folder):
    path = folder / "prepared.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "training": 7}))


def other_version(folder):
    path = folder / "prepared.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))


DAMAGE = [
    (
        truncated,
        r"chunk-0-7.bin is broken: found \d+ bytes and 50 samples, index.json lists .* Remove it, and start",
    ),
    (lost, "chunk-0-7.bin is missing, index.json lists it"),
    (half_written, "is not whole, prepared.json is missing: the writing was stopped; start the same"),
    (broken_index, "index.json is broken"),
    (no_index, "index.json is missing: files were lost"),
    (other_chunks, "Found 960 samples in .*, expected the 7 of prepared.json"),
    (other_version, "prepared.json in .* is of another version than 1"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_what_is_not_whole_is_refused_by_name(copy, damage, said):
    damage(copy)
    with pytest.raises(ValueError, match=said):
        streaming(copy).train_dataloader()


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: give the folder that `prepare` wrote"):
        streaming(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no prepared.json: give the folder"):
        streaming(tmp_path)


def test_samples_of_another_size_are_refused(copy):
    path = copy / "prepared.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shape": [3, 4, 4]}))
    with pytest.raises(ValueError, match=r"samples of shape \(1, 4, 4\) in .*, expected the \(3, 4, 4\)"):
        next(iter(streaming(copy).train_dataloader()))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Of 18 + 6 images, by an autoencoder with a posterior."""
    folder = tmp_path_factory.mktemp("latents")
    images = ImageFolderDataModule(
        two_classes(folder / "images"), 8, held_out=0.25, in_memory=False, num_workers=0
    )
    ChunkWriter(Gaussian(), chunk_bytes=5000).write(images, folder / "chunks")
    return folder / "chunks", images


def test_latents_are_drawn_anew_in_every_epoch(latents):
    folder, images = latents
    data = StreamingDataModule(str(folder), 18, num_workers=0)
    loader, drawn = data.train_dataloader(), []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        drawn.append(batch["image"][(loader.sampler.order(epoch) % 18).argsort()])
    mean = 2 * images.training_data().__getitems__(range(18))["image"] + 1
    noise = [(x - mean) / 0.3 for x in drawn]
    assert torch.equal(drawn[0], drawn[2])
    assert abs((noise[0] * noise[1]).mean()) < 4 / mean.numel() ** 0.5
    for part in noise[:2]:
        assert abs(part.mean()) < 4 / mean.numel() ** 0.5
        assert part.var().item() == pytest.approx(1, abs=4 * (2 / mean.numel()) ** 0.5)
    plain = StreamingDataModule(str(folder), 18, num_workers=0, options=StreamingOptions(sample=False))
    (batch,) = plain.train_dataloader()
    assert_close(batch["image"], mean[plain.train_dataloader().sampler.order(0)])


def test_latents_of_another_autoencoder_are_refused(latents):
    folder, _ = latents
    network = ld.UNet((3, 8, 8), channels=8, num_blocks=1, num_classes=2)
    other = Gaussian()
    torch.nn.init.constant_(other.factor, 3.0)
    for representation, said in (
        (
            ld.LatentRepresentation(other, 0.0, 1.0, encoded=True),
            "made by an autoencoder whose parameters hash",
        ),
        (ld.LatentRepresentation(Gaussian(), 0.0, 1.0), "would encode them as images"),
    ):
        model = ld.DiffusionModule(network, representation=representation)
        with pytest.raises(ValueError, match=said):
            L.Trainer(**QUIET, fast_dev_run=True).fit(
                model, StreamingDataModule(str(folder), 4, num_workers=0)
            )
    with pytest.raises(ValueError, match="Found flip=True for the latents"):
        StreamingDataModule(str(folder), options=StreamingOptions(flip=True))
