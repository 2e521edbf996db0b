"""Speech to lines of text by a transcription service that the user names: OpenAI's interface, which many local servers
have too (`POST .../audio/transcriptions`). Nothing is sent unless a service is named.

Sound is decoded in the confined worker and sent in parts as WAV, 16 kHz, mono, cut where it is quiet. What comes back
is bounded and checked like any subtitle file.
"""

from __future__ import annotations

import http.client
import io
import json
import secrets
import ssl
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import av
import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from keye.errors import KeyeError, MediaError
from keye.media.source.fetch import Reference, fetch_source
from keye.media.subtitles import MOST_LINES, Subtitles, SubtitleTrack, make_line
from keye.media.video import VideoReader
from keye.moments import SubtitleLine
from keye.units import MIB, plural

#: Samples a second that are sent; seconds of a part, and at its end those in which a quiet place is looked for.
_RATE: Final = 16_000
_PART: Final = 300.0
_SEARCH: Final = 15.0
#: Seconds whose loudness is compared.
_QUIET: Final = 0.2
_MOST_ANSWER: Final = 16 * MIB
#: Most tries of a part while the service is busy, and seconds between them.
_TRIES: Final = 3
_WAIT: Final = 5.0
_BUSY: Final = (429, 500, 502, 503, 504)
#: Characters of an answer that an error shows.
_MOST_SHOWN: Final = 200


@dataclass(frozen=True)
class Transcriber:
    """A transcription service: its address (the base, as `http://127.0.0.1:9000/v1`, or the full one), the name of its
    model, and the key that it asks for. `timeout` is for the answer to one part, in seconds."""

    url: str
    model: str = "whisper-1"
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not (self.url.isascii() and self.url.isprintable() and " " not in self.url and _is_address(self.url)):
            raise KeyeError(f"transcribe is {self.url[:80]!r}; give an http or https address, such as "
                            "http://127.0.0.1:9000/v1")  # fmt: skip
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise KeyeError("the key of the transcription service has line breaks or other characters that no key has; "
                            "give the key alone")  # fmt: skip


def _is_address(url: str) -> bool:
    """Whether this is an http or https address without a user, whose host and port can be."""
    try:
        parts = urlsplit(url)
        return bool(parts.scheme in ("http", "https") and parts.hostname and parts.username is None
                    and parts.port != 0)  # fmt: skip
    except ValueError:  # the port or the host is none
        return False


def transcribe(
    video: Reference, service: Transcriber, *, language: str | None = None, track: int | None = None,
    on_progress: Callable[[float, float], None] | None = None, check: Callable[[], None] | None = None,
) -> Subtitles:  # fmt: skip
    """What is said in a video, as lines with their times.

    `on_progress` is called with the seconds done and in all; `check` before each part, and may raise to end the work.
    Raises `MediaError` for a video without sound that can be read, `KeyeError` where the service fails. Blocks.
    """
    source = fetch_source(video)
    lines, faults = list[SubtitleLine](), 0
    with VideoReader(source, track=track) as reader:
        sound, end = reader.info.sound, reader.info.duration
        if sound is None:
            raise MediaError(f"{source.name} has no sound that could be transcribed")
        if not sound.is_readable:
            raise MediaError(f"the sound of {source.name} is {sound.codec}, which is not read; convert it to AAC")
        for start, samples in _parts(reader, end):
            if check is not None:
                check()
            for entry in _ask(service, samples, language):
                line = _line(entry, start, len(samples) / _RATE)
                if line is None:
                    faults += 1
                elif line.text and len(lines) < MOST_LINES:
                    lines.append(line)
            if on_progress is not None:
                on_progress(min(start + len(samples) / _RATE, end), end)
    notes = (f"{plural(faults, 'line')} of the transcription had no valid times: left out",) if faults else ()
    name = f"speech, by {urlsplit(service.url).hostname}"
    return Subtitles(SubtitleTrack("speech", "speech", name, language), tuple(lines), notes)


def _parts(reader: VideoReader, end: float) -> Iterator[tuple[float, NDArray[np.int16]]]:
    """(begin in seconds, samples at 16 kHz) of parts of the sound, each but the last cut at its quietest place."""
    begin, pieces, count = 0.0, list[NDArray[np.int16]](), 0
    most, search = int(_PART * _RATE), int(_SEARCH * _RATE)
    for piece in _mono(reader, end):
        pieces.append(piece)
        count += len(piece)
        while count >= most:
            samples = np.concatenate(pieces)
            cut = most - search + _quietest(samples[most - search : most])
            yield begin, samples[:cut]
            begin, pieces, count = begin + cut / _RATE, [samples[cut:]], count - cut
    if count >= int(_QUIET * _RATE):
        yield begin, np.concatenate(pieces)


