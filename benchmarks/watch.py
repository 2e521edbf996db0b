"""How long an event in an RTSP stream takes to reach a webhook, and how much of that is the model.

Serves a file over RTSP on this machine (GStreamer's server under Debian's Python: gir1.2-gst-rtsp-server-1.0,
python3-gi, gstreamer1.0-plugins-good), watches it with keye-nano in a process of its own, and notes when the event was
sent and when its report came. The file has the event at several times. Prints JSON. Run:
    python -m benchmarks.watch [--events 5] [--every 0.5]
"""

from __future__ import annotations

import argparse
import http.server
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

#: The server says when a client's stream begins: its clock starts there.
_SERVER = """
import sys, time, gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
def began(media, state):
    if state == Gst.State.PLAYING:
        print(time.time(), flush=True)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1"); server.set_service("0")
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(f"( filesrc location={sys.argv[1]} ! qtdemux ! rtph264pay name=pay0 pt=96 config-interval=1 )")
factory.connect("media-configure", lambda factory, media: media.connect("new-state", began))
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""
RATE, VISIBLE, PERIOD = 25, 4.0, 16.0


class _Hook(http.server.BaseHTTPRequestHandler):
    reports: list[tuple[float, dict[str, Any]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.reports.append((time.time(), json.loads(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        return


def write(path: Path, events: int) -> None:
    """A red circle on grey for `VISIBLE` seconds in each `PERIOD`, in the middle of it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"bf": "0", "g": str(RATE), "tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt = 448, 448, "yuv420p"
        for index in range(round(events * PERIOD * RATE)):
            image = Image.new("RGB", (448, 448), (128, 128, 128))
            if 0 <= index / RATE % PERIOD - PERIOD / 2 < VISIBLE:
                ImageDraw.Draw(image).ellipse((150, 150, 300, 300), fill=(220, 30, 30))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=5)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two questions")
    options = parser.parse_args()
    _Hook.reports = []
    with tempfile.TemporaryDirectory() as folder, http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hook) as hook:
        path = Path(folder) / "clip.mp4"
        write(path, options.events)
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        server = subprocess.Popen(["/usr/bin/python3", "-c", _SERVER, str(path)], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            model = model_seconds()
            watch = subprocess.Popen([
                sys.executable, "-m", "keye.cli", "watch", f"rtsp://127.0.0.1:{port}/live", "red circle", "--json",
                "--allow-private-urls", "--cooldown", "2", "--every", str(options.every),
                "--webhook", f"http://127.0.0.1:{hook.server_port}/",
            ])  # fmt: skip
            begin = float(server.stdout.readline())
            time.sleep(max(0.0, begin + options.events * PERIOD + 2 - time.time()))
            watch.terminate()
            watch.wait(30)
        finally:
            server.kill()
        hook.shutdown()
    starts = [came for came, report in _Hook.reports if report["kind"] == "start"]
    sent = [begin + PERIOD * (i + 0.5) for i in range(options.events)]
    delays = [min(late) for at in sent if (late := [came - at for came in starts if 0 <= came - at < PERIOD])]
    print(json.dumps({
        "benchmark": "watch", "events": options.events, "reported": len(delays), "reports": len(starts),
        "delay_s": {"median": round(statistics.median(delays), 2), "max": round(max(delays), 2)} if delays else None,
        "model_s": round(model, 2),
    }))  # fmt: skip


def model_seconds() -> float:
    """Wall seconds that the model takes for the three questions before a report."""
    import keye
    from keye.media.live import LiveFrame
    from keye.sessions.search.looks import Asker
    from keye.sessions.watch import make_look, part_of

    asker = Asker(keye.load("nano").engine, "red circle")
    picture = np.full((360, 360, 3), 128, np.uint8)
    look = make_look([LiveFrame(i / 2, picture, 0.0) for i in range(16)])
    times = []
    for _ in range(4):
        begin = time.monotonic()
        asker.ask_presence([look])
        asker.ask_spans([look], [False])
        asker.ask_presence([part_of(look, 14, 15)])
        times.append(time.monotonic() - begin)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
