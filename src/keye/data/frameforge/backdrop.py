"""Backgrounds of more than one colour: gradients, stripes, checkers, blobs and photographs, still or drifting.

Every texture is dark enough for the colours of objects and words to stand out. Photographs are those that packages
bring along (matplotlib, scikit-learn, scikit-image); where none is installed another texture takes their place, so a
scene with photographs looks the same only where the same packages are.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.data.frameforge.words import BACKGROUNDS, Rgb

Pixels = NDArray[np.uint8]

#: How often each kind is drawn; "photograph" stands for blobs where no photograph is installed.
KINDS = {"gradient": 0.2, "stripes": 0.15, "checker": 0.15, "blobs": 0.2, "photograph": 0.3}
#: Levels of textures: grain can still be added in 8 bits, and objects stay brighter in at least one channel.
DARKEST, BRIGHTEST = 8, 115
_TRAIN_PHOTOGRAPHS = (
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"), ("sklearn", "datasets/images/china.jpg"),
    *(("skimage", f"data/{name}") for name in (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coins.png", "gravel.png", "moon.png", "rocket.jpg",
        "retina.jpg")),
)  # fmt: skip
_HELD_OUT_PHOTOGRAPHS = (
    ("sklearn", "datasets/images/flower.jpg"),
    *(("skimage", f"data/{name}") for name in ("coffee.png", "grass.png", "motorcycle_left.png",
                                               "hubble_deep_field.jpg")),
)  # fmt: skip
#: Sides in pixels that a photograph is reduced to once.
_PHOTOGRAPH_SIDE = 640
_MAX_DRIFT = 12.0


@dataclass(frozen=True)
class Texture:
    """One texture. `colors` are the two it is made of (photographs have their own), `drift` says how far it moves to
    the right and down, in scene units a second, `photograph` where the picture lies (package and path)."""

    kind: str
    seed: int
    colors: tuple[Rgb, Rgb]
    drift: tuple[float, float] = (0.0, 0.0)
    photograph: tuple[str, str] | None = None

    @property
    def moves(self) -> bool:
        """Whether frames differ."""
        return self.drift != (0.0, 0.0)


def photographs(split: str) -> list[tuple[str, str]]:
    """The installed photographs of a split, as package and path; those of `train` are in no other split."""
    wanted = _TRAIN_PHOTOGRAPHS if split == "train" else _HELD_OUT_PHOTOGRAPHS
    return [item for item in wanted if _photograph_path(*item) is not None]


def pick_texture(rng: random.Random, split: str, *, moving: float = 0.35) -> Texture:
    """A texture drawn from `rng`; with the chance `moving` it drifts."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    seed = rng.getrandbits(48)
    colors = _pick_color(rng), _pick_color(rng)
    angle, speed = rng.random() * 2 * math.pi, rng.uniform(1.0, _MAX_DRIFT)
    drifts = rng.random() < moving
    place = rng.random()  # drawn in any case, so that a missing package changes nothing but the picture
    photograph = None
    if kind == "photograph":
        installed = photographs(split)
        photograph = installed[int(place * len(installed))] if installed else None
        kind = "photograph" if installed else "blobs"
    drift = (speed * math.cos(angle), speed * math.sin(angle)) if drifts else (0.0, 0.0)
    return Texture(kind, seed, colors, drift, photograph)


def paint_texture(
    texture: Texture, times: Sequence[float], size: tuple[int, int], units: float = 1.0
) -> NDArray[np.uint8]:
    """The texture at `times` seconds, uint8 RGB [len(times), height, width, 3], or [1, height, width, 3] where it does
    not move. `size` is (width, height), `units` the pixels of a scene unit."""
    width, height = size
    tile = _tile(texture.kind, texture.seed, texture.colors, texture.photograph, width, height)
    if not texture.moves:
        return tile[None, :height, :width]
    frames = np.empty((len(times), height, width, 3), np.uint8)
    rows, columns = np.arange(height), np.arange(width)
    for frame, seconds in zip(frames, times, strict=True):
        right, down = (round(speed * units * seconds) for speed in texture.drift)
        frame[:] = tile[(rows - down) % tile.shape[0]][:, (columns - right) % tile.shape[1]]
    return frames


def _pick_color(rng: random.Random) -> Rgb:
    """A named background colour, jittered, or any dark colour."""
    if rng.random() < 0.6:
        base, jitter = rng.choice(list(BACKGROUNDS.values())), 14
        return _limit([level + rng.randint(-jitter, jitter) for level in base])
    return _limit([rng.randint(DARKEST, BRIGHTEST) for _ in range(3)])


