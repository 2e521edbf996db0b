"""The process that touches video files: demuxes, decodes and shrinks frames under limits. Standard library and PyAV.

Started by `keye.media.video` with an open file; it opens nothing else, so a playlist inside the file leads nowhere.
It imports neither numpy nor torch. Conversation: on start it sends one INFO message; then, for each request line
(JSON) on standard input, one FRAME message per target in ascending order and an END message with the times of targets
whose frames are damaged, or of another size than those before. A request with a `scan` (first, last) is also answered
by THUMBNAILS messages of all frames between these times, in batches; one of `sound` (begin, end) by SOUND messages and
an END message with the number of packets that did not decode. Other requests have no answer; any that comes while
frames are sent ends them early. An ERROR message ends the conversation. `keye.media.decode.wire` has the form of
messages, `keye.media.decode.sandbox` what the process may not do.
"""

from __future__ import annotations

import json
import select
import struct
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

import av
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from keye.media.container.timeline import CLOSED, CORRUPT, DAMAGE, HIDDEN, KEY, NONE, lay_out
from keye.media.decode.display import display_facts, interpolate_fields, with_neighbours
from keye.media.decode.sound import SoundReader, describe_sound, find_timecode
from keye.media.decode.start import run_worker
from keye.media.decode.thumbnails import HEIGHT, WIDTH, interleave, wanted_times
from keye.media.decode.video_file import Opening, VideoFile, list_tracks, send_failures, video_tracks
from keye.media.decode.wire import END, INFO, SOUND, WorkerError, send

if TYPE_CHECKING:
    from keye.media.decode.animation_reader import AnimationReader

#: Codecs in which frames that the decoder calls non-reference are needed by no other frame, so that leaving them out
#: changes no pixel. HEVC is not one: its sub-layer non-reference frames may serve higher layers.
_SKIPPABLE = frozenset({"h264", "mpeg2video"})
#: Codecs whose decoders give no frame before all of it has been seen, where decoding begins at a recovery point.
_RECOVERING = frozenset({"h264"})
#: Codecs of which every packet has a frame, but for those that reading the packets finds out.
_COMPLETE = frozenset({"hevc"})
#: Formats of coded pictures alone, without a container that tells their rate: the pictures themselves do.
_RAW = frozenset({"h264", "hevc", "mpegvideo", "m4v", "vvc", "vc1"})
#: Those of them of which FFmpeg's guess may be twice the rate that the pictures tell.
_TELLING = frozenset({"h264", "hevc"})
#: So many groups of pictures that decoding begins at the first packet.
_EVERYTHING = 1 << 62
#: FFmpeg's number of intra pictures.
_INTRA = 1
#: Most starts that are found damaged one by one.
_MOST_RERUNS = 8
#: Most joins of parts, and most damaged places, that are reported.
_MOST_REPORTED = 100
#: Packets that are decoded to see whether fields come in packets of their own, and whether frames are reordered.
_FIELDS, _ORDER = 16, 64


