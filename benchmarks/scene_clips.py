"""Shots with known content for `benchmarks.scenes`: pictures that stand still, move, flash, fade and dissolve.

A shot is an iterator of pictures, uint8 RGB [height, width, 3], without a hard cut inside. `MOTIONS` has the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]
Rng = np.random.Generator
#: Makes a shot of a number of pictures of (width, height).
Shot = Callable[[Rng, int, tuple[int, int]], Iterator[Picture]]


def photo(rng: Rng, width: int, height: int, *, levels: tuple[float, float] | None = None) -> Picture:
    """A picture with the spectrum of photographs (amplitude 1 / frequency), in colours of its own. `levels` are the
    darkest and the brightest."""
    fx, fy = np.meshgrid(np.fft.rfftfreq(width) * width, np.fft.fftfreq(height) * height)
    amplitude = 1 / np.maximum(np.hypot(fx, fy), 1) ** rng.uniform(1.0, 1.5)
    fields = []
    for _ in range(3):
        spectrum = amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape))
        field = np.fft.irfft2(spectrum, s=(height, width))
        fields.append((field - field.mean()) / field.std())
    mix = np.eye(3) * 0.35 + 0.65 * np.array([[1, 0, 0]] * 3)  # luma dominates, as in photographs
    mixed = np.einsum("ij,jhw->hwi", mix, np.stack(fields))
    low, high = levels or sorted(rng.uniform((0, 150), (90, 255)))
    tint = rng.uniform(0.7, 1.0, 3)
    unit = np.clip(mixed / 4 + 0.5, 0, 1)
    return np.rint((low + (high - low) * unit) * tint).astype(np.uint8)


def drawing(rng: Rng, width: int, height: int, count: int = 6) -> Picture:
    """Shapes on a plain ground, as in FrameForge clips."""
    image = Image.new("RGB", (width, height), color(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x, y, side = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.1, 0.35) * height
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - side, y - side, x + side, y + side), fill=color(rng))
    return np.asarray(image)


def color(rng: Rng) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def view(world: Image.Image, size: tuple[int, int], x: float, y: float, zoom: float = 1, turn: float = 0) -> Picture:
    """What a camera sees that looks at (x, y) of `world`."""
    width, height = size
    cos, sin = math.cos(turn) / zoom, math.sin(turn) / zoom
    matrix = (cos, -sin, x - cos * width / 2 + sin * height / 2, sin, cos, y - sin * width / 2 - cos * height / 2)
    return np.asarray(world.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def world_of(rng: Rng, size: tuple[int, int], scale: int) -> Image.Image:
    make = photo if rng.random() < 0.7 else lambda r, w, h: drawing(r, w, h, 20 * scale)
    return Image.fromarray(make(rng, size[0] * scale, size[1] * scale))


def still(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    picture = np.asarray(world_of(rng, size, 1))
    for _ in range(count):
        yield picture


def pan(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A pan to and fro, at up to a tenth of the picture a frame."""
    world = world_of(rng, size, 4)
    speed, turn = rng.uniform(0.01, 0.1) * size[0], rng.uniform(0, 2 * math.pi)
    sweep = 1.4 * min(size) / speed  # frames from one end to the other
    for i in range(count):
        at = 1.4 * min(size) * math.sin(i / sweep)
        yield view(world, size, 2 * size[0] + at * math.cos(turn), 2 * size[1] + at * math.sin(turn))


