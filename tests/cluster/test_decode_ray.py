"""The decode service on a real Ray cluster of two nodes on this machine."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keye.cluster.decode_queue import Priority
from keye.cluster.decode_work import CallWork, PlannedFrames, VideoWork
from keye.cluster.service import DecodeService, Poisoned, open_service
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.data.frameforge import make_clip, write_mp4
from keye.errors import KeyeError, MediaError
from keye.media.processor import Processor
from keye.media.source.fetch import Source, fetch_source

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow
CONFIG = ProcessorConfig.of("2.0", video_min_tokens=4)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        cluster.second = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        write_mp4(make_clip(number, frames=6, objects=2, start=0.0, step=0.5), folder / f"{number}.mp4", (112, 112))
    return [fetch_source(path) for path in sorted(folder.iterdir())]


def complete(source: Source) -> PlannedFrames:
    with Processor(CONFIG).decode_video(source, MediaOptions()) as (plan, frames):
        return PlannedFrames(plan, tuple(frames))


def same(matches: PlannedFrames, expected: PlannedFrames) -> bool:
    pairs = zip(matches.frames, expected.frames, strict=True)
    return matches.plan == expected.plan and all(np.array_equal(a, b) for a, b in pairs)


def test_a_cluster_does_what_this_process_does(cluster: Any, clips: list[Source], tmp_path: Path) -> None:
    """The same frames; deaths of workers and of a node are made good; poison and bad files are distinguished."""
    expected = [complete(source) for source in clips]
    with open_service("ray") as service:
        assert service.gauges()["workers"] == 2
        assert len({worker.node for worker in service.workers}) == 2
        assert same(service.submit(VideoWork(clips[0], CONFIG)).result(60), expected[0])
        assert service.submit(CallWork(divmod, (7, 2))).result(60) == (3, 1)
        with pytest.raises(MediaError, match="does not exist on any node"):
            service.submit(VideoWork(str(tmp_path / "none.mp4"), CONFIG)).result(60)
        with pytest.raises(MediaError, match="<bytes> is not a video"):
            service.submit(VideoWork(fetch_source(b"\0nothing"), CONFIG)).result(60)
        with pytest.raises(Poisoned, match="is quarantined"):
            service.submit(CallWork(os._exit, (1,))).result(120)
        kill_one(service)
        results = [service.submit(VideoWork(clips[i % 4], CONFIG), Priority.BATCH) for i in range(16)]
        results[4].result(60)
        cluster.remove_node(cluster.second)
        matches = [result.result(120) for result in results]
        assert all(same(item, expected[i % 4]) for i, item in enumerate(matches))
        gauges = service.gauges()
        assert gauges["workers"] == 1 and gauges["bytes"] == 0 and gauges["poisoned"] == 1


def kill_one(service: DecodeService) -> None:
    """Kills the process of a worker while it waits."""
    pid = service.submit(CallWork(os.getpid)).result(60)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "ray://no.such.host.invalid:10001", "ray://nothing"])
def test_a_cluster_that_cannot_be_reached(address: str) -> None:
    with pytest.raises(KeyeError, match="no Ray cluster can be reached at ray://.*check the address"):
        open_service(address)
