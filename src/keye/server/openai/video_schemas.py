"""The bodies of keye's own requests about videos: plans, clips, searches, what a timeline shows, exports, the
library, indexes and live sessions."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from keye.engine.sampling import MAX_SEED
from keye.server.openai.schemas import Body, Interval, MediaDefaults, Name, Object, Preprocess, Sampling, TokenCount


class PlanRequest(Body, Preprocess):
    model: Name | None = None
    content: Annotated[list[Object], Field(fail_fast=True, min_length=1, max_length=256)]


class GroundRequest(Sampling, MediaDefaults):
    video: Object
    event: Annotated[str, Field(min_length=1, max_length=10_000)]
    max_tokens: TokenCount | None = None
    stream: bool | None = None
    evidence: bool = False


class ClipsRequest(Body, Preprocess):
    file_id: Name
    intervals: Annotated[list[Interval], Field(fail_fast=True, min_length=1, max_length=100)]


Seconds = Annotated[float, Field(ge=0, le=1e7)]


class VideoBody(Body, Preprocess):
    """A video: a part of a message, or `{"file_id"}`, `{"url"}` alone."""

    video: Object


class FramesRequest(VideoBody):
    model_config = ConfigDict(json_schema_extra={"examples": [
        {"video": {"file_id": "file-0123"}, "times": [0.5, 12.0], "height": 120}]})  # fmt: skip

    times: Annotated[list[Seconds], Field(fail_fast=True, min_length=1, max_length=60)] = Field(
        description="seconds as players show them; each gets the frame on display then"
    )
    height: Annotated[int, Field(ge=16, le=480)] = 120
    near: bool = Field(default=False, description="a frame nearby may stand for a time: faster in long videos")


class ScenesRequest(VideoBody):
    min_length: Annotated[float, Field(ge=0, le=3600)] = Field(default=0.0, description="seconds; shorter ones join")
    stream: bool | None = None


class SubtitleChoice(Body):
    """Subtitles of a video: the `track` inside it, by number or language, or the `text` of an SRT or WebVTT file."""

    track: Annotated[str, Field(min_length=1, max_length=40)] | None = None
    text: Annotated[str, Field(min_length=1, max_length=4_000_000)] | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if (self.track is None) == (self.text is None):
            raise ValueError("give track or text, one of them")
        return self


class FindRequest(VideoBody):
    model_config = ConfigDict(json_schema_extra={"examples": [
        {"video": {"file_id": "file-0123"}, "event": "the red circle", "top": 5, "stream": True},
        {"video": {"file_id": "file-0123"}, "event": "the vote", "subtitles": {"track": "en"}, "effort": "high"},
    ]})  # fmt: skip

    model: Name | None = None
    event: Annotated[str, Field(min_length=1, max_length=10_000)]
    budget: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None, description="tokens that the question may cost; by default an eighth of the index"
    )
    top: Annotated[int, Field(ge=1, le=100)] = 5
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    effort: Literal["auto", "low", "medium", "high"] = "auto"
    scenes: bool = True
    subtitles: SubtitleChoice | Literal["none", "speech"] | None = Field(
        default=None, description="what players would show unless given; speech has it transcribed"
    )
    stream: bool | None = None


class FolderRequest(Body):
    path: Annotated[str, Field(min_length=1, max_length=4000)]
    watch: bool = True


class LibraryFindRequest(Body):
    model: Name | None = None
    event: Annotated[str, Field(min_length=1, max_length=10_000)]
    budget: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    top: Annotated[int, Field(ge=1, le=100)] = 12
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None


class ExportMoment(Body):
    start: Seconds
    end: Seconds
    label: Annotated[str, Field(max_length=1000)] = Field(default="", description="by default that of the request")
    probability: Annotated[float, Field(ge=0, le=1)] | None = None
    note: Annotated[str, Field(max_length=4000)] = ""
    file: Name | None = Field(default=None, description="its name in `videos`, where there are several")


class ExportRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [
        {"video": {"file_id": "file-0123"}, "format": "fcp7", "rate": "25", "label": "the red circle",
         "moments": [{"start": 3.0, "end": 8.5, "probability": 0.97}], "handles": [1.0, 1.0]},
    ]})  # fmt: skip

    video: Object | None = None
    videos: Annotated[dict[Name, Object], Field(min_length=1, max_length=100)] | None = Field(
        default=None, description="several videos by the names that moments give in `file`"
    )
    moments: Annotated[list[ExportMoment], Field(fail_fast=True, min_length=1, max_length=10_000)]
    format: Name
    label: Annotated[str, Field(max_length=1000)] = ""
    title: Annotated[str, Field(max_length=200)] = ""
    rate: Annotated[str, Field(min_length=1, max_length=20)] | None = None
    start_timecode: Annotated[str, Field(min_length=1, max_length=20)] | None = None
    handles: Annotated[list[Annotated[float, Field(ge=0, le=3600)]], Field(min_length=2, max_length=2)] | None = None
    mode: Literal["sequence", "markers"] = "sequence"
    paths: Annotated[dict[str, Annotated[str, Field(max_length=4000)]], Field(max_length=100)] | None = Field(
        default=None, description='where the user has the videos, by name ("" for the only one): a path or an address'
    )

    @model_validator(mode="after")
    def _check_videos(self) -> Self:
        if (self.video is None) == (self.videos is None):
            raise ValueError("give video or videos, one of them")
        known = {None} if self.videos is None else set(self.videos)
        if unknown := next((moment for moment in self.moments if moment.file not in known), None):
            raise ValueError(f"a moment names the file {unknown.file!r}, which is not among the videos")
        return self


class SubtitlesRequest(Body):
    video: Object | None = None
    subtitles: SubtitleChoice | Literal["speech"] | None = Field(
        default=None, description="what players would show unless given; speech has it transcribed"
    )
    stream: bool | None = None


class IndexRequest(Body, Preprocess):
    model: Name | None = None
    file_id: Name


class LiveRequest(Body, Preprocess):
    model: Name | None = None
    keep: Literal["all", "recent"] = "all"


class LiveAppend(Body):
    frames: (
        Annotated[list[Annotated[str, Field(max_length=50_000_000)]], Field(min_length=1, max_length=256)] | None
    ) = None
    timestamps: Annotated[list[Annotated[float, Field(ge=0, le=1e7)]], Field(max_length=256)] | None = None
    file_id: Name | None = None
    offset: Annotated[float, Field(ge=0, le=1e7)] = 0.0


class LiveAsk(Body):
    question: Annotated[str, Field(min_length=1, max_length=100_000)]
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stream: bool | None = None
    evidence: bool = False
