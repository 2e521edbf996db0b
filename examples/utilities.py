"""The official utilities with one changed import, on the bundled video: python examples/utilities.py

Needs keye alone, no extra.
"""

from __future__ import annotations

# Was: from keye_vl_utils import process_vision_info
from keye.compat.processor import OfficialProcessor
from keye.compat.utils_1_5 import process_vision_info
from keye.config import ProcessorConfig
from keye.hub import asset


def main() -> None:
    """Slow and fast frames of the demo, and the prompt that Keye-VL-1.5 would read for them."""
    video = {"type": "video", "video": str(asset("demo.mp4")), "fps": 1, "max_pixels": 256 * 784}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]
    images, videos, kwargs = process_vision_info(messages)
    types = kwargs["frame_types"][0].tolist()
    print(
        f"{types.count(0)} slow frames of {kwargs['height'][0]}x{kwargs['width'][0]} pixels, {types.count(1)} fast ones"
    )
    output = OfficialProcessor(ProcessorConfig.of("1.5"))("<|video_pad|>", images, videos, **kwargs)
    print(output.text[0].replace("<|video_pad|>", ".")[:120], "...")


if __name__ == "__main__":
    main()
