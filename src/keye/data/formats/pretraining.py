"""What is learnt word by word, without questions: texts, captions, and texts with images and videos in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from keye.data.files.tar import VIDEOS
from keye.data.formats.context import Context
from keye.data.formats.conversations import around, read_turns
from keye.data.formats.media import MAX_MEDIA, MediaFields
from keye.data.formats.talk import Talk, Turn
from keye.data.samples import BadRow
from keye.errors import brief


def read_text(fields: Mapping[str, Any], context: Context) -> Talk:
    """`text` or `caption`, with the media of the row at its tags or before it."""
    text = fields.get("text", fields.get("caption"))
    if isinstance(text, list):  # several captions of one image: the first
        context.notes.add("of several captions the first is learnt")
        text = text[0] if text else None
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"the text is {brief(text)}; give words")
    return around(fields, [Turn("assistant", text)])


def read_interleaved(fields: Mapping[str, Any], context: Context) -> Talk:
    """`texts` beside `images` (OBELICS, MMC4): lists of equal length, at each place a text or an image; or lists of
    questions with replies (`{"user": ..., "assistant": ...}`)."""
    texts, images = fields["texts"], fields.get("images") or []
    if not isinstance(texts, list) or not texts or len(texts) > MAX_MEDIA:
        raise BadRow(f"texts is {brief(texts)}; give a list of at most {MAX_MEDIA:,}")
    if isinstance(texts[0], Mapping):
        return around({name: value for name, value in fields.items() if name != "texts"}, read_turns("texts", texts))
    if not isinstance(images, list) or len(texts) != len(images):
        raise BadRow(
            f"texts has {len(texts)} entries and images {brief(images)}; give at each place a text or an image"
        )
    parts: list[Any] = []
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise BadRow("texts and images have both or none at a place; give at each place a text or an image")
        parts.append({"type": "image"} if text is None else text)
    media = MediaFields([image for image in images if image is not None])
    return Talk([Turn("assistant", parts)], media, plain=True)


def by_file_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with `file_name` (folders of images or videos, as `datasets` reads them) as the medium that it is."""
    name = fields.get("file_name")
    if not isinstance(name, str) or any(fields.get(kind) for kind in ("image", "images", "video", "videos")):
        return dict(fields)
    kind = "video" if PurePosixPath(name).suffix.lower().removeprefix(".") in VIDEOS else "image"
    return {kind if key == "file_name" else key: value for key, value in fields.items()}
