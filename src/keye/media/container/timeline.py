"""When the frames of a video are shown, out of what its packets say. Standard library only: nothing is read or decoded.

A packet, known by its place in the file, holds one frame. Times are whole units of the stream's time base: of decoding
(dts) and of showing (pts); some containers have only the former, some neither.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

#: A time that is not known.
NONE = -(1 << 63)
#: Flags of a packet: decoding can begin at it; its frame is not shown; the container misses parts of it; no frame after
#: it needs one before it; its frame is decoded right before it is shown (a B-picture); the clock begins again with it;
#: it cannot be decoded without faults.
KEY, HIDDEN, CORRUPT, CLOSED, BETWEEN, JOIN, DAMAGE = 1, 2, 4, 8, 16, 32, 64

#: Codecs with B-pictures of which each lies right between two others.
MPEG = frozenset({"mpeg1video", "mpeg2video"})
#: Most frames that a decoder of H.264 or HEVC holds back.
_MOST_HELD = 16
#: The codec of which two frames may be packed in one packet, and the next packet is empty but for a mark.
PACKED = "mpeg4"
#: Frames by which a lost one may lie from a packet that tells of the loss.
_AROUND = 8
#: Seconds by which the clock must jump ahead, or fall back, to be another part's: the limits of ffmpeg. The last one
#: is for containers whose clock cannot begin again, and only falls back after careless joining.
_JUMP, _FALL, _STRICT_FALL = 10.0, 0.1, 1.0


@dataclass
class Packets:
    """Facts about the packets of a video stream, one entry each in the order of the file."""

    pts: array[int] = field(default_factory=lambda: array("q"))
    dts: array[int] = field(default_factory=lambda: array("q"))
    durations: array[int] = field(default_factory=lambda: array("q"))
    flags: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.flags)

    def add(self, pts: int | None, dts: int | None, duration: int, flags: int) -> None:
        self.pts.append(NONE if pts is None else pts)
        self.dts.append(NONE if dts is None else dts)
        self.durations.append(duration)
        self.flags.append(flags)

    def places(self, flag: int) -> list[int]:
        """Places of the packets with a flag."""
        return [place for place, flags in enumerate(self.flags) if flags & flag]

    def leads(self, key: int, end: int) -> bool:
        """Whether frames of packets from a key to `end` are shown before that of the key."""
        pts, flags = self.pts, self.flags
        return bool(flags[min(key + 1, len(self) - 1)] & BETWEEN) or any(
            NONE < pts[place] < pts[key] and not flags[place] & HIDDEN for place in range(key + 1, end)
        )

    def joins(self, stamps: Sequence[int]) -> list[int]:
        """Times of the first frames of the parts of which the clock begins again; `stamps` are those of a timeline."""
        parts = pairwise([*self.places(JOIN), len(self)])
        inside = ([stamp for stamp in stamps[begin:end] if stamp != NONE] for begin, end in parts)
        return [min(part) for part in inside if part]

    def mend_times(self, unit: float) -> None:
        """Replaces damaged times: one of decoding that does not fit between those on both sides, which ascend without
        it; one of showing that is further off than the most frames that a decoder holds back, at the rate around it,
        and a jump."""
        pts, dts, least = self.pts, self.dts, _FALL / unit
        for place in range(1, len(self) - 1):
            before, time, after = dts[place - 1 : place + 2]
            if NONE < before < after and time != NONE and not before - least <= time <= after + least:
                dts[place] = (before + after) // 2
                pts[place] = dts[place] if pts[place] == time else pts[place]
        for place, (time, displayed) in enumerate(zip(dts, pts, strict=True)):
            if NONE in (time, displayed) or abs(displayed - time) * unit <= _JUMP:
                continue
            near = [other for other in dts[max(place - _MOST_HELD, 0) : place + _MOST_HELD + 1] if other != NONE]
            longest = max((b - a for a, b in pairwise(near)), default=0)
            if abs(displayed - time) * unit > _JUMP + _MOST_HELD * unit * longest:
                pts[place] = time

    def groups(self) -> list[tuple[int, int]]:
        """First and end of each group of pictures: a key and the packets up to the next; the first may lack a key."""
        return list(pairwise([*dict.fromkeys([0, *self.places(KEY)]), len(self)]))


class Joiner:
    """Makes one clock of a stream's parts whose clocks do not follow one another, as ffmpeg does when it reads them.

    A part begins where decoding times fall back, or, with `jumps`, leap ahead while no other stream goes on evenly:
    that would be a gap in the recording. It then continues where the part before it ended.
    """

    def __init__(self, unit: float, *, jumps: bool) -> None:
        self._unit, self._jumps = unit, jumps
        self._fall = _FALL if jumps else _STRICT_FALL
        self._offset = self._step = 0
        self._last: int | None = None
        #: When the next packet is due, and would be without the leap of the last one.
        self._next = self._regular = 0
        #: When the next packet of each other stream is due, in seconds, and those that have jumped themselves.
        self._due: dict[int, float] = {}
        self._broken: set[int] = set()

    def follow(self, stream: int, seconds: float, duration: float) -> None:
        """Takes note of a packet of another stream."""
        if abs(seconds - self._due.get(stream, seconds)) > _JUMP:
            self._broken.add(stream)
        self._due[stream] = seconds + duration

    def shift(self, dts: int, pts: int | None, duration: int) -> tuple[int, int | None, bool]:
        """The times of the next packet on the one clock, and whether a part begins with it."""
        time, joins = dts + self._offset, False
        if self._last is not None:
            # Damaged: the packet's decoding time alone lies far from where it should, its time of showing does not.
            off, displayed_off = abs(time - self._next), 0 if pts is None else abs(pts + self._offset - self._next)
            if pts is not None and displayed_off * self._unit <= _JUMP < off * self._unit:
                time = self._next
            fall = (self._last - time) * self._unit
            leap = (time - self._next) * self._unit
            even = (due for stream, due in self._due.items() if stream not in self._broken)
            is_gap = any(abs(dts * self._unit - due) <= _JUMP for due in even)
            joins = self._jumps and leap > _JUMP and not is_gap
            if fall > self._fall:  # unless it was the time of the last packet that was wrong
                joins = abs(time - self._regular) * self._unit > self._fall
            if joins:
                self._offset -= time - self._next
                time = self._next
            elif time > self._last:
                self._step = time - self._last
        due = time if self._last is None or abs(time - self._next) * self._unit <= self._fall else self._next
        self._last, self._next = time, time + (duration or self._step)
        self._regular = due + (duration or self._step)
        self._broken.clear()
        return time, None if pts is None else pts + self._offset, joins


@dataclass(frozen=True)
class Timeline:
    """The frames of a video in the order in which they are shown.

    `times` ascend strictly. `stamps` are the frames' times by the packets' places, NONE for packets without a frame
    that is shown; None where frames are only known by the order in which a decoder gives them. `starts` are the places
    at which decoding can begin, `begins` the times of their frames, or, without stamps, the numbers of frames before
    them. `exact` is false where times were counted. `last_duration` is how long the last frame is shown, if the
    file says so. `damage` lists intervals (first time, end) in which packets lack parts.
    """

    times: array[int]
    stamps: array[int] | None
    starts: Sequence[int]
    begins: Sequence[int]
    exact: bool
    last_duration: int | None
    damage: Sequence[tuple[int, int]] = ()
    order: array[int] | None = None

    def start(self, time: int) -> int:
        """Number of the start before the frame at `time`: all that the frame needs comes after it."""
        index = max(bisect_right(self.times, time) - 1, 0)
        if self.order is None:
            return max(bisect_right(self.begins, index) - 1, 0)
        number = max(bisect_right(self.starts, self.order[index]) - 1, 0)
        # Frames shown before the key that they are decoded after need the frames before that key.
        while number > 0 and self.begins[number] > time:
            number -= 1
        return number


def lay_out(packets: Packets, codec: str, delay: int, step: int, reorders: Callable[[], bool]) -> Timeline:
    """The timeline of packets, of which a decoder reorders up to `delay` and those without times come every `step`.

    `reorders` finds out whether it gives frames in another order than that of their times; it is called where these may
    be those of decoding: they ascend in the order of the file, as those of reordered frames cannot, or the codec is
    MPEG-4, of which AVI files packed two frames in one packet.
    """
    displayed = [place for place, flags in enumerate(packets.flags) if not flags & HIDDEN]
    pts = [packets.pts[place] for place in displayed]
    if NONE not in pts:
        doubtful = codec == PACKED or all(a < b for a, b in pairwise(pts))
        if delay == 0 or len(pts) <= delay + 1 or not doubtful or not reorders():
            return _by_pts(packets)
    elif delay == 0 and all(packets.dts[place] != NONE for place in displayed if packets.pts[place] == NONE):
        return _by_pts(packets)
    if codec in MPEG:
        return _by_picture_type(packets, delay, step)
    return _by_count(packets, delay, step)


def _by_pts(packets: Packets) -> Timeline:
    """The timeline of packets that tell when their frames are shown; what comes before the first key is left out."""
    keys = packets.places(KEY)
    pts = array("q", (d if p == NONE else p for p, d in zip(packets.pts, packets.dts, strict=True)))
    first = keys[0] if keys else 0
    displayed = [place for place in range(first, len(packets))
             if not packets.flags[place] & HIDDEN and pts[place] != NONE]  # fmt: skip
    order: array[int] = array("q")
    begin = 0
    # No frame of a part, and none after a picture that begins afresh, is shown before any that came before it.
    for join in [*packets.places(JOIN | CLOSED), len(packets)]:
        end = bisect_right(displayed, join - 1)
        order.extend(sorted(displayed[begin:end], key=pts.__getitem__))
        begin = end
    return _timeline(packets, order, [pts[place] for place in order], keys, pts)


def _by_picture_type(packets: Packets, delay: int, step: int) -> Timeline:
    """The timeline of MPEG-1 and MPEG-2, where a reference frame is shown after the B-pictures that follow it."""
    keys = packets.places(KEY)
    first = keys[0] if keys else 0
    order: array[int] = array("q")
    previous: int | None = None
    for place in range(first, len(packets)):
        if packets.flags[place] & HIDDEN:
            continue
        if packets.flags[place] & BETWEEN:
            order.append(place)
            continue
        if previous is not None:
            order.append(previous)
        previous = place
    if previous is not None:
        order.append(previous)
    times = _guessed([packets.pts[place] for place in order], _delayed(packets, first, delay), step)
    pts = array("q", packets.pts)
    for place, time in zip(order, times, strict=True):
        pts[place] = time
    return _timeline(packets, order, times, keys, pts)


def _by_count(packets: Packets, delay: int, step: int) -> Timeline:
    """The timeline where the decoder alone knows the order of showing: it gives a frame for each packet, `delay`
    packets later, shown at that packet's dts. Without any dts frames are shown every `step`."""
    place = first = next(iter(packets.places(KEY)), 0)
    count = sum(not flags & HIDDEN for flags in packets.flags[first:])
    times = _guessed([NONE] * count, _delayed(packets, first, delay), step)
    exact = any(dts != NONE for dts in packets.dts)
    starts = [first, *(start for start in packets.places(CLOSED) if start > first)]
    before, begins = 0, list[int]()
    for start in starts:
        before += sum(not flags & HIDDEN for flags in packets.flags[place:start])
        begins.append(before)
        place = start
    last = step if times else None
    displayed = array("q", times)
    return Timeline(displayed, None, starts, begins, exact, last, _damage(packets, displayed, None))


