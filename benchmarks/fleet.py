"""The simulation behind `keye plan --fleet` against what really happens on this machine.

    python -m benchmarks.fleet
    python -m benchmarks.fleet --videos 120 --rounds 3

Measures what one video costs a decode worker and the engine (keye-nano, one thread; 1, 4 and 8 requests at once), then
lets videos arrive at random at half and at three quarters of what that allows, and all at once. The same arrivals are
simulated with many seeds. `error` is predicted over measured, less one: of the mean time to an answer where videos
arrive, of the answers a second where all are there. Needs two free processors: one decodes, one computes. Prints JSON.
`others` are the processors that other programs kept busy meanwhile; above 0.1 the errors say little, and a note on
standard error says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from benchmarks.company import MOST_OTHERS, Company
from keye.cluster.decode_work import VideoWork
from keye.cluster.service import DecodeService, open_service
from keye.data import frameforge
from keye.engine.async_engine import AsyncEngine
from keye.engine.media import Frames
from keye.engine.request import GenerationRequest
from keye.media.source.fetch import Source, fetch_source
from keye.planning.fleet import Costs, Fleet, Load, simulate, throughput

TOGETHER, SEEDS, FRAMES, PASSES = 8, 50, 32, 3
FLEET = Fleet(decoders=1, replicas=1, together=TOGETHER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="keye-fleet-") as folder, open_service("local:1") as service:
        site = Site(write_videos(Path(folder), options.videos), service)
        print(json.dumps(asyncio.run(measure(site, options.rounds)), indent=2))


class Site:
    """A decode worker and an engine, used as a fleet uses them."""

    def __init__(self, sources: Sequence[Source], service: DecodeService) -> None:
        self.sources, self.service = sources, service
        self.model = keye.load("nano")
        self.engine = AsyncEngine(self.model.engine)
        self.gate = asyncio.Semaphore(TOGETHER)

    async def decode(self, number: int) -> Any:
        work = VideoWork(self.sources[number], self.model.processor.config)
        return await asyncio.wrap_future(self.service.submit(work))

    def request(self, decoded: Any) -> GenerationRequest:
        video = Frames(list(decoded.frames), decoded.plan.timestamps)
        content = [{"type": "video", "video": video}, {"type": "text", "text": "when is the red circle visible?"}]
        return self.model.request([{"role": "user", "content": content}], max_tokens=16, ignore_eos=True)

    async def answer(self, decoded: Any) -> None:
        async with self.gate:
            async for _ in self.engine.run(self.request(decoded)):
                pass

    async def visit(self, number: int, at: float, begin: float) -> float:
        """Seconds from a video's arrival to its answer."""
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        await self.answer(await self.decode(number))
        return time.perf_counter() - begin - at

    async def play(self, arrivals: Sequence[float]) -> tuple[list[float], float]:
        """Seconds of each video, and of all."""
        self.model.clear_caches()
        begin = time.perf_counter()
        results = await asyncio.gather(*(self.visit(i, at, begin) for i, at in enumerate(arrivals)))
        return results, time.perf_counter() - begin


async def measure(site: Site, rounds: int) -> dict[str, Any]:
    site.engine.start()
    try:
        count = len(site.sources)
        await site.play([0.0] * 8)
        costs = await costs_of(site)
        rate = throughput(costs, FLEET)
        rng = random.Random(1)
        runs = []
        for _ in range(rounds):
            for share in (0.5, 0.75):
                arrivals = list(accumulate(rng.expovariate(share * rate) for _ in range(count)))
                runs.append({"share_of_capacity": share, **await compared(site, costs, Load(share * rate), arrivals)})
            runs.append({"share_of_capacity": None, **await compared(site, costs, Load(rate), [0.0] * count)})
        disturbed = [run["others"] for run in runs if run["others"] is None or run["others"] > MOST_OTHERS]
        if disturbed:
            print(f"{len(disturbed)} of {len(runs)} runs shared the processors with other programs, or it is not known "
                  "whether they did: run it again on a quiet machine", file=sys.stderr)  # fmt: skip
        errors = [run["error"] for run in runs]
        return {
            "videos": count, "frames": FRAMES, "capacity_per_second": rate, "runs": runs,
            "measured": {
                "decode": costs.decode, "engine": costs.engine, "later": costs.later, "spread": costs.spread
            },
            "largest_error": max(map(abs, errors)), "median_error": statistics.median(map(abs, errors)),
        }  # fmt: skip
    finally:
        site.engine.close()


async def costs_of(site: Site) -> Costs:
    """What a video takes: of the worker one after another, of the engine while 1, 4 and 8 are at work all the time."""
    decoded, seconds = [], []
    for number in range(min(24, len(site.sources))):
        begin = time.perf_counter()
        decoded.append(await site.decode(number))
        seconds.append(time.perf_counter() - begin)
    engine = []
    for together in (1, 4, TOGETHER):
        site.gate = asyncio.Semaphore(together)
        begin = time.perf_counter()
        for _ in range(PASSES):
            site.model.clear_caches()
            await asyncio.gather(*(site.answer(item) for item in decoded))
        engine.append((together, (time.perf_counter() - begin) / (PASSES * len(decoded))))
    begin = time.perf_counter()
    for item in decoded:  # the last run has left all of them in the caches
        await site.answer(item)
    later = (time.perf_counter() - begin) / len(decoded) / engine[0][1]
    return Costs(statistics.mean(seconds), tuple(engine), later, statistics.pstdev(seconds) / statistics.mean(seconds))


async def compared(site: Site, costs: Costs, load: Load, arrivals: Sequence[float]) -> dict[str, Any]:
    """One run and its simulation."""
    company = Company()
    results, total = await site.play(arrivals)
    others = company.others()
    played = [simulate(load, costs, FLEET, videos=arrivals, seed=seed) for seed in range(SEEDS)]
    if not any(arrivals):
        measured, predicted = len(results) / total, statistics.mean(item.answers for item in played)
        return {
            "answers_per_second": measured, "predicted": predicted, "error": predicted / measured - 1, "others": others
        }  # fmt: skip
    measured = statistics.mean(results[len(results) // 10 :])
    predicted = statistics.mean(item.mean for item in played)
    return {"mean_seconds": measured, "predicted": predicted, "error": predicted / measured - 1, "others": others}


def write_videos(folder: Path, count: int) -> list[Source]:
    result = []
    for number in range(count):
        path = folder / f"{number}.mp4"
        frameforge.write_mp4(
            frameforge.make_clip(number, frames=FRAMES, objects=3, start=0.0, step=0.5), path, (448, 448)
        )
        result.append(fetch_source(path))
    return result


if __name__ == "__main__":
    main()
