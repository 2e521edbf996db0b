"""Frames that are decoded while the first are used: the same patches as all at once, in bounded memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.data.frameforge import make_clip, write_mp4
from keye.errors import MediaError
from keye.media.frame_stream import FileReader, FrameShape
from keye.media.pixels.patches import Pixels, VisionInput
from keye.media.processor import Processor
from keye.media.source.fetch import Source, fetch_source
from keye.media.video import DecodeLimits, VideoReader, plan_video

FRAME = np.zeros((28, 28, 3), dtype=np.uint8)
CONFIG = ProcessorConfig.of("2.0", video_min_tokens=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return fetch_source(path)


@pytest.mark.parametrize("release", ["preview", "1.5", "2.0"])
def test_a_stream_gives_what_the_whole_gives(source: Source, release: Any) -> None:
    processor = Processor(ProcessorConfig.of(release, video_min_tokens=4))
    full, streamed = processor.video(source), processor.video_stream(source)
    assert streamed.pieces == full.pieces and streamed.plan == full.plan
    assert streamed.timestamps == full.timestamps and streamed.second_per_grid == full.second_per_grid
    assert np.array_equal(streamed.grid_thw, full.grid_thw)
    for _ in range(2):  # it can be read again
        assert np.array_equal(streamed.vision.pixel_values, full.vision.pixel_values)
    reader = streamed.pixels.open()
    rows = [reader.take(1) for _ in range(len(full.grid_thw))]
    reader.close()
    assert np.array_equal(VisionInput.concatenate(rows).pixel_values, full.vision.pixel_values)


def test_nothing_is_decoded_before_a_stream_is_opened(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Processor(CONFIG).video(source).plan
    monkeypatch.setattr(VideoReader, "__init__", lambda *_, **__: pytest.fail("a worker was started"))
    item = Processor(CONFIG).video_stream(source, plan=plan)  # type: ignore[arg-type]
    assert item.frame_count == 8 and item.visual_tokens == 8 * 16


class Counter:
    """Counts the frames of a stream, and waits for them."""

    def __init__(self) -> None:
        self.count, self.changed = 0, threading.Condition()

    def add(self) -> None:
        with self.changed:
            self.count += 1
            self.changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.count >= count, 60), f"{self.count} of {count} frames"


def endless(source: Source, built: Counter, *, buffer_bytes: int) -> FileReader:
    """A reader whose frames never end; `built` counts them."""

    def frames(_: VideoReader) -> Iterator[Pixels]:
        while True:
            built.add()
            yield FRAME

    shape = FrameShape([(28, 28)] * 100, CONFIG)
    return FileReader(source, DecodeLimits(), frames, shape, buffer_bytes=buffer_bytes)


def test_decoding_waits_for_encoding(source: Source) -> None:
    built = Counter()
    reader = endless(source, built, buffer_bytes=3 * FRAME.nbytes)
    built.wait_for(4)  # three wait, the next is in the thread's hand
    assert reader.has(3) and built.count == 4
    reader.take(2)
    built.wait_for(6)
    assert reader.has(3) and built.count == 6
    reader.has(10)  # who asks for more than the limit gets it
    built.wait_for(13)
    assert reader.has(10) and built.count == 13
    assert len(reader.take(10).grid_thw) == 10
    reader.close()


def test_closing_ends_worker_and_thread(source: Source) -> None:
    reader = endless(source, Counter(), buffer_bytes=FRAME.nbytes)
    worker, thread = reader.video.worker.process, reader.thread
    reader.close()
    reader.close()
    assert worker.poll() is not None and not thread.is_alive()


def test_an_unreferenced_reader_ends(source: Source) -> None:
    reader = endless(source, Counter(), buffer_bytes=FRAME.nbytes)
    worker, thread = reader.video.worker.process, reader.thread
    del reader
    thread.join()
    assert worker.poll() is not None


def test_closing_does_not_wait_for_a_worker_that_hangs(source: Source) -> None:
    """A worker that was stopped gives no frame, and neither thread nor worker is left after closing."""
    plan = plan_video(source, CONFIG)
    reached, yielded = threading.Event(), list[Pixels]()

    def frames(video: VideoReader) -> Iterator[Pixels]:
        assert video.info.frame_count == 8
        video.worker.process.send_signal(signal.SIGSTOP)
        reached.set()
        for frame in video.frames(plan):
            yielded.append(frame)
            yield frame

    reader = FileReader(source, DecodeLimits(), frames, FrameShape([(28, 28)], CONFIG))
    assert reached.wait(60)
    assert not reader.has(1)
    worker, thread = reader.video.worker.process, reader.thread
    reader.close()
    assert worker.poll() is not None and not thread.is_alive() and yielded == []


def test_faults_of_a_file_are_reported_when_its_frames_are_taken(tmp_path: Path, source: Source) -> None:
    assert source.path is not None
    plan = Processor(CONFIG).video(source).plan
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(source.path.read_bytes()[:3000])
    item = Processor(CONFIG).video_stream(fetch_source(broken), MediaOptions(), plan=plan)  # type: ignore[arg-type]
    reader = item.pixels.open()
    with pytest.raises(MediaError, match=r"broken.mp4 "):
        reader.take(1)
    reader.close()
