"""What the utilities of all releases share: the media of a conversation, and the options beside each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS, MediaOptions, MediumKind, media_options
from keye.errors import KeyeError

Item = Mapping[str, Any]

#: Keys, and types, of items that hold a medium.
_MEDIA = ("image", "image_url", "video", "video_url")
#: Keys of an item that are no options.
_OTHER_KEYS = frozenset({"type", "text", *_MEDIA})
#: The side of one visual token, in pixels, in every Keye-VL model.
FACTOR = 28


def extract_vision_info(conversations: Sequence[Any]) -> list[dict[str, Any]]:
    """The items with an image or a video of a conversation, or of a list of them, in order.

    An item counts by its key (`image`, `image_url`, `video`, `video_url`) or by its `type`.
    """
    several = conversations if conversations and not isinstance(conversations[0], Mapping) else [conversations]
    contents = [message["content"] for conversation in several for message in conversation]
    items = (item for content in contents if not isinstance(content, str) for item in content)
    return [item for item in items if any(key in item or item.get("type") == key for key in _MEDIA)]


def kind_of(item: Item) -> MediumKind:
    """Whether an item holds an image or a video; `KeyeError` when it names neither."""
    if "image" in item or "image_url" in item:
        return "image"
    if "video" in item or "video_url" in item:
        return "video"
    raise KeyeError(f"an item of type {item.get('type')!r} has none of {', '.join(_MEDIA)}; add the medium itself")


def picture_of(item: Item) -> Any:
    """The image of an item: `image`, or `image_url`, which may be the object of the OpenAI form. Of a picture in memory
    the official utilities keep no transparency but that of RGBA; that of files is kept."""
    value = medium_of(item, "image")
    if isinstance(value, Image.Image) and value.mode != "RGBA" and value.has_transparency_data:
        return value.convert("RGB")
    return value


def medium_of(item: Item, kind: MediumKind) -> Any:
    """The medium of an item: `video`, or `video_url`, which may be the object of the OpenAI form; so for images."""
    if kind in item:
        return item[kind]
    key = f"{kind}_url"
    if key not in item:
        raise KeyeError(f"the item has neither {kind} nor {key}; add the {kind}")
    url = item[key]
    if not isinstance(url, Mapping):
        return url
    if "url" not in url:
        raise KeyeError(f"the object {key} has no url; add it")
    return url["url"]


def options_of(item: Item, kind: MediumKind, *, total_key: str) -> MediaOptions:
    """The options beside a medium. A key that no release of the utilities reads for this kind gets a warning; so does
    one of two sides of a size without the other, which the utilities ignore."""
    known = IMAGE_OPTIONS if kind == "image" else VIDEO_OPTIONS
    options = {key: value for key, value in item.items() if key in known and value is not None}
    unused = sorted(item.keys() - known - _OTHER_KEYS)
    if ("resized_height" in options) != ("resized_width" in options):
        unused += [key for key in ("resized_height", "resized_width") if options.pop(key, None) is not None]
    other = {"total_pixels", "video_total_pixels"} - {total_key}
    unused += [key for key in other if key in options and total_key in options and options.pop(key) is not None]
    if unused:
        warnings.warn(f"{', '.join(unused)} has no effect on this {kind}", stacklevel=4)
    return media_options(kind, options)


def check_factor(factor: int) -> None:
    """`KeyeError` for a token size that no Keye-VL model has."""
    if factor != FACTOR:
        raise KeyeError(f"the factor is {factor}; every Keye-VL model has tokens of {FACTOR} x {FACTOR} pixels")
