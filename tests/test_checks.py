"""Bad batches are refused with one error that says what was found, what was expected and how to mend it."""

import pytest
import torch

from lightning_diffusion.checks import check_images

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
LABELS = torch.tensor([0, 9])


def with_nan(index):
    images = IMAGES.clone()
    images[index, 1, 2, 3] = torch.nan
    return images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_good_batches_pass_in_any_precision(dtype):
    check_images(IMAGES.to(dtype), LABELS, num_classes=10, image_shape=(3, 4, 4))


def test_data_that_are_no_images_may_lie_anywhere():
    check_images(torch.tensor([[-30.0], [1e4]]), image_shape=(1,), value_range=None)


BAD = {
    "8-bit values": ((IMAGES + 1) * 127.5, r"0\.\.255, expected -1\.\.1: divide by 127\.5 and subtract 1"),
    "8-bit type": (IMAGES.byte(), r"torch\.uint8, expected torch\.float32 .*/ 127\.5 - 1"),
    "normalised by mean and deviation": (
        IMAGES * 2.5,
        r"-2\.5\.\.2\.5, expected -1\.\.1: scale them linearly",
    ),
    "not a number": (with_nan(1), r"NaN or infinity in images \[1\]"),
    "infinite": (IMAGES / 0, r"NaN or infinity in images \[0, 1\]"),
    "another size": (IMAGES[:, :, :3], r"shape \(3, 3, 4\), expected the network's \(3, 4, 4\)"),
    "channels last": (IMAGES.movedim(1, -1), r"shape \(4, 4, 3\), expected the network's \(3, 4, 4\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused(name):
    images, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        check_images(images, image_shape=(3, 4, 4))


BAD_LABELS = {
    "too large": (torch.tensor([0, 10]), 10, r"labels 0\.\.10, expected 0\.\.9, .* num_classes=10"),
    "negative": (torch.tensor([-1, 3]), 10, r"labels -1\.\.3, expected 0\.\.9"),
    "floating point": (LABELS.float(), 10, r"torch\.float32 .* expected torch\.int64"),
    "one-hot": (torch.eye(10).long()[:2], 10, r"\(2, 10\), expected .*\(2,\): .*argmax"),
    "no classes": (LABELS, 0, r"num_classes=0: give the network the num_classes of the data"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_refused(name):
    labels, num_classes, message = BAD_LABELS[name]
    with pytest.raises(ValueError, match=message):
        check_images(IMAGES, labels, num_classes)
