"""The process that reads the presentation times of a video track from its packets alone: nothing is decoded, mended or
left out, so that what it says is independent of how keye samples. Standard library and PyAV.

Conversation: on start it sends one INFO message: a JSON object with `times`, ascending, in seconds from the beginning
of the container, and `steady`, whether the decoding times never go back. An ERROR message ends the conversation.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import av

from keye.media.decode.start import run_worker
from keye.media.decode.video_file import choose_track, open_container, send_failures, video_tracks
from keye.media.decode.wire import INFO, WorkerError, send


def read_times(file: BinaryIO, options: dict[str, Any]) -> dict[str, Any]:
    """What the INFO message says."""
    container = open_container(file, common_only=options["common_only"])
    stream = choose_track(video_tracks(container), options["track"])
    if stream.time_base is None:
        raise WorkerError("has no clock; re-encode it")
    times, last, steady = list[int](), None, True
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if len(times) == options["most"]:
            raise WorkerError(f"has more than {options['most']:,} frames; cut it into parts")
        if packet.pts is not None:
            times.append(packet.pts)
        if packet.dts is not None:
            steady, last = steady and (last is None or packet.dts > last), packet.dts
    unit, start = stream.time_base, (container.start_time or 0) / av.time_base
    return {"times": [float(time * unit) - start for time in sorted(times)], "steady": steady}


def serve(file: BinaryIO, requests: BinaryIO, out: BinaryIO, options: dict[str, Any]) -> None:
    """Sends INFO."""
    with send_failures(out, "needs more memory to read than the limit allows"):
        send(out, INFO, json.dumps(read_times(file, options)).encode())


def main(arguments: list[str]) -> None:
    """See `run_worker`."""
    run_worker(arguments, serve)