def _timeline(
    packets: Packets, order: array[int], values: Sequence[int], keys: Sequence[int], pts: array[int]
) -> Timeline:
    times: array[int] = array("q")
    for value in values:  # each raised where it does not lie above the one before it
        times.append(value if not times or value > times[-1] else times[-1] + 1)
    stamps = array("q", [NONE]) * len(packets)
    for place, time in zip(order, times, strict=True):
        stamps[place] = time
    begins = [pts[key] if stamps[key] == NONE else stamps[key] for key in keys] or [NONE]
    last = packets.durations[order[-1]] or None if len(order) else None
    return Timeline(times, stamps, keys or [0], begins, True, last, _damage(packets, times, stamps), order)


def _delayed(packets: Packets, first: int, delay: int) -> list[int]:
    """The dts with which a decoder gives each frame, in the order of showing."""
    known = packets.dts if any(dts != NONE for dts in packets.dts) else packets.pts
    dts = [known[place] for place in range(first, len(packets)) if not packets.flags[place] & HIDDEN]
    return [*dts[delay:], *[NONE] * min(delay, len(dts))]


def _guessed(pts: Sequence[int], dts: Sequence[int], step: int) -> list[int]:
    """ffmpeg's guess of the times of frames in the order of showing: pts, or dts where those ascend more often; where
    neither is known, `step` after the frame before."""
    faults_pts = faults_dts = 0
    last_pts = last_dts = NONE
    times: list[int] = []
    known = (
        (i, s if s != NONE else d) for i, (s, d) in enumerate(zip(pts, dts, strict=True)) if (s, d) != (NONE, NONE)
    )
    place, first = next(known, (0, 0))
    before = first - (place + 1) * step
    for displayed, decoded in zip(pts, dts, strict=True):
        if decoded != NONE:
            faults_dts += decoded <= last_dts
            last_dts = decoded
        elif displayed != NONE:
            last_dts = displayed
        if displayed != NONE:
            faults_pts += displayed <= last_pts
            last_pts = displayed
        elif decoded != NONE:
            last_pts = decoded
        time = displayed if displayed != NONE and (faults_pts <= faults_dts or decoded == NONE) else decoded
        if time == NONE:
            time = (times[-1] if times else before) + step
        times.append(time if not times or time > times[-1] else times[-1] + 1)
    return times


def _damage(packets: Packets, times: array[int], stamps: array[int] | None) -> list[tuple[int, int]]:
    """Intervals from a packet that lacks parts to the next key, where its frame, or one after it, decodes with faults
    or a frame is missing from the times around it. The last packet of a file that was cut off does not count."""
    ranges: list[tuple[int, int]] = []
    known = packets.dts if stamps is None else stamps
    for first, end in packets.groups():
        place = next((i for i in range(first, end) if packets.flags[i] & CORRUPT), len(packets) - 1)
        inside = [known[i] for i in range(place, end) if known[i] != NONE]
        if not inside or place == len(packets) - 1:
            continue
        begin, stop = min(inside), max(inside) + max(packets.durations[place], 1)
        index = bisect_left(times, begin)
        around = times[max(index - _AROUND, 0) : index + _AROUND + 1]
        longest = max((b - a for a, b in pairwise(around)), default=0)
        if packets.flags[place] & DAMAGE or 2 * longest > 3 * packets.durations[place]:
            ranges.append((begin, stop))
    return ranges
