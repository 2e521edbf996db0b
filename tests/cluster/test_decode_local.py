"""The decode service on processes of this machine: the same bits as in this process, kills, what workers load."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keye
from keye.cluster import decode_reader
from keye.cluster.decode_queue import Priority
from keye.cluster.decode_reader import ServiceDecoder
from keye.cluster.decode_work import CallWork, PlannedFrames, VideoWork
from keye.cluster.pool import LocalWorker, shared_file
from keye.cluster.pool_worker import missing_codecs
from keye.cluster.service import DecodeService, Poisoned, open_service
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.data.frameforge import make_clip, write_mp4
from keye.errors import KeyeError, MediaError
from keye.media.processor import Processor
from keye.media.source.fetch import Source, fetch_source, untrusted

CONFIG = ProcessorConfig.of("2.0", video_min_tokens=4)


@pytest.fixture(scope="module")
def service() -> Iterator[DecodeService]:
    with open_service("local:2") as service:
        yield service


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Short videos, each with other pictures."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        clip = make_clip(number, frames=6 + number, objects=2, start=0.0, step=0.5)
        write_mp4(clip, folder / f"{number}.mp4", (112, 112))
    return [fetch_source(path) for path in sorted(folder.iterdir())]


def complete(source: Source, config: ProcessorConfig = CONFIG, **options: Any) -> PlannedFrames:
    """What this process makes of a video."""
    with Processor(config).decode_video(source, MediaOptions(**options)) as (plan, frames):
        return PlannedFrames(plan, tuple(frames))


def same(matches: PlannedFrames, expected: PlannedFrames) -> bool:
    pairs = zip(matches.frames, expected.frames, strict=True)
    return matches.plan == expected.plan and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("release", ["preview", "1.5", "2.0"])
def test_frames_are_those_of_this_process(service: DecodeService, clips: list[Source], release: Any) -> None:
    config = ProcessorConfig.of(release, video_min_tokens=4)
    for source in clips[:2]:
        expected = complete(source, config, max_frames=5)
        matches = service.submit(VideoWork(source, config, MediaOptions(max_frames=5))).result(60)
        assert same(matches, expected)
        assert not matches.frames[0].flags.writeable
        assert same(service.submit(VideoWork(source, config, MediaOptions(), expected.plan)).result(60), expected)


@pytest.mark.parametrize("release", ["preview", "1.5", "2.0"])
def test_media_are_those_of_this_process(
    service: DecodeService, clips: list[Source], release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a video comes in many parts."""
    monkeypatch.setattr(decode_reader, "FIRST_PART", 100_000)
    monkeypatch.setattr(decode_reader, "LARGEST_PART", 200_000)
    config = ProcessorConfig.of(release, video_min_tokens=4)
    here, there = Processor(config), Processor(config, decoder=ServiceDecoder(service))
    expected = here.video(clips[5])
    for item in (there.video(clips[5]), there.video_stream(clips[5], plan=expected.plan)):  # type: ignore[arg-type]
        assert item.pieces == expected.pieces and item.plan == expected.plan
        assert item.second_per_grid == expected.second_per_grid
        assert np.array_equal(item.grid_thw, expected.grid_thw)
        assert np.array_equal(item.vision.pixel_values, expected.vision.pixel_values)
        assert np.array_equal(item.vision.pixel_values, expected.vision.pixel_values), "it can be read again"
    assert service.gauges()["bytes"] == 0


def test_parts_cover_a_plan_once(clips: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_reader, "FIRST_PART", 100_000)
    monkeypatch.setattr(decode_reader, "LARGEST_PART", 200_000)
    plan = complete(clips[5]).plan
    matches = list(decode_reader.parts(plan))
    assert len(matches) > 2
    assert [i for first, stop in matches for i in range(plan.frames)[first:stop]] == list(range(plan.frames))
    assert list(decode_reader.parts(plan, as_one=True)) == [(0, None)]


def test_a_reader_that_is_closed_leaves_nothing(service: DecodeService, clips: list[Source]) -> None:
    item = Processor(CONFIG, decoder=ServiceDecoder(service)).video_stream(clips[0])
    reader = item.pixels.open()
    reader.close()
    reader.close()
    assert reader.has(1), "a reader does not wait for what will not come"
    again = item.pixels.open()
    assert len(again.take(1).grid_thw) == 1
    again.close()


def test_bytes_in_memory_and_untrusted_files(service: DecodeService, clips: list[Source]) -> None:
    assert clips[0].path is not None
    data = clips[0].path.read_bytes()
    expected = complete(clips[0])
    for source in (fetch_source(data), untrusted(clips[0])):
        matches = service.submit(VideoWork(source, CONFIG)).result(60)
        assert all(np.array_equal(a, b) for a, b in zip(matches.frames, expected.frames, strict=True))
    assert same(service.submit(VideoWork(str(clips[0].path), CONFIG)).result(60), expected)


def test_a_damaged_file_and_one_that_is_nowhere(service: DecodeService, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="<bytes> is not a video that can be read"):
        service.submit(VideoWork(fetch_source(b"\0no video at all"), CONFIG)).result(60)
    with pytest.raises(MediaError, match="does not exist on any node"):
        service.submit(VideoWork(str(tmp_path / "none.mp4"), CONFIG)).result(60)
    assert service.poisoned == {}


