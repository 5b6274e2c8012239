"""Real photographs to train on, from packages that bring some along: nothing is downloaded.

scikit-learn brings two, the wheels of scikit-image eight in colour (0.24 to 0.26). The task: which
photograph is a crop from? The right quarter of each is kept for the test.
"""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Photographs in colour; of the stereo pair one, as both show the same.
FILES = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": (
        "data",
        (
            *("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
            *("hubble_deep_field.jpg", "ihc.png", "retina.jpg"),
        ),
    ),
}
FEWEST = 8  # classes


class Absent(Exception):
    """No package here brings a photograph."""


class Crops(NamedTuple):
    """images: uint8 [B, 3, size, size]; labels: int64 [B]."""

    images: Tensor
    labels: Tensor


def photographs() -> dict[str, Image.Image]:
    """All that are here, by name; too few are cut into quarters, each a class of its own.

    Raises:
        Absent: there is none.
    """
    found: dict[str, Image.Image] = {}
    for package, (folder, names) in FILES.items():
        # The files themselves: the packages' own functions may want to download, or further
        # packages.
        spec = find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            for path in (Path(place) / folder / name for name in names):
                if path.exists():
                    found[path.stem] = Image.open(path).convert("RGB")
    if not found:
        raise Absent("no photographs: neither scikit-learn nor scikit-image is installed")
    while len(found) < FEWEST:
        found = {f"{k} {n}": part for k, v in found.items() for n, part in enumerate(_quarters(v))}
    return found


def _quarters(image: Image.Image) -> list[Image.Image]:
    w, h = image.width // 2, image.height // 2
    return [image.crop((x, y, x + w, y + h)) for y in (0, h) for x in (0, w)]


def crops(photos: list[Image.Image], count: int, size: int, seed: int, test: bool = False) -> Crops:
    """Random resized crops of the photographs in turn, flipped and with other colours at random.

    From their left three quarters, or for the test from what is right of it. Each has random
    numbers of its own, so that the threads' order makes no difference.
    """

    def make(i: int) -> np.ndarray:
        random = np.random.default_rng([seed, test, i])
        photo = photos[i % len(photos)]
        cut = photo.width * 3 // 4
        left, right = (cut, photo.width) if test else (0, cut)
        side = min(right - left, photo.height) * random.uniform(0.4, 1.0)
        ratio = random.uniform(0.75, 1.0)
        wide, high = (side, side * ratio) if random.random() < 0.5 else (side * ratio, side)
        x, y = random.uniform(left, right - wide), random.uniform(0, photo.height - high)
        box = (x, y, x + wide, y + high)
        crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(crop, np.float32)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        gains, offset = random.uniform(0.85, 1.15, 3), random.uniform(-20, 20)
        jittered = (pixels * gains.astype(np.float32) + np.float32(offset)).clip(0, 255)
        return jittered.astype(np.uint8).transpose(2, 0, 1).copy()

    with ThreadPoolExecutor() as threads:  # Pillow and numpy release Python's lock
        made = list(threads.map(make, range(count)))
    labels = torch.arange(count) % len(photos)
    return Crops(torch.from_numpy(np.stack(made)), labels)
