"""What a release of Keye-VL is: every rule that differs between releases, as attributes and methods of one object.

Numbers, strings and integer arithmetic only. Code that needs numpy or torch lives in `keye.media` and `keye.models` and
is chosen by these attributes. The defaults here are what most releases have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from keye.errors import KeyeError


@dataclass(frozen=True)
class FrameDemand:
    """What decides how many frames of a video are sampled.

    `total` frames at `native_fps` are there; the token budget holds `cap` of the fewest tokens. `fps`, `nframes`,
    `min_frames`, `max_frames` are the request's, None where it sets nothing, the `default_` values and `frame_factor`
    the configuration's. `strict`: the official code, oddities included.
    """

    total: int
    native_fps: float
    cap: int
    fps: float | None
    nframes: int | None
    min_frames: int | None
    max_frames: int | None
    default_fps: float
    default_min_frames: int
    default_max_frames: int | None
    frame_factor: int
    strict: bool


@dataclass(frozen=True)
class FrameBudget:
    """What decides the size of a video's frames, in pixels.

    `slow` slow and `fast` fast frames share `total`; a fast one costs `fast_ratio` of a slow one. `smallest` and
    `largest` limit one frame by configuration, `min_pixels` and `max_pixels` by request (or None). A token is `token`
    pixels.
    """

    slow: int
    fast: int
    total: float
    smallest: int
    largest: int
    min_pixels: float | None
    max_pixels: float | None
    token: int
    fast_ratio: float
    frame_factor: int
    strict: bool


class Release:
    """The rules of one release. A new release is a subclass with what differs, given to `register`."""

    name: str
    #: Names in `architectures` of `config.json`, and what each promises: layers may have a DSA indexer ("sparse"), may
    #: route to experts ("moe"), or are those of DeepSeek-V3 ("latent").
    architectures: Mapping[str, tuple[Literal["sparse", "moe", "latent"], ...]]
    #: The published checkpoint on the hub.
    hub_name: str | None = None

    # Networks

    #: A video is one grid row: the vision tower attends over all its frames, its tokens are one span without labels.
    whole_video: bool = False
    #: The projector normalises single patches, before it merges them.
    norm_before_merge: bool = False
    #: What one second of video adds to the time axis of M-RoPE where the configuration does not say; None: a frame is
    #: placed like an image, and its time is in the text.
    tokens_per_second: float | None = None

    # Prompts

    #: keye has no chat template of its own for the release: the checkpoint must bring one.
    needs_template: bool = False
    #: The system message of a conversation without one.
    default_system: str | None = None
    #: How reasoning is switched: in the reply's beginning, or by /think and /no_think after the last user message.
    thinking: Literal["prefill", "suffix"] = "prefill"
    #: Ids of tokens in the official tokenizer that its files do not document.
    official_token_ids: Mapping[str, int] = {}

    # Media

    #: Fields of `ProcessorConfig` whose official values differ from its defaults.
    processor_defaults: Mapping[str, Any] = {}
    #: Whether the image processor of the release, with the text before a frame, is published.
    processor_is_published: bool = True
    #: The image processor resizes what the utilities have sized a second time: `min_pixels` and `max_pixels` of
    #: `preprocessor_config.json` are its limits. Otherwise they are the limits of an image.
    resizes_images_twice: bool = True
    #: Transparent pixels become white; otherwise the alpha channel is dropped.
    puts_alpha_on_white: bool = False
    #: Who resizes frames: the decoder, we (bilinear, antialiased), or the utilities and then the image processor.
    frame_resize: Literal["decoder", "bilinear", "twice"] = "decoder"
    #: Pictures of a list that stands for a video are sized as images, and all are used; otherwise they are sized and
    #: sampled as frames.
    sizes_lists_as_images: bool = False
    #: Marks around the visual tokens of a fast frame. None: frames are not classified as slow and fast.
    fast_frame_marks: tuple[str, str] | None = None
    #: Several videos share one token budget.
    splits_budget: bool = False
    #: A single short video may get a share of the budget by its length: (most seconds, share), ascending.
    adaptive_shares: tuple[tuple[float, float], ...] = ()
    #: The official code honours `video_start` and `video_end`.
    official_parts: bool = True
    #: The official code honours `resized_height` and `resized_width` for frames.
    official_frame_size: bool = False

    @property
    def classifies_frames(self) -> bool:
        """Whether frames are slow or fast, which is known once they are decoded."""
        return self.fast_frame_marks is not None

    @property
    def reads_frames_alone(self) -> bool:
        """Whether a frame can be encoded without knowing the others: live sessions need that."""
        return not (self.whole_video or self.classifies_frames)

    def smallest_counted_frame(self, smallest: float, min_pixels: float | None) -> float:
        """Pixels of the frames by which a budget is counted: `smallest` is the configuration's, `min_pixels` the
        request's. Whatever limits a request sets, unless a release says otherwise."""
        return smallest

    def count_frames(self, demand: FrameDemand) -> int:
        """How many frames are sampled: at most as many as the budget holds.

        n = min(max(int(total / native * fps), min_frames), max_frames, cap, total). `max_frames` is the
        configuration's where the request names no number of frames. Officially `nframes` is ignored.
        """
        cap = min(demand.cap, demand.total)
        nframes = None if demand.strict else demand.nframes
        limit = demand.max_frames
        if limit is None and demand.default_max_frames is not None and nframes is None:
            limit = max(demand.default_max_frames, demand.min_frames or 0)
        if limit is not None:
            cap = min(cap, limit)
        if nframes is not None:
            return min(nframes, cap)
        wanted = int(demand.total / demand.native_fps * min((demand.fps or demand.default_fps), demand.native_fps))
        return min(max(wanted, self.least_frames(demand)), cap)

    def least_frames(self, demand: FrameDemand) -> int:
        """The number of frames that a video gets at least where the budget allows it."""
        return demand.min_frames or demand.default_min_frames

    def frame_limits(self, budget: FrameBudget) -> tuple[float, float]:
        """Least and most pixels of a slow frame. The configuration's smallest frame is a floor for the request's."""
        least = budget.smallest if budget.min_pixels is None else int(budget.min_pixels)
        low = max(least, budget.smallest)
        high = budget.largest if budget.max_pixels is None else budget.max_pixels
        token = budget.token
        tokens = find_tokens_per_frame(
            budget.slow, low / token, high / token, budget.total / token, fast=budget.fast, ratio=budget.fast_ratio
        )
        return low, tokens * token

    def allowed_pixels(self, total: float, frames: int, token: int) -> float:
        """What the official rules may make of a budget of `total` pixels: a frame gets up to a token too many."""
        return total + frames * token

    def label_seconds(self, seconds: float) -> float:
        """A frame's time as its label counts it."""
        return seconds

    def __repr__(self) -> str:
        return f"<Keye-VL {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return find_release, (self.name,)


