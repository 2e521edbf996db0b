"""`--record`: puts together what `keye.exports.record` writes, from an answer or from what a search has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.chat.messages import Medium, Message
from keye.commands.shared.export import ExportPlan, plan_media_exports
from keye.commands.shared.outputs import check_not_input, check_suffix
from keye.config.media import MediaOptions, media_options
from keye.errors import MediaError, is_number
from keye.exports import ExportRange, ranges_of
from keye.exports.record import Picture, Record, RecordedVideo, to_html
from keye.files import check_output, has_mark, output_file
from keye.media.content import source_hash
from keye.media.source.fetch import Source, is_index
from keye.media.thumbnails import make_thumbnails
from keye.units import plural

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.moments import Coverage, FindResult
    from keye.sessions.answer import Answer

#: Pictures of moments and of other frames, and their height in pixels.
_OF_MOMENTS, _OF_FRAMES, _HEIGHT = 24, 12, 120
#: Facts of a plan that a record lists.
_FACTS = ("frames", "sample_fps", "width", "height", "visual_tokens", "native_fps", "source_width", "source_height",
          "part", "track", "rotation")  # fmt: skip


@dataclass(frozen=True)
class AnswerFiles:
    """What `--export` and `--record` write of an answer."""

    exports: ExportPlan | None
    record: Path | None

    def write(
        self, command: str, label: str, question: str, model: Keye, media: Sequence[Medium], answer: Answer,
        settings: Mapping[str, Any],
    ) -> list[Path]:  # fmt: skip
        """Writes the files and returns their paths. `label` names the moments; `question` was put to the model."""
        ranges = [ExportRange(start, end, label) for start, end in answer.intervals]
        paths = self.exports.write(ranges, label) if self.exports is not None else []
        if self.record is not None:
            write_answer_record(self.record, command, question, model, media, answer, ranges, settings)
            paths.append(self.record)
        return paths


def plan_files(media: Sequence[Medium], arguments: Mapping[str, Any], *, overwrite: bool) -> AnswerFiles:
    """What `options.exporting` asks for. Raises `KeyeError` where it cannot be written, before a model is loaded."""
    exports, record = plan_media_exports(media, arguments, overwrite=overwrite), arguments.get("record")
    if record is not None:
        check_record(record, [medium.source for medium in media], overwrite=overwrite)
    return AnswerFiles(exports, record)


def check_record(path: Path, sources: Sequence[object], *, overwrite: bool) -> None:
    """`KeyeError` where `--record` cannot work, before a model is loaded."""
    check_suffix(path, "--record", (".html",))
    check_not_input(path, "--record", sources)
    check_output(path, has_mark, overwrite=overwrite)


def write_answer_record(
    path: Path, command: str, question: str, model: Keye, media: Sequence[Medium], answer: Answer,
    ranges: Sequence[ExportRange], settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Writes the record of an answer about media; `question` is the text that the model was asked."""
    segments = model.render([Message("user", (*media, question))], thinking=settings.get("thinking"))
    prompt = "".join(s.value if isinstance(s.value, str) else f"[{s.kind} {_name(s.value)}]" for s in segments)
    videos = [_video_of(medium, plan, ranges) for medium, plan in zip(media, answer.plan, strict=False)]
    sampling = {name: value for name, value in settings.items() if value is not None and name != "thinking"}
    params = model.runtime.sampling_params(**{k: v for k, v in sampling.items() if k not in _NO_SAMPLING})
    _write(path, Record(
        command, question, _now(), asdict(model.runtime.fingerprint),
        {"attention": answer.attention, **{k: v for k, v in asdict(params).items() if v not in (None, (), {})}},
        [prompt], answer.text, ranges,
        {"finished": answer.finish_reason, "tokens": f"{answer.usage.prompt_tokens:,} in the prompt, "
         f"{answer.usage.media_tokens:,} of them visual; {answer.usage.completion_tokens:,} written",
         "seconds": f"{sum(answer.seconds.values()):.1f}"},
        answer.notes, videos, answer.to_dict(),
    ))  # fmt: skip


#: Settings of a reply that are no fields of `SamplingParams`.
_NO_SAMPLING = frozenset({"attention", "n", "logprobs", "deterministic"})


