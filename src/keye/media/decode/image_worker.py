"""The process that touches untrusted images, and all HEIC and AVIF. Standard library, Pillow and pillow-heif.

Started by `image_reader` with an open file that holds one or more images. Each request line (JSON) names the bytes of
one by `offset` and `length`, and `pixel_limit`. With `pixels` false the answer is an INFO message with the stored size,
the EXIF orientation, the number of pictures and the mode; with `pixels` true (and `strict_official`) it is an INFO
message with size and mode and a FRAME message with the pixels. An ERROR message ends the conversation."""

from __future__ import annotations

import io
import json
import os
import sys
from importlib import import_module
from typing import BinaryIO

from PIL import Image

from keye.media.decode.picture import FORMATS, open_picture, orientation, picture_count, upright
from keye.media.decode.sandbox import confine
from keye.media.decode.wire import FRAME, INFO, WorkerError, report_crashes, send, send_error

#: Parts of Pillow that a format imports only when a file needs them, which is too late for a confined process.
_LAZY = ("Jpeg", "Mpo", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ico", "Avif")


def serve(file: BinaryIO, requests: BinaryIO, out: BinaryIO, formats: tuple[str, ...]) -> None:
    """Answers requests until standard input ends, as the module's docstring says."""
    try:
        for line in requests:
            request = json.loads(line)
            file.seek(request["offset"])
            with open_picture(io.BytesIO(file.read(request["length"])), request["pixel_limit"], formats) as image:
                if not request["pixels"]:
                    facts = {"width": image.width, "height": image.height, "orientation": orientation(image),
                             "pictures": picture_count(image), "mode": image.mode}  # fmt: skip
                    send(out, INFO, json.dumps(facts).encode())
                    continue
                picture = upright(image, strict_official=request["strict_official"])
                facts = {"width": picture.width, "height": picture.height, "mode": picture.mode}
                send(out, INFO, json.dumps(facts).encode())
                send(out, FRAME, picture.tobytes())
    except WorkerError as error:
        send_error(out, *error.args)
    except MemoryError:
        send_error(out, "needs more memory to decode than the limit allows; shrink it first")


def _preload(wanted: list[str]) -> tuple[str, ...]:
    """Imports everything that decoding may need; returns the formats that can be read."""
    for name in _LAZY:
        import_module(f"PIL.{name}ImagePlugin")
    for name in ("ImageSequence", "ImageMath", "ImageChops", "ImageColor", "ImagePalette", "ImageFile", "TiffTags"):
        import_module(f"PIL.{name}")
    # Converting once loads what converting needs; a format that the installed Pillow lacks stays unread.
    for name in FORMATS:
        if name in Image.SAVE and name in Image.OPEN:
            drawn = io.BytesIO()
            Image.new("P", (8, 8)).convert("RGB").save(drawn, name)
            drawn.seek(0)
            upright(open_picture(drawn, 64))
    if "HEIF" in wanted:
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    return (*FORMATS, *(name for name in wanted if name in Image.OPEN))


def main(arguments: list[str]) -> None:
    """Arguments: the options as JSON, and the inherited descriptor of the file."""
    options = json.loads(arguments[0])
    formats = _preload(options["formats"])
    confine(options["memory_bytes"], options["cpu_seconds"])
    report_crashes(sys.stdout.buffer)
    with os.fdopen(int(arguments[1]), "rb", buffering=0) as file:
        try:
            serve(file, sys.stdin.buffer, sys.stdout.buffer, formats)
        except BrokenPipeError:
            # The reader has gone away; leave without the interpreter's own flush of standard output.
            os._exit(0)
