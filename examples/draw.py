"""Reads the places in a reply and draws them on a picture: python examples/draw.py [OUT]

Needs keye alone, no extra. keye-nano marks no places, so the reply is written here by hand; with
a larger model it is `answer.regions`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from keye.chat.replies import parse_reply
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.hub import asset
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader
from keye.sessions.pictures import draw_regions

REPLY = (
    "<|object_ref_start|>cyan triangle<|object_ref_end|><|polygon_start|>[[[775, 618], [922, 893], [625, 893]]]"
    "<|polygon_end|>, <|object_ref_start|>red circle<|object_ref_end|><|point_start|>[[142, 230]]<|point_end|> and "
    "<|ocr_text_start|>95<|ocr_text_end|><|box_start|>[[75, 700, 330, 875]]<|box_end|>"
)


def main(out: Path) -> None:
    """Draws on the frame at 8 seconds of the bundled video."""
    with VideoReader(fetch_source(asset("demo.mp4"))) as reader:
        frames = reader.read(reader.plan(ProcessorConfig(), MediaOptions(video_start=8.0, video_end=8.5, nframes=1)))
    reply = parse_reply(REPLY)
    for region in reply.regions:
        print(region.to_dict())
    draw_regions(Image.fromarray(frames[0]), reply.regions).save(out)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "marked.png"))