def whip(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A camera that stands, and turns fast now and then, with blur of motion."""
    world, period = world_of(rng, size, 4), 30
    x = 0.0
    for i in range(count):
        step = 0.09 * size[0] * max(0.0, math.sin(2 * math.pi * i / period)) * (1 if i // period % 2 else -1)
        seen = [view(world, size, 2 * size[0] + x + step * part, 2 * size[1]) for part in (0, 0.25, 0.5, 0.75)]
        yield np.uint8(np.mean(seen, 0))
        x += step


def zoom(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    world, rate = world_of(rng, size, 2), rng.uniform(0.002, 0.03)
    for i in range(count):
        yield view(world, size, size[0], size[1], math.exp(0.7 * (1 + math.sin(i * rate))))


def spin(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    world, speed = world_of(rng, size, 3), rng.uniform(0.02, 0.12)
    for i in range(count):
        yield view(world, size, 1.5 * size[0], 1.5 * size[1], 1, i * speed)


def shake(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    world = world_of(rng, size, 2)
    for _ in range(count):
        dx, dy = rng.normal(0, 0.02 * size[1], 2)
        yield view(world, size, size[0] + dx, size[1] + dy, 1, rng.normal(0, 0.01))


def noise(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A still picture under strong noise of the sensor."""
    picture = photo(rng, *size).astype(np.float32)
    for _ in range(count):
        yield np.uint8(np.clip(picture + rng.normal(0, 25, (*picture.shape[:2], 1)), 0, 255))


def static(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A television without a station."""
    coarse = max(1, size[1] // 60)
    for _ in range(count):
        grain = rng.integers(0, 256, (-(-size[1] // coarse), -(-size[0] // coarse), 1)).astype(np.uint8)
        yield np.repeat(grain.repeat(coarse, 0).repeat(coarse, 1)[: size[1], : size[0]], 3, 2)


def texture(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """Stripes and checks that move at any speed."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    (fx, fy), (vx, vy) = rng.uniform(0.05, 0.6, 2), rng.uniform(-1.2, 1.2, 2)
    ground, front = np.array(color(rng)), np.array(color(rng))
    for i in range(count):
        wave = np.sin(fx * x + vx * i) * np.sin(fy * y + vy * i)
        wave = (np.sign(wave) if vx > 0 else wave)[..., None]
        yield np.uint8(ground + (front - ground) * (wave + 1) / 2)


def water(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 6, size[1]))
    waves = rng.uniform(-3, 3, (8, 3))
    tint = np.array(color(rng)) / 2 + 64
    for i in range(count):
        field = sum(np.sin(a * x + b * y + c * i / 6) for a, b, c in waves) / 8
        yield np.uint8(np.clip(tint + 120 * field[..., None], 0, 255))


def crossing(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """Something as large as the picture passes close to the camera, in eight frames or more."""
    background, period = np.asarray(world_of(rng, size, 1)), 40
    front = photo(rng, size[0], size[1])
    steps = int(rng.integers(8, 24))
    for i in range(count):
        left = round(size[0] * (2 * (i % period) / steps - 1)) if i % period <= steps else 2 * size[0]
        picture = background.copy()
        if (a := max(left, 0)) < (b := min(left + size[0], size[0])):
            picture[:, a:b] = front[:, a - left : b - left]
        yield picture


def shapes(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """Shapes that bounce, appear and go."""
    places, speeds = rng.uniform(0, 1, (8, 2)), rng.normal(0, 0.02, (8, 2))
    colors, ground = [color(rng) for _ in places], color(rng)
    for i in range(count):
        image = Image.new("RGB", size, ground)
        draw = ImageDraw.Draw(image)
        for n, fill in enumerate(colors):
            if (i + 13 * n) % 70 < 50:
                x, y = np.abs((places[n] + i * speeds[n]) % 2 - 1) * size
                side = 0.12 * size[1]
                draw.ellipse((x - side, y - side, x + side, y + side), fill=fill)
        yield np.asarray(image)


def flash(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """Lights of photographers, one to three frames long, and a lightning that decays."""
    frames = shake(rng, count, size) if rng.random() < 0.5 else still(rng, count, size)
    left, height = 0, 0.0
    for i, picture in enumerate(frames):
        if i % 23 == 11:
            left, height = int(rng.integers(1, 4)), rng.uniform(0.5, 1.0)
        lit = height if left > 0 else (height * 0.6**-left if i % 46 > 23 else 0)
        left -= 1
        yield np.uint8(np.clip(picture + lit * 1.2 * (255 - picture * 0.4), 0, 255))


def flicker(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A picture under light that changes from frame to frame."""
    picture = photo(rng, *size)
    for _ in range(count):
        yield np.uint8(picture * rng.uniform(0.6, 1.0))


def fade(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """To black or white and back, in half a second to two seconds."""
    frames = list(pan(rng, count, size)) if rng.random() < 0.5 else list(still(rng, count, size))
    ground, length = float(rng.choice([0, 255])), int(rng.integers(12, 50))
    for i, picture in enumerate(frames):
        share = abs((i / length) % 2 - 1)
        yield np.uint8(picture * share + ground * (1 - share))


def dissolve(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """Pictures that become others, in half a second to two seconds."""
    length, now, after = int(rng.integers(12, 50)), photo(rng, *size), photo(rng, *size)
    for i in range(count):
        share = min(1.0, 2 * (i % length) / length)
        yield np.uint8(now * (1 - share) + after * share)
        if i % length == length - 1:
            now, after = after, photo(rng, *size)


def halved(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A pan at half or a quarter of the frame rate, as of drawn films: frames are repeated."""
    repeat = int(rng.choice([2, 4]))
    for picture in pan(rng, -(-count // repeat), size):
        yield from [picture] * repeat


def titles(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A pan with captions that appear and go, and a corner picture."""
    for i, picture in enumerate(pan(rng, count, size)):
        image = Image.fromarray(picture)
        draw = ImageDraw.Draw(image)
        if i % 50 < 30:
            draw.rectangle((0.1 * size[0], 0.8 * size[1], 0.9 * size[0], 0.95 * size[1]), fill=(0, 0, 0))
            draw.rectangle((0.15 * size[0], 0.84 * size[1], 0.8 * size[0], 0.91 * size[1]), fill=(255, 255, 255))
        if i % 70 < 35:
            draw.rectangle((0.65 * size[0], 0, size[0], 0.35 * size[1]), fill=(30, 90, 200))
        yield np.asarray(image)


def confetti(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    background = photo(rng, *size)
    places, speed = rng.uniform(0, 1, (150, 2)), rng.uniform(0.01, 0.05, 150)
    colors = rng.integers(0, 256, (150, 3))
    for _ in range(count):
        picture = background.copy()
        places[:, 1] = (places[:, 1] + speed) % 1
        places[:, 0] = (places[:, 0] + rng.normal(0, 0.01, 150)) % 1
        side = max(2, size[1] // 40)
        for (x, y), fill in zip(places * (size[0] - side, size[1] - side), colors, strict=True):
            picture[int(y) : int(y) + side, int(x) : int(x) + side] = fill
        yield picture


def dark(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A night scene, with noise."""
    picture = photo(rng, *size, levels=(2, 40)).astype(np.float32)
    for _ in range(count):
        yield np.uint8(np.clip(picture + rng.normal(0, 3, (*picture.shape[:2], 1)), 0, 255))


def pale(rng: Rng, count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """Fog: little contrast."""
    base = rng.uniform(120, 180)
    world = Image.fromarray(photo(rng, 2 * size[0], size[1], levels=(base, base + 35)))
    for i in range(count):
        yield view(world, size, size[0] + 0.4 * size[0] * math.sin(i / 60), size[1] / 2)


MOTIONS: dict[str, Shot] = {
    shot.__name__: shot
    for shot in (still, pan, whip, zoom, spin, shake, noise, static, texture, water, crossing, shapes, flash, flicker,
                 fade, dissolve, halved, titles, confetti, dark, pale)
}  # fmt: skip