def write_find_record(
    path: Path, model: Keye, source: Source, result: FindResult, prompts: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes the record of a search in one video."""
    ranges, coverage = ranges_of([*result.moments, *result.weaker], result.query), result.coverage
    facts = {
        "looked at": "; ".join(_span_words(coverage)) or "nothing",
        "places looked at closely": f"{coverage.places:,}", "share looked at": f"{coverage.share:.1%}",
        "tokens": f"{coverage.index_tokens:,} of the index, {coverage.query_tokens:,} of the question",
    }  # fmt: skip
    video = RecordedVideo(
        result.video, _sha256(source), source.size, coverage.duration, (), coverage.unseen, facts,
        _pictures(source, MediaOptions(), _moment_times(ranges)), coverage.frames,
        [(span.start, span.end) for span in coverage.seen],
    )  # fmt: skip
    presence = {} if result.presence is None else {"probability that it is there": f"{result.presence:.1%}"}
    threshold = {"threshold": f"{result.threshold:.0%}", "ended early": "yes" if result.stopped else "no"}
    seconds = {"seconds": ", ".join(f"{stage} {value:.1f}" for stage, value in result.seconds.items())}
    _write(path, Record(
        "keye find", result.query, _now(), asdict(model.runtime.fingerprint), dict(settings or {}), prompts, "", ranges,
        {**presence, **threshold, **seconds}, [note.text for note in result.notes], [video], result.to_dict(),
    ))  # fmt: skip


def _write(path: Path, record: Record) -> None:
    with output_file(path) as draft:
        draft.write_text(to_html(record), encoding="utf-8", errors="replace")


def _video_of(medium: Medium, plan: Mapping[str, Any], ranges: Sequence[ExportRange]) -> RecordedVideo:
    times = [float(time) for time in plan.get("timestamps", ()) if is_number(time)]
    duration = float(plan.get("duration") or (times[-1] if times else 0.0))
    source, part = medium.source, plan.get("part") or (0.0, duration)
    unseen = [(start, end) for start, end in ((0.0, part[0]), (part[1], duration)) if end - start > 0.05]
    facts = {name.replace("_", " "): plan[name] for name in _FACTS if plan.get(name) is not None}
    if len(times) > 1:
        gaps = [later - earlier for earlier, later in pairwise(times)]
        facts["longest time between two frames"] = f"{max(gaps):.2f} s"
    pictures: list[Picture] = []
    if medium.kind == "video" and isinstance(source, Source) and not is_index(source):
        spread = times[:: max(1, -(-len(times) // _OF_FRAMES))]
        pictures = _pictures(source, media_options("video", medium.options), [*_moment_times(ranges), *spread])
    known = source if isinstance(source, Source) else None
    name = str(plan.get("name") or _name(medium))
    return RecordedVideo(name, None if known is None else _sha256(known), None if known is None else known.size,
                         duration, times, unseen, facts, pictures, len(times))  # fmt: skip


def _moment_times(ranges: Sequence[ExportRange]) -> list[float]:
    return [time for item in ranges[: _OF_MOMENTS // 2] for time in (item.start, (item.start + item.end) / 2)]


def _pictures(source: Source, options: MediaOptions, times: Sequence[float]) -> list[Picture]:
    """Frames at these times; none where the video cannot be read again."""
    wanted = sorted(set(times))
    try:
        thumbnails = make_thumbnails(source, wanted, _HEIGHT, options=options)
    except MediaError:
        return []
    return [Picture(picture.timestamp, picture.jpeg) for picture in thumbnails]


def _span_words(coverage: Coverage) -> list[str]:
    spans = [f"{span.start:.1f} to {span.end:.1f} s every {span.spacing:.2g} s" + (" (closely)" if span.close else "")
             for span in coverage.seen]  # fmt: skip
    return spans[:50] + ([f"and {plural(len(spans) - 50, 'more span')}"] if len(spans) > 50 else [])


def _sha256(source: Source) -> str:
    return source_hash(source).hex()


def _name(value: Medium | str) -> str:
    source = value.source if isinstance(value, Medium) else value
    return getattr(source, "name", type(source).__name__)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
