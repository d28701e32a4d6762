"""Image files to test with."""

import numpy as np
from PIL import Image


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=options.pop("dtype", np.uint8))).save(path, **options)
    return path


def two_classes(folder):
    """Two classes of twelve images of 10 x 12 pixels, each of one brightness of its own."""
    for number, name in enumerate(("cats", "dogs")):
        for index in range(12):
            grey = 100 * number + 8 * index
            save(folder / name / f"{index:02}.png", np.full((10, 12, 3), grey))
    return folder
