"""An official script for transformers with changed imports, on keye-nano: python examples/transformers_script.py

Needs the extra hf: pip install 'keye[hf]', in a clone .venv/bin/pip install -c constraints.txt -e '.[hf]'
"""

from __future__ import annotations

try:
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: TID251  (the extra hf)
except ImportError:
    raise SystemExit("this script needs transformers, which the extra hf installs: pip install 'keye[hf]'") from None

import keye.hf  # noqa: F401  (the Auto classes then know Keye)

# Was: from keye_vl_utils import process_vision_info
from keye.compat.utils_1_5 import process_vision_info
from keye.hub import asset


def main() -> None:
    """What keye-nano says about the demo, and the times that it received."""
    folder = str(asset("nano"))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(folder)
    video = {"type": "video", "video": str(asset("demo.mp4")), "fps": 2}
    question = {"type": "text", "text": "when is the cyan triangle visible?"}
    messages = [{"role": "user", "content": [video, question]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, mm_kwargs = process_vision_info(messages)
    inputs = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt", **mm_kwargs)
    inputs = inputs.to(model.device)
    ids = model.generate(**inputs, max_new_tokens=32)
    length = inputs["input_ids"].shape[1]
    prompt = processor.decode(ids[0, :length], skip_special_tokens=False)
    print(prompt.replace("<|video_pad|>", "")[:120], "...")
    print(processor.batch_decode(ids[:, length:])[0])


if __name__ == "__main__":
    main()
