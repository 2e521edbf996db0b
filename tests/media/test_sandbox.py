"""What decode workers are kept from: each layer is tried, and so is a worker that lies."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import MediaError
from keye.media.container.animations import is_animated_gif
from keye.media.decode.confinement import Confinement, measure_confinement
from keye.media.decode.sandbox import DENIED_CALLS, call_filter
from keye.media.decode.wire import END, ERROR, FRAME, HEADER, INFO
from keye.media.decode.workers import Worker
from keye.media.image import open_frames, plan_image, read_image
from keye.media.source.fetch import Source, fetch_source, media_kind, untrusted
from keye.media.video import DecodeLimits, VideoReader
from tests.support.clips import read_code, write_clip

linux = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
CONFIG = ProcessorConfig()
_TRIES = """
import os, resource, signal, socket, sys, threading
sys.path.insert(0, sys.argv[1])
from keye.media.decode import sandbox
from keye.media.decode.sandbox import confine
libc = sandbox.load_libc()
exec(sys.argv[2])
try:
    exec(sys.argv[3])
except (OSError, MemoryError, ValueError, RuntimeError) as error:
    os.write(1, f"refused: {type(error).__name__}".encode())
else:
    os.write(1, b"done")
"""


def confined(code: str, layers: str = "confine(1 << 30, 5)") -> subprocess.CompletedProcess[bytes]:
    """A process that confines itself by `layers` and then runs `code`."""
    command = [sys.executable, "-c", _TRIES, str(Path(__file__).parents[2] / "src"), layers, code]
    return subprocess.run(command, capture_output=True, check=False, timeout=60)


def stranger(data: bytes) -> Source:
    return replace(fetch_source(data), untrusted=True)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@linux
def test_all_layers_hold_or_are_named() -> None:
    result = measure_confinement()
    assert result.memory
    assert result.reading
    assert result.writing
    assert result.network
    assert result.processes == ("processes" not in result.sentence().partition("not on this system")[2])
    some = Confinement(True, True, True, False, True, True, True)
    assert not some.complete
    assert some.sentence().endswith("not on this system: network")


@linux
@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "open('/tmp/keye-escape', 'w')",
        "os.listdir('/')",
        "os.mkdir('/tmp/keye-escape')",
        "socket.socket()",
        "socket.socketpair()",
        "socket.create_connection(('127.0.0.1', 9))",
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.memfd_create('x')",
        "os.dup(1)",
        "bytearray(2 << 30)",
        "os.setuid(12345)",
        "os.chroot('/tmp')",
        "os.fchmod(0, 0o777)",
        "os.utime(0)",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "signal.pthread_kill(threading.get_ident(), 0)",
    ],
)
def test_a_confined_process_cannot(code: str) -> None:
    assert confined(code).stdout.startswith(b"refused: ")


_NO_PRIVILEGES = "libc.prctl(38, 1, 0, 0, 0)"
_LANDLOCK = f"{_NO_PRIVILEGES}; sandbox.deny_files(libc)"
_FILTER = f"{_NO_PRIVILEGES}; sandbox.filter_calls(libc, *sandbox.ARCHITECTURES[os.uname().machine])"
_LIMITS = "sandbox.limit_resources(1 << 30, 5)"


@linux
@pytest.mark.parametrize(
    ("layers", "code", "error"),
    [
        (_LANDLOCK, "open('/etc/passwd')", "PermissionError"),
        (_LANDLOCK, "os.mkdir('/tmp/keye-escape')", "PermissionError"),
        (_LANDLOCK, "open('/tmp/keye-escape', 'w')", "PermissionError"),
        (_FILTER, "socket.socket()", "PermissionError"),
        (_FILTER, "os.fork()", "PermissionError"),
        (_FILTER, "os.execv('/bin/true', ['true'])", "PermissionError"),
        (_LIMITS, "open('/etc/passwd')", "OSError"),
        (_LIMITS, "socket.socket()", "OSError"),
        (_LIMITS, "bytearray(2 << 30)", "MemoryError"),
    ],
)
def test_each_layer_by_itself(layers: str, code: str, error: str) -> None:
    message_text = confined(code, layers).stdout.decode()
    if layers != _LIMITS and message_text == "done":
        pytest.skip("this system has not that layer")
    assert message_text == f"refused: {error}"
    assert confined("os.getpid(), threading.Thread(target=sum, args=([1],)).start()", layers).stdout == b"done"


@linux
def test_a_confined_process_can_compute_and_use_threads() -> None:
    assert confined("t = threading.Thread(target=sum, args=([1, 2],)); t.start(); t.join()").stdout == b"done"


@linux
def test_a_confined_process_that_spins_is_stopped() -> None:
    assert confined("while True: pass", "confine(1 << 30, 1)").returncode == -24  # SIGXCPU


@linux
def test_the_filter_of_system_calls_is_well_formed() -> None:
    code = [struct.unpack_from("<HBBI", call_filter(column, 7777), at) for column in (0, 1) for at in (0, 8, 16)]
    assert code[1] == (0x15, 1, 0, 7777)
    for column in (0, 1):
        numbers = [pair[column] for pair in DENIED_CALLS.values() if pair[column] is not None]
        assert len(numbers) == len(set(numbers))
        program = call_filter(column, 7777)
        jumps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
        # Wherever a denied number jumps to, it is the last instruction, which refuses.
        assert {at + 1 + jump for at, (op, jump, _, k) in enumerate(jumps) if op == 0x15 and k in numbers} == {
            len(jumps) - 1
        }


_LOOKS_AROUND = """
import json, os, sys
links = [f"/proc/self/fd/{number}" for number in range(256)]
fds = [os.readlink(link) for link in links if os.path.lexists(link)]
seen = json.dumps({"environment": dict(os.environ), "folder": os.getcwd(), "files": fds}).encode()
os.write(1, b"I" + len(seen).to_bytes(8, "little") + seen)
"""


def test_a_worker_sees_nothing_of_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    # What a worker can see is observed from inside: another program starts in its place.
    monkeypatch.setattr("keye.media.decode.workers.BOOT", _LOOKS_AROUND)
    with socket.socket(), (tmp_path / "clip").open("wb+") as file:  # The socket must not be inherited, the file must.
        worker = Worker("unused", file, {}, DecodeLimits(), name="clip", what="test")
        seen = json.loads(bytes(worker.receive(1 << 16)[1]))
        worker.close()
    assert seen["environment"].keys() <= {"LC_CTYPE", "LD_LIBRARY_PATH"}  # Python itself sets LC_CTYPE.
    assert seen["folder"] == "/"
    assert not any("socket:" in name for name in seen["files"])
    assert str(tmp_path / "clip") in seen["files"] or not seen["files"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "AVIF"])
def test_untrusted_images_come_out_the_same(kind: str) -> None:
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)), kind)
    ours, theirs = read_image(fetch_source(data)), read_image(stranger(data))
    assert (theirs.mode, theirs.size) == (ours.mode, ours.size)
    assert np.array_equal(np.asarray(theirs), np.asarray(ours))
    assert plan_image(stranger(data), CONFIG) == plan_image(fetch_source(data), CONFIG)


def test_an_untrusted_list_of_pictures_shares_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = Worker.__init__
    monkeypatch.setattr(Worker, "__init__", lambda self, *a, **k: (started.append(self), start(self, *a, **k))[1])
    pictures = [encoded(Image.new("RGB", (32 + i, 32), (i, 0, 0))) for i in range(4)]
    result = open_frames([stranger(picture) for picture in pictures])
    assert [picture.size for picture in result] == [(32 + i, 32) for i in range(4)]
    assert [picture.getpixel((0, 0))[0] for picture in result] == [0, 1, 2, 3]
    assert len(started) == 1


@pytest.mark.parametrize("cut", [20, 60, 0.5])
def test_what_an_untrusted_user_learns_of_a_bad_image(cut: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    data = encoded(noise)
    for use in (read_image, lambda source: plan_image(source, CONFIG)):
        with pytest.raises(MediaError, match="<bytes> is (damaged; download|not an image that can be read)") as error:
            use(stranger(data[: cut if isinstance(cut, int) else int(len(data) * cut)]))
        for leak in ("0x", "/", "Traceback", "PIL", "Error", "object"):
            assert leak not in str(error.value)


def test_limits_of_what_a_file_holds(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4"))
    with VideoReader(source, DecodeLimits(frames=60, duration=2.0)) as reader:
        assert reader.info.frame_count == 60
    with pytest.raises(MediaError, match="has 60 frames, more than the limit of 59"):
        VideoReader(source, DecodeLimits(frames=59))
    with pytest.raises(MediaError, match="lasts 2 s, more than the limit of 1.5 s"):
        VideoReader(source, DecodeLimits(duration=1.5))


def test_untrusted_files_have_tighter_limits(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mkv", frames=2, times_ms=[0, 90_000_000]))
    with VideoReader(source) as reader:
        assert reader.info.duration > 24 * 3600
    with pytest.raises(MediaError, match="lasts .* more than the limit of 86400 s"):
        VideoReader(untrusted(source))
    with VideoReader(untrusted(source), DecodeLimits()) as reader:
        assert reader.limits == DecodeLimits()


def test_the_time_of_all_waits_is_limited(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4"))
    with VideoReader(source) as reader:
        reader.worker.limits = DecodeLimits(total_seconds=0.0)
        with pytest.raises(MediaError, match="took more than 0 s to decode"):
            next(reader.frames(reader.plan(CONFIG, MediaOptions(nframes=2))))


def message(kind: bytes, body: bytes) -> bytes:
    return HEADER.pack(kind, len(body)) + body


FACTS = {"format": "mp4", "codec": "h264", "width": 4, "height": 4, "shown": [4, 4], "aspect": None,
         "aspect_believed": True, "rotation": 0, "mirrored": False, "exact_orientation": True, "transfer": "sdr",
         "track": 1, "tracks": ["1: 4x4 h264"], "track_asked": False, "rate": [1, 1], "time_base": [1, 1],
         "container_start": 0.0, "declared_end": None, "readable_end": 1.0, "known_times": True,
         "last_duration": 1}  # fmt: skip


def messages(facts: dict[str, object], times: bytes = bytes(8)) -> bytes:
    words = json.dumps(facts).encode()
    return message(INFO, struct.pack("<Q", len(words)) + words + times)


@pytest.mark.parametrize(
    "message_text",
    [
        HEADER.pack(INFO, 1 << 60),  # a length that would fill the parent's memory
        message(b"?", b""),
        message(FRAME, b"abc"),
        message(ERROR, b'["{0.__class__} {}", "a"]'),
        message(ERROR, b'["{} {} {}", "a"]'),
        message(ERROR, b'["clears the screen \\u001b[2J"]'),
        message(ERROR, b"[" * 5000),
        message(INFO, b"no facts"),
        messages(FACTS | {"time_base": [1, 0]}),
        messages(FACTS | {"width": -4}),
        messages(FACTS | {"rotation": "nan"}),
        messages(FACTS | {"rotation": 45}),
        messages(FACTS | {"shown": [4, 0]}),
        messages(FACTS | {"aspect": ["\u001b[2J", 1], "aspect_believed": False}),
        messages(FACTS | {"tracks": ["\u001b[2J"]}),
        messages(FACTS | {"track": 2}),
        messages(FACTS | {"transfer": "x"}),
        messages(FACTS, times=struct.pack("<qq", 5, 5)),
        messages(FACTS, times=b""),
        messages({}),
    ],
)
def test_a_worker_that_lies_ends_its_own_job_only(message_text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    play_worker(message_text, monkeypatch)
    with pytest.raises(MediaError, match="broke the video decoder"):
        VideoReader(fetch_source(b"\0video"))


def test_a_worker_that_sends_frames_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    play_worker(messages(FACTS | {"width": 64, "height": 64}) + message(FRAME, b"abc") + message(END, b""), monkeypatch)
    with VideoReader(fetch_source(b"\0video")) as reader:
        plan = reader.plan(CONFIG)
        with pytest.raises(MediaError, match="broke the video decoder"):
            reader.read(plan)


def test_a_worker_that_reads_no_requests_cannot_hold_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    play_worker(messages(FACTS), monkeypatch)
    with VideoReader(fetch_source(b"\0video")) as reader:
        reader.worker.limits = DecodeLimits(wait_seconds=0.01)
        with pytest.raises(MediaError, match="took more than 0.01 s"):
            reader.worker.request({"targets": list(range(1_000_000))})


def play_worker(message_text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program that says `said` and then waits in the worker's place."""
    program = "import os, signal, sys; os.write(1, bytes.fromhex(sys.argv[1])); signal.pause()"
    # Only a worker that a file has taken over sends such bytes; ours cannot be made to.
    monkeypatch.setattr("keye.media.decode.workers.BOOT", program)
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([*command[:5], message_text.hex()], **options)

    monkeypatch.setattr("keye.media.decode.workers.subprocess.Popen", start)


