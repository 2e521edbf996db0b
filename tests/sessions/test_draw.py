"""What an answer marks is drawn where it says, legibly, on pictures of any size."""

import numpy as np
import pytest
from PIL import Image

from keye.chat.replies import Region
from keye.sessions.pictures import COLOURS, draw_regions

BOX = Region("box", ((250, 500), (750, 1000)))


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels that differ."""
    ys, xs = np.nonzero((np.asarray(before) != np.asarray(after)).any(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("size", [(400, 200), (1200, 900), (60, 60)])
def test_coordinates_scale_with_the_picture(size: tuple[int, int]) -> None:
    plain = Image.new("RGB", size, "gray")
    drawn = draw_regions(plain, [BOX])
    width, height = size
    left, top, right, bottom = changed(plain, drawn)
    wanted = (width / 4, height / 2, width * 3 / 4, height - 1)
    assert np.allclose((left, top, right, bottom), wanted, atol=max(2, max(size) / 300) + 2)
    assert np.asarray(plain).std() == 0


@pytest.mark.parametrize(
    "region",
    [
        BOX,
        Region("point", ((500, 500),)),
        Region("quad", ((100, 100), (900, 120), (900, 300), (100, 280))),
        Region("polygon", ((0, 0), (1000, 0), (500, 1000))),
    ],
)
def test_every_shape_shows_on_black_and_on_white(region: Region) -> None:
    for ground in ("black", "white"):
        plain = Image.new("RGB", (300, 300), ground)
        assert rgb(COLOURS[0]) in {colour for _, colour in draw_regions(plain, [region]).getcolors(90_000)}


def test_shapes_of_one_label_share_a_colour() -> None:
    dog, cat = {"label": "dog", "label_kind": "object"}, {"label": "cat", "label_kind": "object"}
    regions = [Region("box", ((100 * n, 400), (100 * n + 50, 600)), **who) for n, who in enumerate((dog, cat, dog), 1)]
    drawn = draw_regions(Image.new("RGB", (1000, 1000)), regions)
    assert [drawn.getpixel((100 * n, 500)) for n in (1, 2, 3)] == [rgb(COLOURS[i]) for i in (0, 1, 0)]


@pytest.mark.parametrize("corner", [(0, 0), (990, 0), (0, 990), (990, 990)])
@pytest.mark.parametrize("label", ["a long name of a thing\nin two lines", "狗", "x" * 500])
def test_labels_stay_inside(corner: tuple[int, int], label: str) -> None:
    x, y = corner
    region = Region("box", ((x, y), (x + 10, y + 10)), label=label, label_kind="object")
    bare = draw_regions(Image.new("RGB", (600, 400)), [Region("box", region.points)])
    left, top, right, bottom = changed(bare, draw_regions(Image.new("RGB", (600, 400)), [region]))
    assert right - left >= 8 and bottom - top >= 10
    assert left >= 0 and top >= 0 and right < 600 and bottom < 400


def test_moments_and_mentions_have_no_place() -> None:
    plain = Image.new("L", (50, 50), 7)
    drawn = draw_regions(plain, [Region("clip", interval=(1.0, 2.0)), Region("label", label="x")])
    assert drawn.mode == "RGB" and drawn.getcolors() == [(2500, (7, 7, 7))]