class Reader:
    """The frames of a video file on one timeline. `damaged` are the times of those among the frames read last that were
    decoded with faults."""

    def __init__(self, file: BinaryIO, opening: Opening, frame_limit: int) -> None:
        self.video = VideoFile(file, opening)
        self.deinterlace = False
        self.damage: Sequence[int] = ()
        #: Where the frames read last are of another size than the one before: (time, width, height), as stored.
        self.resized: list[tuple[int, int, int]] = []
        #: How many groups of pictures before the one that holds a wanted frame decoding begins.
        self.lead = 0
        #: Numbers of starts whose own frame is damaged: what conceals the damage is the frame before.
        self.damaged_starts: set[int] = set()
        if self.video.scan.first_frame is None:
            raise WorkerError("holds no frame that can be decoded; re-encode it")
        self._hide_frameless()
        rate, unit = self._rate(), self.video.stream.time_base
        step = 1 if not rate or unit is None else max(round(1 / (rate * unit)), 1)
        context = self.video.stream.codec_context
        self.timeline = lay_out(self.video.scan.packets, context.name, context.reorder_depth, step, self._reorders)
        self.times = self.timeline.times
        count = len(self.times)
        if count == 0:
            raise WorkerError("holds no frame that can be decoded; re-encode it")
        if count > frame_limit:
            raise WorkerError(f"has {count:,} frames, more than the limit of {frame_limit:,}; cut it into parts")

    def info(self) -> dict[str, Any]:
        """Facts for `keye.media.video.VideoInfo`; seconds count from the container's own zero."""
        video, timeline = self.video, self.timeline
        stream, frame, rate = video.stream, video.scan.first_frame, self._rate()
        assert frame is not None and stream.time_base is not None
        duration, start = video.container.duration, video.container.start_time
        tracks = video_tracks(video.container)
        return {
            **display_facts(frame, stream.sample_aspect_ratio, video.opening.pixel_limit),
            "format": video.container.format.name,
            "codec": stream.codec_context.name,
            "track": tracks.index(stream) + 1,
            "tracks": list_tracks(tracks),
            "track_asked": video.opening.track is not None,
            "rate": [rate.numerator, rate.denominator] if rate else None,
            "time_base": [stream.time_base.numerator, stream.time_base.denominator],
            "container_start": self._start(),
            "declared_end": None if duration is None else (duration + (start or 0)) / av.time_base,
            "declared_frames": stream.frames or None,
            "readable_end": max(video.scan.ends.values()),
            "known_times": timeline.exact,
            "joins": video.scan.packets.joins(timeline.stamps or ())[:_MOST_REPORTED],
            "last_duration": timeline.last_duration,
            "ends_early": video.ends_early,
            "damage": [list(interval) for interval in timeline.damage[:_MOST_REPORTED]],
            "timecode": find_timecode(video.container, stream),
            "sound": describe_sound(video),
        }

    def sound(self, begin: float, end: float) -> SoundReader:
        """The samples between two seconds as players count them."""
        return SoundReader(self.video, self._start() + begin, self._start() + end)

    def _start(self) -> float:
        """When the clock of players begins, in seconds of the container's own: where sound begins first, before the
        first picture is shown."""
        stream, start = self.video.stream, self.video.container.start_time
        assert stream.time_base is not None
        first = float(self.timeline.times[0] * stream.time_base)
        begin = start / av.time_base if start is not None else 0.0 if self.timeline.exact else first
        return min(begin, first)

    def frames(
        self, targets: list[int], width: int, height: int, deinterlace: bool, strict: bool, scan: list[int] | None
    ) -> Iterator[tuple[bytes, bytes]]:
        """RGB bytes (height x width x 3) of the frame shown at each target time, ascending, before it is turned and
        mirrored; with `deinterlace` of interlaced frames their first moment. `strict`: damaged frames are errors.
        Messages (kind, body), those with thumbnails of the frames in `scan` among them."""
        self.deinterlace = deinterlace
        wanted = Wanted(wanted_times(targets, self.times, scan), targets)
        self.damage = wanted.damage
        self.resized = []
        resizers = {(width, height): VideoReformatter(), (WIDTH, HEIGHT): VideoReformatter()}

        def resize(frame: VideoFrame, w: int, h: int) -> bytes:
            # A thumbnail holds means; frames are resized as the official code does it.
            kind = Interpolation.BICUBIC if (w, h) == (width, height) else Interpolation.AREA
            return packed_rgb(resizers[w, h], frame, w, h, kind, self.video.opening.threads)

        yield from interleave(self._checked(wanted, strict=strict), targets, scan, resize, (width, height))

    def _checked(self, wanted: Wanted, *, strict: bool) -> Iterator[tuple[int, VideoFrame]]:
        """The frames for the wanted times with these; notes changes of their size."""
        first = self.video.scan.first_frame
        assert first is not None
        size = first.width, first.height
        for time, frame in zip(wanted.targets, self._decoded(wanted), strict=False):
            if size != (size := (frame.width, frame.height)):
                self.resized.append((time, *size))
            if strict and wanted.damage:
                raise WorkerError(
                    f"is damaged near {self._seconds(wanted.damage[0]):.1f} s; download it again or leave {{}} out",
                    "strict_media",
                )
            yield time, frame

    def starts(self) -> array[int]:
        """Times of the frames that decoding can begin with, ascending."""
        timeline = self.timeline
        if timeline.stamps is None:
            return array("q", (timeline.times[number] for number in timeline.begins if number < len(timeline.times)))
        return array("q", sorted({*timeline.begins}.intersection(timeline.times)))

    def _rate(self) -> Fraction | None:
        """Frames a second, as far as the file tells."""
        stream = self.video.stream
        if (name := self.video.container.format.name) in _RAW:
            declared = stream.codec_context.framerate if name in _TELLING else None
            return declared or stream.guessed_rate or stream.average_rate
        return stream.average_rate or stream.guessed_rate

    def _hide_frameless(self) -> None:
        """Finds the packets that give no frame, where that is in doubt, by decoding the groups around them."""
        packets, first = self.video.scan.packets, self.video.scan.first_frame
        groups = packets.groups()
        damage = [i for i, (begin, end) in enumerate(groups) if any(f & CORRUPT for f in packets.flags[begin:end])]
        doubtful = list(damage)
        recovers = self.video.stream.codec_context.name in _RECOVERING
        number = 0 if packets.flags and packets.flags[0] & KEY else min(1, len(groups) - 1)
        key, end = groups[number]
        if packets.leads(key, end) or (recovers and packets.flags[key] & (KEY | CLOSED) == KEY):
            doubtful += range(number + 1)
        if recovers and first is not None and first.interlaced_frame:
            count = min(_FIELDS, len(packets))
            if 4 * sum(1 for _ in self.video.sample([(0, count)])) < 3 * count:  # a packet for each field
                doubtful = list(range(len(groups)))
        if not doubtful:
            return
        needed = sorted({near for i in doubtful for near in (max(i - 1, 0), i)})
        decoded: dict[Any, bool] = {f.opaque: f.is_corrupt for f in self.video.sample([groups[i] for i in needed])}
        for i in damage:
            place = next(place for place in range(*groups[i]) if packets.flags[place] & CORRUPT)
            if any(decoded.get(other, True) for other in range(place, groups[i][1])):
                packets.flags[place] |= DAMAGE
        for place in (place for i in doubtful for place in range(*groups[i])):
            if place not in decoded:
                packets.flags[place] |= HIDDEN

    def _reorders(self) -> bool:
        """Whether the decoder gives frames in another order than that of their packets' times of showing."""
        packets = self.video.scan.packets
        decoded: list[Any] = [frame.opaque for frame in self.video.sample([(0, min(_ORDER, len(packets)))])]
        times = [packets.pts[place] for place in decoded]
        return times != sorted(times)

    def _decoded(self, wanted: Wanted) -> Iterator[VideoFrame]:
        """The frame for each target: first without frames that are not needed, then, if any is missing, with them; from
        further back where decoding cannot begin where the container says so."""
        codec, first = self.video.stream.codec_context.name, self.video.scan.first_frame
        assert first is not None
        interlaced = self.deinterlace and first.interlaced_frame
        lean = self.timeline.stamps is not None and codec in _SKIPPABLE and not interlaced and not wanted.scans
        while not wanted.done:
            try:
                yield from self._pass(wanted, lean=lean)
            except _DamagedStart as start:
                self.damaged_starts.add(start.number)
                if len(self.damaged_starts) > _MOST_RERUNS:  # each costs reading the file up to there once more
                    self.lead = max(self.lead, 1)
                continue
            except _NoStart:
                self.lead = 1 if self.lead == 0 and codec in _RECOVERING else _EVERYTHING
                continue
            if not lean:
                yield from wanted.rest(faults=self._is_faulty(self.video.faults))
                if not wanted.samples_left:
                    return  # nothing but thumbnails is missing
                if not wanted.done:
                    raise WorkerError(
                        f"is cut short or damaged: no frame at {self._seconds(wanted.pending):.1f} s can be decoded; "
                        "download it again or pass a smaller {}",
                        "video_end",
                    )
            lean = False

    def _pass(self, wanted: Wanted, *, lean: bool) -> Iterator[VideoFrame]:
        """One run through the file; a lean one ends early where it has no whole frame for a target."""
        wanted.missed, wanted.previous = False, None
        self.video.faults = known = 0
        tainted = False
        for before, frame, after in with_neighbours(self._decode(wanted, lean=lean)):
            # What refers to a damaged frame is damaged as well, up to the next key.
            tainted = frame.is_corrupt or self.video.faults > known or (tainted and not frame.key_frame)
            known = self.video.faults
            complete = not frame.is_corrupt and (frame.key_frame or not tainted)
            # Deinterlacing takes a frame's neighbours, which a lean pass may have left out.
            combed = self.deinterlace and frame.interlaced_frame and frame.pts in wanted.sampled
            if self.lead == 1 and not known and not wanted.done and wanted.pending < (frame.pts or 0):
                raise _NoStart  # one group was not enough
            for hit in wanted.take(
                frame, complete=complete, exact=lean, usable=not combed, faults=self._is_faulty(known)
            ):
                plain = hit is not frame or not combed
                yield hit if plain else interpolate_fields(before, hit, after, self.video.opening.threads)
            if wanted.done or wanted.missed:
                break

    def _is_faulty(self, faults: int) -> bool:
        """Whether a frame that did not come is damage: some packets have none, but not those of every codec."""
        return faults > 0 or self.video.stream.codec_context.name in _COMPLETE

    def _decode(self, wanted: Wanted, *, lean: bool) -> Iterator[VideoFrame]:
        """Frames of the groups of pictures that hold a wanted frame; their pts are their times on the timeline."""
        timeline, stamps = self.timeline, self.timeline.stamps
        skipping, resumed, begin, count = False, False, NONE, 0
        number, served = 0, -1
        for place, packet in self.video.packets():
            context = self.video.stream.codec_context
            if served != wanted.place:
                number, served = timeline.start(wanted.pending), wanted.place
                number = max(number - max(self.lead, number in self.damaged_starts), 0)
            if place < timeline.starts[number]:
                skipping = True
                continue
            if skipping and packet.size:
                context.flush_buffers()
                count = timeline.begins[number]
                # Before the first start is nothing that could be needed.
                begin = count if number and stamps is not None else NONE
                skipping, resumed = False, begin != NONE and stamps is not None and stamps[place] != NONE
            if stamps is not None and packet.size:
                packet.pts = None if place >= len(stamps) or stamps[place] == NONE else stamps[place]
            needless = lean and packet.size and packet.pts not in wanted.times
            context.skip_frame = "NONREF" if needless else "DEFAULT"
            for frame in self.video.decode(packet):
                if stamps is None:
                    frame.pts = timeline.times[min(count, len(timeline.times) - 1)]
                    count += 1
                elif frame.pts is None or frame.pts < begin:
                    continue  # not shown, or shown before the key that decoding began at, and without what it needs
                elif resumed:
                    known = lean or self.lead or number in self.damaged_starts
                    if not known and (self.video.faults or frame.is_corrupt):
                        raise _DamagedStart(number)
                    intra = frame.key_frame or frame.pict_type == _INTRA
                    if not (self.video.faults or self.lead) and (frame.pts != begin or not intra):
                        raise _NoStart  # the first frame after a leap shows that decoding cannot begin there
                    resumed = False
                yield frame

    def _seconds(self, time: int) -> float:
        """A time as players show it."""
        unit, start = self.video.stream.time_base, self.video.container.start_time
        assert unit is not None
        return max(float(time * unit) - (start or 0) / av.time_base, 0.0)


