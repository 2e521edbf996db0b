"""How media become visual tokens: the official values of a release, and those of a checkpoint's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.config.files import ConfigError, check_fields, check_format, read_json, read_keye_fields, required_fields
from keye.releases import V2, Release, find_release, releases_by_architecture

#: The file that says how a checkpoint wants its media prepared, and the one that newer versions of transformers write
#: for videos alone.
PROCESSOR_FILE = "preprocessor_config.json"
VIDEO_PROCESSOR_FILE = "video_preprocessor_config.json"
_KINDS = {
    "size": (
        "patch_size", "merge_size", "image_min_tokens", "image_max_tokens", "video_min_tokens", "video_max_tokens",
        "video_total_tokens", "frame_factor", "min_frames", "max_frames", "processor_min_pixels",
        "processor_max_pixels",
    ),
    "three numbers": ("image_mean", "image_std"),
    "positive": ("fps", "fast_ratio"),
    "share": ("min_frame_similarity",),
    "flag": ("adaptive_budget",),
    "text": ("frame_text",),
}  # fmt: skip


@dataclass(frozen=True)
class ProcessorConfig:
    """How media become visual tokens. One token stands for `factor` x `factor` pixels; budgets are in tokens.

    `release` has the rules. `frame_factor` is what the number of frames is a multiple of, where the release says so.
    `processor_min_pixels` and `processor_max_pixels` limit the second resize; None means there is none.
    `fast_ratio` is the tokens of a fast frame over those of a slow one, `min_frame_similarity` the share of similar
    patches below which a frame is slow.
    `frame_text` is the text before the visual tokens of one video frame; empty means that a video is one run of tokens.
    The text of the official 2.0 processor is not published; the default is the form of 1.5 and is our reading of it.
    """

    release: Release = V2
    patch_size: int = 14
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_min_tokens: int = 4
    image_max_tokens: int = 20480
    processor_min_pixels: int | None = None
    processor_max_pixels: int | None = None
    video_min_tokens: int = 64
    video_max_tokens: int = 256
    video_total_tokens: int = 184320
    fps: float = 2.0
    frame_factor: int = 1
    min_frames: int = 2
    max_frames: int | None = None
    adaptive_budget: bool = False
    fast_ratio: float = 0.3
    min_frame_similarity: float = 0.9
    frame_text: str = "<|frame|>{seconds:.1f}"

    @classmethod
    def of(cls, release: Release | str, **changes: Any) -> ProcessorConfig:
        """The official values of a release, given by its name or itself, with `changes`."""
        release = release if isinstance(release, Release) else find_release(release)
        return cls(**{"release": release, **release.processor_defaults, **changes})

    @property
    def factor(self) -> int:
        """Side of one visual token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def token_pixels(self) -> int:
        """Pixels that one visual token stands for."""
        return self.factor**2

    def count_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of a picture that is encoded at `size` (height, width)."""
        return (size[0] // self.factor) * (size[1] // self.factor)

    def __post_init__(self) -> None:
        required = required_fields(ProcessorConfig)
        check_fields("the processor", vars(self), _KINDS, required=required, form="{where}'s {name} is {value!r}")
        if min(self.image_std) <= 0:
            raise ConfigError(f"the processor's image_std is {self.image_std!r}; all of it must be above 0")
        if self.video_min_tokens > self.video_max_tokens or self.image_min_tokens > self.image_max_tokens:
            raise ConfigError("the processor's minimum of tokens is above its maximum; swap min_tokens and max_tokens")
        check_format("frame_text", self.frame_text, seconds=0.0)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, the release by its name."""
        return {**dataclasses.asdict(self), "release": self.release.name}


def load_processor_config(folder: Path) -> ProcessorConfig:
    """Reads `folder/preprocessor_config.json` if present; absent fields keep the official values of the release,
    to which the architecture in `folder/config.json` belongs.

    `min_pixels`/`max_pixels` of the file are the limits of an image, or, where the release resizes images
    twice, of the processor's second resize. A `keye` object in the file holds our own fields (video budgets,
    `frame_text`); unknown fields in it are errors. A `frame_text` beside the official fields, in this file or in
    `video_preprocessor_config.json`, is the checkpoint's own text before a frame.
    """
    model_file = Path(folder) / "config.json"
    model = read_json(model_file) if model_file.exists() else {}
    known = releases_by_architecture()
    release = next((known[name] for name in model.get("architectures") or [] if name in known), V2)
    config = _read_processor_config(Path(folder) / PROCESSOR_FILE, release, find_frame_text(Path(folder)))
    vision = model.get("vision_config")
    for ours, theirs, default in (("patch_size", "patch_size", 14), ("merge_size", "spatial_merge_size", 2)):
        actual, wanted = getattr(config, ours), isinstance(vision, Mapping) and (vision.get(theirs) or default)
        if wanted and actual != wanted:
            raise ConfigError(
                f"the processor makes {ours} {actual} but vision_config.{theirs} is {wanted}; they must agree"
            )
    return config


def find_frame_text(folder: Path) -> str | None:
    """The text before a video frame that a checkpoint's own files give, None if they give none."""
    for name in (VIDEO_PROCESSOR_FILE, PROCESSOR_FILE):
        raw = read_json(folder / name) if (folder / name).exists() else {}
        for fields in (raw, raw.get("keye") or {}):
            if isinstance(fields, Mapping) and fields.get("frame_text") is not None:
                return fields["frame_text"]  # checked with the other fields
    return None


def has_keye_fields(folder: Path) -> bool:
    """Whether the processor file has a `keye` object: then the checkpoint was made for keye, in keye's formats."""
    path = folder / PROCESSOR_FILE
    return path.exists() and "keye" in read_json(path)


def _read_processor_config(path: Path, release: Release, frame_text: str | None) -> ProcessorConfig:
    brought = {} if frame_text is None else {"frame_text": frame_text}
    if not path.exists():
        return ProcessorConfig.of(release, **brought)
    raw = {name: value for name, value in read_json(path).items() if value is not None}
    check_fields(str(path), raw, {"size": ("patch_size", "merge_size", "min_pixels", "max_pixels"),
                                  "three numbers": ("image_mean", "image_std")})  # fmt: skip
    values: dict[str, Any] = {k: raw[k] for k in ("patch_size", "merge_size") if k in raw}
    for name in ("image_mean", "image_std"):
        if name in raw:
            values[name] = tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
    token = (values.get("patch_size", 14) * values.get("merge_size", 2)) ** 2
    for bound in ("min", "max"):
        if f"{bound}_pixels" not in raw:
            continue
        pixels = raw[f"{bound}_pixels"]
        if release.resizes_images_twice:
            values[f"processor_{bound}_pixels"] = pixels
        else:
            values[f"image_{bound}_tokens"] = max(1, pixels // token)
    own = read_keye_fields(raw, path, {f.name for f in dataclasses.fields(ProcessorConfig)} | {"generation"})
    if "generation" in own:
        raise ConfigError(f"{path} has keye.generation; the field is called release now")
    required = required_fields(ProcessorConfig)
    check_fields(str(path), own, _KINDS, required=required, form="{where} has keye.{name} {value!r}")
    return ProcessorConfig.of(str(own.pop("release", release.name)), **{**values, **brought, **own})