def _mono(reader: VideoReader, end: float) -> Iterator[NDArray[np.int16]]:
    rate, channels = reader.sound_form
    resampler, count = AudioResampler("s16", "mono", _RATE), 0
    for piece in reader.sound(0.0, end):
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(piece.reshape(1, -1)), "flt", "mono" if channels == 1 else "stereo"
        )
        frame.sample_rate, frame.pts = rate, count
        count += len(piece)
        for resampled in resampler.resample(frame):
            yield resampled.to_ndarray()[0]
    for resampled in resampler.resample(None):
        yield resampled.to_ndarray()[0]


def _quietest(samples: NDArray[np.int16]) -> int:
    """The middle of the quietest moment."""
    length = int(_QUIET * _RATE)
    count = len(samples) // length
    loudness = np.abs(samples[: count * length].astype(np.int32)).reshape(count, length).mean(axis=1)
    return int(np.argmin(loudness)) * length + length // 2


def _line(entry: Any, begin: float, most: float) -> SubtitleLine | None:
    """A segment of an answer as a line of the video; None for one that is not valid or lies outside its part."""
    try:
        start, end, text = float(entry["start"]), float(entry["end"]), entry["text"]
    except (TypeError, ValueError, LookupError):
        return None
    if not isinstance(text, str) or not 0 <= start <= most:
        return None
    return make_line(begin + start, begin + min(end, most), text)


def _ask(service: Transcriber, samples: NDArray[np.int16], language: str | None) -> list[Any]:
    """The segments that the service finds in a part."""
    fields = {"model": service.model, "response_format": "verbose_json", "timestamp_granularities[]": "segment"}
    if language is not None:
        fields["language"] = language
    boundary = f"keye-{secrets.token_hex(16)}"
    body = _form(fields, _wav(samples), boundary)
    for number in range(_TRIES):
        status, answer = _post(service, body, boundary)
        if status == 200:
            break
        if status not in _BUSY or number == _TRIES - 1:
            words = answer[:_MOST_SHOWN].decode("utf-8", "replace")
            raise KeyeError(f"the transcription service at {_host(service)} answers {status}: {words!r}")
        time.sleep(_WAIT)
    try:
        data = json.loads(answer)
        segments = data["segments"]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise KeyeError(f"{_host(service)} gives no segments with times; use a service and model that know "
                        "response_format verbose_json") from None  # fmt: skip
    return segments[:MOST_LINES] if isinstance(segments, list) else []


def _post(service: Transcriber, body: bytes, boundary: str) -> tuple[int, bytes]:
    """Status and body of the answer. Redirects are not followed: sound goes to the address that was named."""
    parts = urlsplit(service.url)
    path = parts.path.rstrip("/")
    path = path if path.endswith("/transcriptions") else f"{path}/audio/transcriptions"
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Accept": "application/json"}
    if service.key is not None:
        headers["Authorization"] = f"Bearer {service.key}"
    host = parts.hostname or ""
    connection = (
        http.client.HTTPSConnection(host, parts.port, timeout=service.timeout, context=ssl.create_default_context())
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, parts.port, timeout=service.timeout)
    )
    try:
        connection.request("POST", path + (f"?{parts.query}" if parts.query else ""), body, headers)
        response = connection.getresponse()
        answer = response.read(_MOST_ANSWER + 1)
    except (OSError, http.client.HTTPException) as error:
        raise KeyeError(f"the transcription service at {_host(service)} cannot be reached: {error}") from None
    finally:
        connection.close()
    if len(answer) > _MOST_ANSWER:
        raise KeyeError(f"the answer of {_host(service)} is larger than {_MOST_ANSWER // MIB} MiB")
    return response.status, answer


def _host(service: Transcriber) -> str:
    parts = urlsplit(service.url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _form(fields: dict[str, str], sound: bytes, boundary: str) -> bytes:
    out = io.BytesIO()
    for name, value in fields.items():
        out.write(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    out.write(f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="part.wav"\r\n'
              "Content-Type: audio/wav\r\n\r\n".encode())  # fmt: skip
    out.write(sound)
    out.write(f"\r\n--{boundary}--\r\n".encode())
    return out.getvalue()


def _wav(samples: NDArray[np.int16]) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return out.getvalue()