@pytest.mark.parametrize("form", ["hls", "concat"])
def test_a_playlist_in_the_decoder_opens_nothing(form: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "real.ts")
    text = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{clip}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {clip}\n",
    }[form]
    (tmp_path / "list").write_text(text)
    options = {"threads": 1, "pixel_limit": 10**6, "frame_limit": 1000, "common_only": False, "track": None,
               "animation": False}  # fmt: skip
    with (tmp_path / "list").open("rb") as file:
        worker = Worker(
            "keye.media.decode.video_worker", file, options, DecodeLimits(), name="the list", what="video decoder"
        )
    try:
        with pytest.raises(MediaError, match="the list is not a video that can be read|has no video stream"):
            worker.receive(1 << 20)
    finally:
        worker.close()


def test_a_gif_of_endless_blocks_is_not_walked_through() -> None:
    gif = encoded(Image.new("P", (2, 2)), "GIF")
    source = fetch_source(gif[:-2] + b"\x01\x00" * 50 + gif[-2:])
    assert media_kind(source) == "image"
    with source.open() as file:
        assert is_animated_gif(file, max_blocks=0)


@linux
def test_a_reader_in_a_process_with_very_many_open_files(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this system does not allow so many")
    opened: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    try:
        while not opened or opened[-1] < 1100:
            opened.append(os.open("/dev/null", os.O_RDONLY))
        with VideoReader(source) as reader:
            assert read_code(next(reader.frames(reader.plan(CONFIG)))) == 0
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_readers_in_threads_do_not_disturb_one_another(tmp_path: Path) -> None:
    source, result = fetch_source(write_clip(tmp_path / "clip.mp4")), []

    def read() -> None:
        with VideoReader(source) as reader:
            result.append(reader.info.frame_count)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert result == [60] * 4


def test_untrusted_files_are_read_in_common_containers_only(tmp_path: Path) -> None:
    for name, codec in (("clip.mp4", "libx264"), ("clip.webm", "libvpx-vp9"), ("clip.avi", "mpeg4")):
        with VideoReader(untrusted(fetch_source(write_clip(tmp_path / name, frames=5, codec=codec)))) as reader:
            assert reader.info.frame_count == 5
    rare = fetch_source(write_clip(tmp_path / "clip.nut", frames=5))
    with VideoReader(rare) as reader:
        assert reader.info.format == "nut"
    with pytest.raises(MediaError, match="is not a video that can be read"):
        VideoReader(untrusted(rare))
    odd = fetch_source(write_clip(tmp_path / "odd.avi", frames=5, codec="huffyuv", pix_fmt="yuv422p"))
    with VideoReader(odd) as reader:
        assert reader.info.codec == "huffyuv"
    with pytest.raises(MediaError, match="is in the video codec huffyuv, which is not read here"):
        VideoReader(untrusted(odd))