class _NoStart(Exception):
    """Decoding cannot begin at a packet that the container calls a key."""


class _DamagedStart(Exception):
    """The frame that decoding began with is damaged."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Wanted:
    """Target times still without a frame, ascending; those among them that are not `sampled` are for thumbnails alone.
    `damage` are the sampled targets whose frame was decoded with faults, or not at all: then the one on display before
    it stands in for it. `missed`: a lean pass found no complete frame for a target."""

    def __init__(self, targets: Sequence[int], sampled: Sequence[int]) -> None:
        self.targets = targets
        self.times, self.sampled = frozenset(targets), frozenset(sampled)
        self.last_sample = sampled[-1] if sampled else NONE
        self.place = 0
        self.damage: list[int] = []
        self.missed = False
        self.previous: VideoFrame | None = None

    @property
    def done(self) -> bool:
        return self.place == len(self.targets)

    @property
    def scans(self) -> bool:
        """Whether thumbnails are wanted, of all frames."""
        return len(self.times) > len(self.sampled)

    @property
    def samples_left(self) -> bool:
        """Whether any sampled target is without a frame."""
        return not self.done and self.pending <= self.last_sample

    @property
    def pending(self) -> int:
        """The earliest target without a frame; the last one when all have."""
        return self.targets[min(self.place, len(self.targets) - 1)]

    def take(
        self, frame: VideoFrame, *, complete: bool, exact: bool, usable: bool, faults: bool
    ) -> Iterator[VideoFrame]:
        """The frame on display at each target up to the time of a frame, which is `complete` where it was decoded
        without faults. An `exact` pass has only complete and `usable` frames. Without `faults` of the decoder so far, a
        target without a frame of its own is not damage: some packets have none."""
        assert frame.pts is not None
        while not self.done and self.pending <= frame.pts:
            late = self.pending < frame.pts
            if exact and (late or not complete or not usable):
                self.missed = True
                return
            if (faults if late else not complete) and self.pending in self.sampled:
                self.damage.append(self.pending)
            self.place += 1
            yield self.previous or frame if late else frame
        self.previous = frame

    def rest(self, *, faults: bool) -> Iterator[VideoFrame]:
        """What stands in for frames that a complete pass has not given: the last one, unless most are missing."""
        missing = len(self.targets) - self.place
        if self.previous is None or 2 * missing > len(self.targets):
            return
        self.damage += [time for time in self.targets[self.place :] if faults and time in self.sampled]
        for _ in range(missing):
            self.place += 1
            yield self.previous


def packed_rgb(
    resize: VideoReformatter, frame: VideoFrame, width: int, height: int, kind: Interpolation, threads: int
) -> bytes:
    """The frame as RGB bytes without row padding, resized by one of libswscale's (antialiasing) filters."""
    picture = resize.reformat(frame, width=width, height=height, format="rgb24", interpolation=kind, threads=threads)
    row, stride, data = width * 3, picture.planes[0].line_size, memoryview(picture.planes[0])
    if stride == row:
        return bytes(data[: row * height])
    return b"".join(data[i * stride : i * stride + row] for i in range(height))


