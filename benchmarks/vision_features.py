"""What keeping visual features on disk gains while the vision tower is frozen: seconds of training steps with pixels
and with features.

Random weights in the real widths: the whole vision tower of Keye-VL 2.0 (27 layers, 1,152 wide), its projector, and two
decoder layers of 2.0's width with `--experts` experts, of which 8 are used for a token. Each sample is a video of 16
frames of 256 tokens with one question; everything of the decoder is trained, no head. The first epoch computes and
keeps the features, the second reads them; both times are steps of one sample, by CPU seconds of all threads.

Prints JSON. Run:
    python benchmarks/vision_features.py [--samples 2] [--experts 16] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from benchmarks.train_step import NANO, random_model, spent, wide_config
from keye.chat.messages import Medium, Message
from keye.chat.template import template_of
from keye.chat.tokenizer import Tokenizer
from keye.config import ProcessorConfig
from keye.data.samples import Place, Sample
from keye.engine.media import Frames
from keye.engine.prompt import PromptBuilder
from keye.media.processor import Processor
from keye.models.keye import KeyeModel
from keye.train.features import FeatureCache, encode_media, open_features
from keye.train.layout import Layout
from keye.train.packed import TreeStep
from keye.train.packing import Pack, load, pack
from keye.train.recipe import move_batch

FRAMES, SIDE = 16, 448  # 16 x 16 tokens a frame


def make_pack(layout: Layout, seed: int) -> Pack:
    """A sample alone."""
    pixels = np.random.default_rng(seed).integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    video = Medium("video", Frames(pixels, tuple(float(i) for i in range(FRAMES))), {"max_pixels": SIDE * SIDE})
    messages = (Message("user", (video, "What happens?")), Message("assistant", ("A man opens a door.",)))
    (full,) = pack([layout.lay_out(Sample(messages, (False, True), Place("made here", seed + 1)))], 100_000)
    return full


def learn(model: KeyeModel, full: Pack, cache: FeatureCache) -> None:
    """One sample, from its pixels or features to gradients."""
    packed = move_batch(load(full, cache), model.device)
    x = model.embed(packed.token_ids, encode_media(model, packed, cache))
    hidden = model(x, packed.position_ids, TreeStep(packed.segments, model.config.text, "sparse"))
    hidden.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = wide_config(arguments.experts)
    model = random_model(config)
    for part in (model.visual, model.mlp_AR):
        part.requires_grad_(False)
    processor = Processor(ProcessorConfig.of(config.release))
    layout = Layout(PromptBuilder(config, Tokenizer.from_file(NANO), processor), template_of(config.release))
    packs = [make_pack(layout, seed) for seed in range(arguments.samples)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        cache = open_features(model, trained, Path(folder))
        assert cache is not None, "the tower is frozen"
        learn(model, packs[0], open_features(model, trained, Path(folder) / "warm"))
        epochs = [[spent(lambda full=full: learn(model, full, cache))[0] for full in packs] for _ in range(2)]
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    pixels, features = map(statistics.median, epochs)
    print(json.dumps({
        "tokens": packs[0].length, "visual_tokens": packs[0].samples[0].visual_tokens,
        "pixels_s": round(pixels, 2), "features_s": round(features, 2), "ratio": round(pixels / features, 2),
        "mib_per_sample": round(size / len(packs) / 2**20, 1),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
