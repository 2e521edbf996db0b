"""Real files in, exact frames and timestamps out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError, MediaError
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan
from keye.media.source.fetch import fetch_source
from keye.media.video import DecodeLimits, VideoReader, iter_frames, plan_video, probe
from tests.support.clips import coded_frame, read_code, rotate_mp4, trim_mp4, write_clip, write_sound

CONFIG = ProcessorConfig(video_min_tokens=16, video_max_tokens=60)


def sample(path: Path, **options: object) -> tuple[VideoInfo, VideoPlan, list[int]]:
    """Info, plan and the number shown by each sampled frame."""
    with VideoReader(fetch_source(path)) as reader:
        plan = reader.plan(CONFIG, MediaOptions(**options))  # type: ignore[arg-type]
        frames = reader.read(plan)
    assert frames.shape == (plan.frames, plan.height, plan.width, 3)
    return reader.info, plan, [read_code(frame) for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("clip.mp4", "libx264", "yuv420p"),
        ("clip.mkv", "libx264", "yuv420p"),
        ("clip.webm", "libvpx-vp9", "yuv420p"),
        ("clip.avi", "mpeg4", "yuv420p"),
        ("clip.ts", "libx264", "yuv420p"),
        ("clip.mpg", "mpeg2video", "yuv420p"),
        ("clip.mov", "libx265", "yuv420p"),
        ("av1.mp4", "libsvtav1", "yuv420p"),
        ("clip.gif", "gif", "rgb8"),
    ],
)
def test_containers(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    fps = 25 if name.endswith((".mpg", ".gif")) else 30
    info, plan, codes = sample(write_clip(tmp_path / name, codec=codec, pix_fmt=pix_fmt, fps=fps), fps=4)
    assert info.frame_count == 60
    assert info.constant_rate
    assert (info.width, info.height) == (160, 96)
    assert codes == list(plan.frame_indices)
    assert plan.timestamps == pytest.approx([i / fps for i in plan.frame_indices], abs=1.1e-3)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:bframes=4:keyint=12:min-keyint=12:scenecut=0"}),
        ("libx265", {"x265-params": "open-gop=1:bframes=4:keyint=12:min-keyint=12:scenecut=0:log-level=none"}),
    ],
)
def test_open_groups_of_pictures(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    """Frames that are shown before the keyframe they come after need the group before it."""
    path = write_clip(tmp_path / "clip.mkv", frames=120, codec=codec, options=options)
    for start in (0.0, 0.9, 1.3, 2.0):
        _, plan, codes = sample(path, fps=6, video_start=start)
        assert codes == list(plan.frame_indices)


def test_edit_list(tmp_path: Path) -> None:
    """A file that is cut by its edit list begins with the first frame that a player shows."""
    path = trim_mp4(write_clip(tmp_path / "clip.mp4", options={"bf": "0"}, gop=60), 20)
    info, plan, codes = sample(path, fps=4)
    assert info.frame_count == 40
    assert codes == [index + 20 for index in plan.frame_indices]
    assert plan.timestamps[0] == 0.0
    assert plan.timestamps == pytest.approx([i / 30 for i in plan.frame_indices], abs=1e-6)


def test_official_indices(tmp_path: Path) -> None:
    info, plan, _ = sample(write_clip(tmp_path / "clip.mp4"))
    assert plan.frame_indices == (0, 20, 39, 59)
    assert (plan.duration, plan.native_fps) == (2.0, 30.0)
    assert plan.visual_tokens == 4 * plan.tokens_per_frame == 4 * (plan.width // 28) * (plan.height // 28)
    assert plan.to_dict()["timestamps"] == list(plan.timestamps)
    assert info.to_dict()["frame_count"] == 60


def test_start_of_the_container_is_zero(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.ts", container_options={"output_ts_offset": "12.5"})
    info, plan, codes = sample(path)
    assert float(info.pts[0] * info.time_base) > 12
    assert info.start_offset == plan.timestamps[0] == 0.0
    assert codes == list(plan.frame_indices)


def test_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    # 30 frames in the first second, then one frame each half second for ten seconds.
    times = [i * 33 for i in range(30)] + [1000 + 500 * i for i in range(20)]
    info, plan, codes = sample(write_clip(tmp_path / "clip.mkv", frames=50, times_ms=times), fps=1)
    assert not info.constant_rate
    assert info.fps == pytest.approx(49 / 10.5)
    assert codes == list(plan.frame_indices)
    assert plan.timestamps == pytest.approx([times[i] / 1000 for i in plan.frame_indices])
    gaps = np.diff(plan.timestamps)
    assert gaps.min() > 0.4
    assert gaps.max() < 1.6


@pytest.mark.parametrize("last", [100, 5000])
def test_the_last_frame_lasts_as_long_as_the_container_says(tmp_path: Path, last: int) -> None:
    frames = [Image.fromarray(coded_frame(i)) for i in range(6)]
    times = [100, 100, 900, 100, 100, last]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=times)
    info = probe(fetch_source(tmp_path / "a.gif"))
    assert not info.constant_rate
    assert info.duration == pytest.approx(sum(times) / 1000)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_applied(tmp_path: Path, turns: int) -> None:
    path = write_clip(tmp_path / "clip.mp4")
    upright = np.stack(list(iter_frames(plan := plan_video(fetch_source(path), CONFIG), path)))
    rotate_mp4(path, turns)
    info = probe(fetch_source(path))
    turned_plan = plan_video(fetch_source(path), CONFIG)
    turned = np.stack(list(iter_frames(turned_plan, path)))
    assert (info.width, info.height) == ((96, 160) if turns % 2 else (160, 96))
    assert (turned_plan.width, turned_plan.height) == (
        (plan.height, plan.width) if turns % 2 else (plan.width, plan.height)
    )
    back = np.rot90(turned, turns, axes=(1, 2))  # the file asks for clockwise turns
    assert np.abs(back.astype(int) - upright).max() <= 2


@pytest.mark.parametrize(
    "encoder",
    [
        {},
        {"bf": "3", "b_strategy": "2"},
        {"x264-params": "open-gop=1:bframes=4:b-pyramid=normal"},
        {"tune": "zerolatency"},
    ],
)
def test_frames_equal_a_full_decode(tmp_path: Path, encoder: dict[str, str]) -> None:
    """Leaving out frames and groups of pictures that were not asked for changes no pixel."""
    path = write_clip(tmp_path / "clip.mp4", frames=200, gop=12, options=encoder)
    with av.open(str(path)) as container:
        every = list(container.decode(container.streams.video[0]))
    for limits in (DecodeLimits(threads=1), DecodeLimits(threads=2)):
        for nframes in (3, 40):
            with VideoReader(fetch_source(path), limits) as reader:
                plan = reader.plan(CONFIG, MediaOptions(nframes=nframes))
                frames = reader.read(plan)
            for index, frame in zip(plan.frame_indices, frames, strict=True):
                expected = every[index].to_ndarray(
                    width=plan.width, height=plan.height, format="rgb24", interpolation="BICUBIC"
                )
                assert np.array_equal(frame, expected), (nframes, index)


def test_range_and_counts(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=120)
    _, plan, codes = sample(path, video_start=1.0, video_end=3.0)
    assert codes == list(plan.frame_indices)
    assert (plan.frame_indices[0], plan.frame_indices[-1]) == (30, 90)
    assert sample(path, nframes=5)[1].frames == 5
    assert sample(path, max_frames=3)[1].frames == 3
    assert sample(path, fps=1000)[1].frames == 120
    assert sample(path, video_total_pixels=16 * 784 * 6)[1].frames == 6
    source = fetch_source(path)
    with pytest.raises(KeyeError, match="^video_end=1 lies before video_start=3; swap them or leave one out$"):
        plan_video(source, CONFIG, MediaOptions(video_start=3.0, video_end=1.0))
    with pytest.raises(KeyeError, match="exclude each other"):
        plan_video(source, CONFIG, MediaOptions(fps=1, nframes=3))
    with pytest.raises(KeyeError, match="fps is -1"):
        plan_video(source, CONFIG, MediaOptions(fps=-1))


def test_one_frame(tmp_path: Path) -> None:
    _, plan, codes = sample(write_clip(tmp_path / "clip.mp4", frames=1))
    assert codes == [0]
    assert plan.timestamps == (0.0,)


def test_bytes_and_several_plans(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "clip.mp4").read_bytes()
    with VideoReader(fetch_source(data)) as reader:
        for nframes in (7, 3):
            plan = reader.plan(CONFIG, MediaOptions(nframes=nframes))
            assert [read_code(frame) for frame in reader.read(plan)] == list(plan.frame_indices)


def test_closing_the_iterator_ends_the_worker(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4"))
    plan = plan_video(source, CONFIG)
    frames = iter_frames(plan, source)
    assert read_code(next(frames)) == 0
    frames.close()
    with pytest.raises(StopIteration):
        next(frames)
    with VideoReader(source) as reader:
        process = reader.worker.process
    assert process.poll() is not None


def test_a_reader_that_does_not_wait_for_the_scan(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4"))
    plan = plan_video(source, CONFIG)
    with VideoReader(source, wait=False) as reader:
        assert read_code(next(reader.frames(plan))) == 0
        assert reader.info.frame_count == 60
    with VideoReader(source, wait=False) as reader:
        reader.stop()
        with pytest.raises(MediaError, match="reading of clip.mp4 was stopped"):
            next(reader.frames(plan))


def test_sound_longer_than_pictures_is_not_truncated(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        audio = container.add_stream("aac", rate=16000)
        assert isinstance(audio, av.AudioStream)
        audio.layout = "mono"
        for index in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")))
        for start in range(0, 64000, 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, start
            container.mux(audio.encode(sound))
        container.mux(video.encode())
        container.mux(audio.encode())
    info, plan, codes = sample(path)
    assert not info.cut_short
    assert codes == list(plan.frame_indices)


def _bad_file(kind: str, folder: Path) -> Path:
    path = folder / "bad.mp4"
    if kind == "missing":
        return path
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("a shopping list\n" * 100)
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes())
    elif kind == "no index":
        data = write_clip(path).read_bytes()
        path.write_bytes(data[: data.index(b"moov") - 4])
    elif kind == "sound":
        write_sound(path)
    elif kind == "playlist":
        clip = write_clip(folder / "real.ts")
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{clip}\n#EXT-X-ENDLIST\n")
    elif kind == "concat":
        clip = write_clip(folder / "real.mp4")
        path.write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("directory", "is a directory"),
        ("empty", "is empty"),
        ("text", "is a text file, which is not read"),
        ("garbage", "is not a video that can be read"),
        ("no index", "is not a video that can be read"),
        ("sound", "has no video stream"),
        ("playlist", "is a playlist, which is not read; give the video itself"),
        ("concat", "is a playlist, which is not read; give the video itself"),
    ],
)
def test_bad_files(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        probe(fetch_source(_bad_file(kind, tmp_path)))
    assert "bad.mp4" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4", frames=30, size=(1280, 720)))
    with pytest.raises(MediaError, match="1280x720 pixels, more than the limit"):
        probe(source, DecodeLimits(frame_pixels=100_000))
    with pytest.raises(MediaError, match="memory"):
        probe(source, DecodeLimits(memory_bytes=80 * 1024**2))
    with pytest.raises(MediaError, match="took more than 0 s"):
        probe(source, DecodeLimits(wait_seconds=0.0))
    with pytest.raises(MediaError, match="more than the limit of"):
        probe(source, DecodeLimits(file_bytes=100))


def test_worker_imports_no_numpy_and_no_torch() -> None:
    code = "import keye.media.decode.video_worker, sys; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