def _limit(levels: Sequence[int]) -> Rgb:
    red, green, blue = (min(BRIGHTEST, max(DARKEST, level)) for level in levels)
    return red, green, blue


@lru_cache(maxsize=16)
def _tile(
    kind: str, seed: int, colors: tuple[Rgb, Rgb], photograph: tuple[str, str] | None, width: int, height: int
) -> Pixels:
    """Twice the frame's width and height, so that it can be repeated without a seam. [2 height, 2 width, 3]."""
    rng = np.random.default_rng(seed)
    if photograph is not None:
        return _photograph_tile(rng, photograph, width, height)
    share = _shares(kind, rng, width, height)[..., None]
    first, second = (np.array(color, np.float32) for color in colors)
    return np.rint(first + (second - first) * share).astype(np.uint8)


def _shares(kind: str, rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """How much of the second colour each pixel of a tile has, [2 height, 2 width], 0 to 1."""
    y = (np.arange(2 * height, dtype=np.float32) / (2 * height))[:, None]
    x = (np.arange(2 * width, dtype=np.float32) / (2 * width))[None]
    phase = rng.random()
    if kind == "gradient":
        right, down = ((1, 0), (0, 1), (1, 1), (1, -1))[rng.integers(4)]
        return (0.5 - 0.5 * np.cos(2 * np.pi * (right * x + down * y + phase))).astype(np.float32)
    if kind == "stripes":
        right, down = int(rng.integers(-12, 13)), int(rng.integers(3, 13))
        wave = 0.5 + np.sin(2 * np.pi * (right * x + down * y + phase)) * rng.choice((0.5, 2.0))
        return np.clip(wave, 0, 1).astype(np.float32)
    if kind == "checker":
        across, along = 2 * rng.integers(2, 9), 2 * rng.integers(2, 9)
        return ((np.floor(across * x + phase) + np.floor(along * y + phase)) % 2).astype(np.float32)
    assert kind == "blobs", f"{kind} has no shares"
    coarse, fine = int(rng.integers(4, 10)), int(rng.integers(12, 28))
    noise = 0.7 * _value_noise(rng, coarse, width, height) + 0.3 * _value_noise(rng, fine, width, height)
    return np.clip(0.5 + (noise - 0.5) * rng.uniform(1.2, 3.0), 0, 1).astype(np.float32)


def _value_noise(rng: np.random.Generator, cells: int, width: int, height: int) -> NDArray[np.float32]:
    """Random levels on a grid of `cells` cells that repeats, smooth between; [2 height, 2 width]."""
    grid = np.pad(rng.random((cells, cells), np.float32), 1, mode="wrap")
    box = (1.0, 1.0, cells + 1.0, cells + 1.0)
    smooth = Image.fromarray(grid).resize((2 * width, 2 * height), Image.Resampling.BICUBIC, box)
    return np.asarray(smooth)


def _photograph_tile(rng: np.random.Generator, item: tuple[str, str], width: int, height: int) -> Pixels:
    """A part of a photograph, darkened, with its mirror images beside and below."""
    picture = _photograph(*item)
    zoom = rng.uniform(0.45, 1.0) * min(picture.width / width, picture.height / height)
    part_width, part_height = zoom * width, zoom * height
    left, top = rng.random() * (picture.width - part_width), rng.random() * (picture.height - part_height)
    part = picture.resize((width, height), Image.Resampling.BILINEAR, (left, top, left + part_width, top + part_height))
    levels = np.asarray(part, np.float32)
    gray = levels.mean(axis=-1, keepdims=True)
    # Paler and darker than the picture is: objects must stay the most colourful things of the scene.
    levels = DARKEST + (gray + (levels - gray) * rng.uniform(0.3, 0.8)) * rng.uniform(0.25, 0.45)
    quarter = np.clip(np.rint(levels), DARKEST, BRIGHTEST).astype(np.uint8)
    half = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return np.concatenate([half, half[::-1]], axis=0)


@lru_cache(maxsize=64)
def _photograph_path(package: str, path: str) -> Path | None:
    """Where a photograph lies, without importing its package; None where it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / path
    return file if file.is_file() else None


@lru_cache(maxsize=32)
def _photograph(package: str, path: str) -> Image.Image:
    file = _photograph_path(package, path)
    assert file is not None, "only installed photographs are picked"
    with Image.open(file) as picture:
        picture.draft("RGB", (_PHOTOGRAPH_SIDE, _PHOTOGRAPH_SIDE))
        loaded = picture.convert("RGB")
    loaded.thumbnail((_PHOTOGRAPH_SIDE, _PHOTOGRAPH_SIDE))
    return loaded
