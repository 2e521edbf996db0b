"""`--record`: puts together what `keye.exports.record` writes, from an answer or from what a search has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.chat.messages import Medium, Message
from keye.commands.shared.export import ExportPlan, plan_media_exports
from keye.commands.shared.outputs import check_not_input, check_suffix
from keye.config.media import media_options
from keye.errors import is_number
from keye.exports import ExportRange
from keye.exports.find_record import find_record, format_now, moment_times, read_pictures
from keye.exports.record import Picture, Record, RecordedVideo, to_html
from keye.files import check_output, has_mark, output_file
from keye.media.content import source_hash
from keye.media.source.fetch import Source, is_index

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.moments import FindResult
    from keye.sessions.answer import Answer

#: Pictures of frames that belong to no moment.
_OF_FRAMES = 12
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
        command, question, format_now(), asdict(model.runtime.fingerprint),
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
    _write(path, find_record(result, source, asdict(model.runtime.fingerprint), prompts, settings))


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
        pictures = read_pictures(source, [*moment_times(ranges), *spread], media_options("video", medium.options))
    known = source if isinstance(source, Source) else None
    name = str(plan.get("name") or _name(medium))
    return RecordedVideo(name, None if known is None else _sha256(known), None if known is None else known.size,
                         duration, times, unseen, facts, pictures, len(times))  # fmt: skip


def _sha256(source: Source) -> str:
    return source_hash(source).hex()


def _name(value: Medium | str) -> str:
    source = value.source if isinstance(value, Medium) else value
    return getattr(source, "name", type(source).__name__)