def find_tokens_per_frame(
    slow: int, low: float, high: float, budget: float, *, fast: int = 0, ratio: float = 0.3
) -> float:
    """Tokens that each of `slow` frames may have under a budget of tokens, between `low` and `high`; each of `fast`
    frames costs `ratio` of that, at least `low`.

    The official binary search ends on the first number above the budget, one more than fits; kept for parity.
    """
    left, right = low, high
    while left < right:
        middle = int(left + right) // 2
        if slow * middle + fast * max(int(ratio * middle), int(low)) > budget:
            right = middle
        else:
            left = middle + 1
    return left


R = TypeVar("R", bound=Release)

#: Every release by its name.
RELEASES: dict[str, Release] = {}


def register(release: R) -> R:
    """Makes a release known by its name and its architectures; returns it."""
    RELEASES[release.name] = release
    return release


def find_release(name: str) -> Release:
    """The release of this name, in any case. `KeyeError` for one that is not known."""
    for release in RELEASES.values():
        if release.name.lower() == name.lower():
            return release
    raise KeyeError(f"the release {name!r} is not known; known are {', '.join(RELEASES)}")


def releases_by_architecture() -> dict[str, Release]:
    """Every known architecture name of a `config.json` with the release that it belongs to."""
    return {name: release for release in RELEASES.values() for name in release.architectures}