def test_a_defect_is_reported_as_one(service: DecodeService) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        service.submit(CallWork(divmod, (1, 0))).result(60)
    assert service.submit(CallWork(divmod, (7, 2))).result(60) == (3, 1)


def test_work_that_cannot_travel_is_its_own_mistake(service: DecodeService) -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle|local object"):
        service.submit(CallWork(lambda: 1)).result(60)
    assert service.submit(CallWork(divmod, (7, 2))).result(60) == (3, 1)


def test_warnings_come_back(service: DecodeService, clips: list[Source]) -> None:
    options = MediaOptions(nframes=500)
    with pytest.warns(keye.errors.KeyeWarning) as here:
        complete(clips[0], nframes=500)
    with pytest.warns(keye.errors.KeyeWarning) as there:
        service.submit(VideoWork(clips[0], CONFIG, options)).result(60)
    assert [str(entry.message) for entry in here] == [str(entry.message) for entry in there]


def test_workers_load_no_torch(service: DecodeService) -> None:
    code = (
        "import sys; from keye.cluster import pool_worker, decode_work; import keye.media.processor; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert missing_codecs() == ""


def test_a_worker_without_codecs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hello = LocalWorker.hello
    answers = iter([("rejected", "the decode worker on x cannot decode h264: install PyAV there")])
    monkeypatch.setattr(LocalWorker, "hello", lambda worker: next(answers, None) or hello(worker))
    with pytest.warns(keye.errors.KeyeWarning, match="cannot decode h264.*it is left out"):
        service = open_service("local:2")
    with service:
        assert service.gauges()["workers"] == 1
    monkeypatch.setattr(LocalWorker, "hello", lambda worker: ("rejected", "the decode worker on x cannot decode video"))
    with pytest.raises(KeyeError, match="cannot decode video"):
        open_service("local:1")


def test_workers_that_cannot_start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    # Private: a worker that cannot start at all.
    monkeypatch.setattr("keye.cluster.pool._BOOT", "raise SystemExit('no keye here')  # {}")
    with pytest.raises(KeyeError, match="ended while it started .see what it wrote above.: this version of keye"):
        open_service("local:2")
    assert "no keye here" in capfd.readouterr().err


def test_shared_memory_that_is_full() -> None:
    with shared_file(1000) as file:
        assert os.fstat(file.fileno()).st_size == 1000
    with pytest.raises(KeyeError, match="have no room in /dev/shm"):
        shared_file(1 << 62)


def workers_of(service: DecodeService) -> list[int]:
    """Process ids of the workers."""
    return [worker.process.pid for worker in service.workers]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("victims", [1, 2])
def test_kill_9_of_workers_while_they_work(clips: list[Source], victims: int) -> None:
    """One of four, and half of them, again and again: every item comes, once, and right."""
    expected = [complete(source) for source in clips]
    with open_service("local:4") as service:
        results = []
        for number in range(60):
            results.append(service.submit(VideoWork(clips[number % 6], CONFIG), Priority.BATCH))
            if number in (8, 40):
                results[number - 8].result(60)  # some are done, others on their way
                for pid in workers_of(service)[:victims]:
                    os.kill(pid, signal.SIGKILL)
        matches = [result.result(60) for result in results]
        assert all(same(entry, expected[number % 6]) for number, entry in enumerate(matches))
        gauges = service.gauges()
        assert gauges["done"] == 60 and gauges["bytes"] == 0 and gauges["workers"] == 4
        assert gauges["deaths"] == gauges["retried"] >= victims and service.poisoned == {}


@pytest.mark.slow
def test_workers_killed_while_idle_are_no_files_fault(clips: list[Source]) -> None:
    with open_service("local:4") as service:
        for worker in service.workers:
            os.kill(worker.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            worker.process.wait()  # type: ignore[attr-defined]
        assert same(service.submit(VideoWork(clips[0], CONFIG)).result(60), complete(clips[0]))
        assert service.poisoned == {} and service.gauges()["deaths"] >= 1


@pytest.mark.slow
def test_a_call_that_ends_its_process_is_poison(clips: list[Source]) -> None:
    with open_service("local:2") as service:
        good = [service.submit(VideoWork(source, CONFIG)) for source in clips]
        with pytest.raises(Poisoned, match="is quarantined"):
            service.submit(CallWork(os._exit, (1,))).result(60)
        assert all(same(result.result(60), complete(source)) for result, source in zip(good, clips, strict=True))
        assert len(service.poisoned) == 1


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them() -> None:
    code = (
        "import os, sys; from keye.cluster.service import open_service; service = open_service('local:2'); "
        "print(*[worker.process.pid for worker in service.workers], flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    watched = [os.pidfd_open(pid) for pid in workers]
    parent.kill()
    parent.communicate()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 30)[0], "a worker outlives its parent"
        os.close(descriptor)


@pytest.mark.slow
def test_a_model_answers_the_same(clips: list[Source]) -> None:
    plain = keye.load("nano")
    answer = plain.ask(clips[3].path, "what is in the video?", max_tokens=8)
    with open_service("local:2") as service:
        model = keye.load("nano", decoder=ServiceDecoder(service))
        assert model.ask(clips[3].path, "what is in the video?", max_tokens=8).text == answer.text
        assert service.gauges()["done"] >= 1