def serve(file: BinaryIO, requests: BinaryIO, out: BinaryIO, options: dict[str, Any]) -> None:
    """Sends INFO, then answers requests until standard input ends. See the module's docstring."""
    with send_failures(out, "needs more memory to decode than the limit allows; re-encode it smaller"):
        reader: Reader | AnimationReader
        if options["animation"]:
            from keye.media.decode.animation_reader import AnimationReader

            reader = AnimationReader(file, *(options[name] for name in ("pixel_limit", "frame_limit", "track")))
        else:
            opening = Opening(*(options[name] for name in ("threads", "pixel_limit", "common_only", "track")))
            reader = Reader(file, opening, options["frame_limit"])
        facts = json.dumps(reader.info()).encode()
        send(out, INFO, struct.pack("<Q", len(facts)) + facts + array("q", reader.times).tobytes())
        for line in requests:
            request = json.loads(line)
            if "sound" in request:
                assert isinstance(reader, Reader)
                sound = reader.sound(*request["sound"])
                for part in sound.samples():
                    send(out, SOUND, part)
                send(out, END, json.dumps({"faults": sound.faults}).encode())
            if "starts" in request:
                starts = reader.starts() if isinstance(reader, Reader) else array("q")
                send(out, INFO, starts.tobytes())
            if "targets" not in request:
                continue
            wanted = (request[name] for name in ("targets", "width", "height", "deinterlace", "strict", "scan"))
            for kind, body in reader.frames(*wanted):
                if select.select([requests], [], [], 0)[0]:
                    break  # the caller needs no more of these frames, or has exited
                send(out, kind, body)
            report = {"damaged": list(reader.damage[:_MOST_REPORTED]), "resized": reader.resized[:_MOST_REPORTED]}
            send(out, END, json.dumps(report).encode())


def main(arguments: list[str]) -> None:
    """See `run_worker`."""
    run_worker(arguments, serve, lambda options: ["keye.media.decode.animation_reader"] if options["animation"] else [])
