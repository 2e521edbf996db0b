"""Frame counts, places and sizes: official values and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.config import ProcessorConfig, load_processor_config
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.hub import asset
from keye.media import sampling, sizes
from keye.releases.base import find_tokens_per_frame

CONFIG = ProcessorConfig()
SIDES = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("height", "width", "low", "high", "expected"),
    [
        (141, 1074, 3136, 16056320, (140, 1064)),
        (9, 74, 3136, 16056320, (28, 168)),
        (60, 27, 50176, 50176, (336, 168)),
        (38, 7600, 3136, 16056320, (28, 7588)),
        (1574, 81, 50176, 100352, (1372, 56)),
    ],
)
def test_smart_resize_official_values(height: int, width: int, low: int, high: int, expected: tuple[int, int]) -> None:
    assert sizes.smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high) == expected


@pytest.mark.parametrize("size", [(8, 1608), (1, 284), (0, 5)])
def test_smart_resize_refuses(size: tuple[int, int]) -> None:
    with pytest.raises(KeyeError):
        sizes.smart_resize(*size, factor=28, min_pixels=3136, max_pixels=16056320)


@given(SIDES, SIDES, st.integers(1, 400), st.integers(0, 4000))
def test_smart_resize_properties(height: int, width: int, low_tokens: int, extra: int) -> None:
    if max(height, width) / min(height, width) > sizes.MAX_ASPECT_RATIO:
        return
    low, high = low_tokens * 784, (low_tokens + extra) * 784
    h, w = sizes.smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
    assert h % 28 == w % 28 == 0
    assert min(h, w) >= 28
    assert h * w >= low or h * w <= high


@pytest.mark.parametrize(
    ("total", "native", "options", "expected"),
    [
        (53264, 30.0, {"fps": 8, "max_frames": 5000}, 2880),
        (1, 0.5, {"fps": 60, "min_frames": 2}, 1),
        (38, 74.01101357435893, {"fps": 60, "min_frames": 4}, 30),
        (152227, 23.976, {"fps": 4, "max_frames": 5000, "video_total_pixels": 75834902.13810265}, 1511),
        (92157, 60.0, {"fps": 60, "video_total_pixels": 784000}, 15),
    ],
)
def test_smart_nframes_official_values(total: int, native: float, options: dict[str, float], expected: int) -> None:
    assert sampling.smart_nframes(total, native, CONFIG, MediaOptions(**options)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "options", "frames"),
    [
        (64, MediaOptions(), 128),
        (300, MediaOptions(), 256),
        (3600, MediaOptions(), 256),
        (300, MediaOptions(fps=1), 256),
        (300, MediaOptions(max_frames=600), 600),
        (300, MediaOptions(max_frames=100), 100),
        (300, MediaOptions(nframes=500), 500),
        (300, MediaOptions(nframes=5000), 1024),  # all that the budget holds
        (300, MediaOptions(nframes=500, strict_official=True), 256),
        (3600, MediaOptions(min_frames=300), 300),
    ],
)
def test_a_configuration_limits_frames_unless_a_request_names_their_number(
    seconds: int, options: MediaOptions, frames: int
) -> None:
    config = load_processor_config(asset("nano"))
    assert sampling.smart_nframes(30 * seconds, 30.0, config, options) == frames


@pytest.mark.parametrize(
    ("height", "width", "tokens"), [(1080, 1920, 15), (1920, 1080, 15), (448, 448, 16), (480, 640, 12)]
)
@pytest.mark.parametrize("seconds", [8, 128, 300, 3600])
def test_frames_of_long_videos_of_keye_nano_keep_their_pixels(
    height: int, width: int, tokens: int, seconds: int
) -> None:
    config = load_processor_config(asset("nano"))
    frames = sampling.smart_nframes(30 * seconds, 30.0, config)
    h, w = sizes.compute_frame_sizes(height, width, frames, config).slow
    assert h * w == tokens * config.token_pixels and frames * tokens <= config.video_total_tokens


@given(st.integers(1, 200_000), st.integers(1, 2880))
def test_sample_indices_spread_over_the_range(total: int, count: int) -> None:
    count = min(count, total)
    indices = sampling.sample_indices(0, total - 1, count)
    assert len(set(indices)) == count
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert count == 1 or indices[-1] == total - 1


def test_sample_indices_equal_torch() -> None:
    torch = pytest.importorskip("torch")
    for first, last, count in [(0, 59, 5), (0, 53602, 1954), (0, 184885, 1129), (30, 90, 7), (0, 8643, 2690)]:
        assert sampling.sample_indices(first, last, count) == torch.linspace(first, last, count).round().long().tolist()


@pytest.mark.parametrize(
    ("total", "fps", "start", "end", "expected"),
    [
        (2, 25.0, None, 0.08, (0, 1, 2)),
        (869, 25.0, 1.3605613992099672, None, (35, 868, 834)),
        (7, 5.0, None, None, (0, 6, 7)),
    ],
)
def test_frame_range(
    total: int, fps: float, start: float | None, end: float | None, expected: tuple[int, int, int]
) -> None:
    assert sampling.find_frame_range(total, fps, video_start=start, video_end=end) == expected


def test_frame_range_refuses() -> None:
    for total, fps, start, end in [
        (0, 30.0, None, None),
        (5, 0.0, None, None),
        (31, 24.0, None, 0.0),
        (1, 30.0, 5.0, 15.0),
    ]:
        with pytest.raises(KeyeError):
            sampling.find_frame_range(total, fps, video_start=start, video_end=end)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 3, 4)),
        (12.0, 18.0, (1, 1, 1)),
        (12.0, 22.0, (1, 2, 2)),
        (10.0, 20.0, (1, 2, 2)),
        (10.0004, 19.9, (1, 1, 1)),
        (9.9995, None, (1, 3, 3)),
        (0.0, 7.0, (0, 0, 1)),
        (39.0, 80.0, (3, 3, 1)),
        (-5.0, 5.0, (0, 0, 1)),
        (15.0, 15.0, (1, 1, 1)),
    ],
)
def test_time_range_is_what_is_on_display(
    start: float | None, end: float | None, expected: tuple[int, int, int]
) -> None:
    times = (5.0, 10.0, 20.0, 30.0)
    assert sampling.find_time_range(times, 40.0, video_start=start, video_end=end) == expected


@pytest.mark.parametrize(
    ("start", "end", "sentence"),
    [
        (8.0, 3.0, "video_end=3 lies before video_start=8; swap them or leave one out"),
        (40.0, None, "video_start=40 lies after the end of the video at 40.00 s; choose an earlier time"),
        (
            0.0,
            3.0,
            "video_end=3 lies before the first frame of the video, which is shown at 5.00 s; choose a later time",
        ),
    ],
)
def test_time_range_says_what_is_wrong(start: float | None, end: float | None, sentence: str) -> None:
    with pytest.raises(KeyeError) as error:
        sampling.find_time_range((5.0, 10.0, 20.0, 30.0), 40.0, video_start=start, video_end=end)
    assert str(error.value) == sentence


@given(
    st.lists(st.floats(0, 3600), min_size=2, max_size=200, unique=True).map(sorted),
    st.lists(st.floats(0, 3600), min_size=1, max_size=50).map(sorted),
)
def test_displayed_frames(timestamps: list[float], targets: list[float]) -> None:
    chosen = sampling.find_displayed_frames(timestamps, targets, tolerance=0.0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= len(targets)
    for target in targets:
        displayed = [t for t in timestamps if t <= target]
        if displayed:
            assert timestamps.index(displayed[-1]) in chosen


@given(st.integers(1, 2880), st.integers(1, 400), st.integers(0, 400), st.integers(1, 200_000))
def test_tokens_per_frame_is_at_most_one_over_the_budget(frames: int, low: int, extra: int, budget: int) -> None:
    high = low + extra
    result = find_tokens_per_frame(frames, low, high, budget)
    assert low <= result <= high
    assert frames * (result - 1) <= budget or result == low
    # The official off-by-one: the first number above the budget, unless the limit of a frame comes first.
    assert result == high or frames * result > budget


def test_budget_of_several_and_short_videos() -> None:
    def budget(duration: float, count: int = 1, total: float | None = None, adaptive: bool | None = None) -> float:
        options = MediaOptions(video_count=count, video_total_pixels=total)
        return sizes.compute_total_pixels(CONFIG, duration, options.replace(adaptive_budget=adaptive))

    assert budget(60.0) == 144506880.0
    assert budget(60.0, count=3) == 48168960.0
    assert budget(259.0, adaptive=True) == pytest.approx(13005619.2)
    assert budget(259.0001, total=1e7, adaptive=True) == 1800000.0
    assert budget(1036.0, count=5, adaptive=True) == 28901376.0


def test_frame_size_official_values() -> None:
    def size(height: int, width: int, frames: int, **options: float) -> sizes.Size:
        return sizes.compute_frame_sizes(height, width, frames, CONFIG, MediaOptions(**options)).slow  # type: ignore[arg-type]

    assert size(60, 96, 30, min_pixels=12544, max_pixels=78400) == (196, 308)
    assert size(100, 96, 2, min_pixels=50176, video_total_pixels=235200) == (252, 224)
    assert sizes.compute_listed_frame_size(120, 50, CONFIG, MediaOptions(max_pixels=50176)) == (364, 168)
    assert size(364, 168, 3, max_pixels=50176) == (308, 140)
