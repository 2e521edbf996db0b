"""keye's network behind the interface of a generative model of `transformers`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from keye.cache.sequence import KVCache
from keye.chat.tokenizer import Tokenizer
from keye.config import ProcessorConfig, load_generation_config
from keye.config.media import MediumKind
from keye.engine.engine import Engine
from keye.engine.prompt import Prompt
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams
from keye.engine.step import ALONE_TOKENS
from keye.errors import KeyeError, KeyeWarning
from keye.hf.config import KeyeConfigHF, KeyeVL1_5ConfigHF, KeyeVL2ConfigHF, folder_of
from keye.media.pixels.patches import VisionInput
from keye.media.positions import build_position_ids
from keye.media.processor import MediaItem, Processor, VisualSpan
from keye.models.attention import CachedStep, Span
from keye.models.keye import KeyeModel, visual_mask
from keye.models.load import load_model, save_model, torch_dtype
from keye.process import check_device


class _Model(transformers.PreTrainedModel):
    """keye's network behind the interface of a generative model of `transformers`.

    Legend: B rows, L tokens of the longest row, V vocabulary, T tokens of all rows without padding.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")

    def __init__(self, config: Any, network: KeyeModel | None = None) -> None:
        super().__init__(config)
        self.network = KeyeModel(config.keye) if network is None else network
        self.generation_defaults = load_generation_config(Path(config.name_or_path or "."))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> _Model:
        """Loads a folder, or a checkpoint by its name on the hub. `dtype` and `device_map` are honoured, where
        "auto" is the first GPU, if there is one; options that keye does not know are errors."""
        config = options.pop("config", None)
        dtype, device = options.pop("dtype", None), _one_device(options.pop("device_map", None))
        dtype = options.pop("torch_dtype", None) if dtype is None else dtype
        attention = options.pop("attn_implementation", None)
        if config is not None:  # the Auto classes put the option there; the library would look for its own code for it
            attention, config._attn_implementation = attention or config._attn_implementation, None
        if attention is not None:
            text = f"attn_implementation={attention!r} has no effect; keye chooses its own attention"
            warnings.warn(KeyeWarning(text), stacklevel=2)
        folder = folder_of(pretrained_model_name_or_path, options)
        if config is None:
            config = cls.config_class.from_pretrained(str(folder))
        official = config.keye
        if dtype in (None, "auto"):
            dtype = official.dtype
        chosen = dtype if isinstance(dtype, torch.dtype) else torch_dtype(str(dtype))
        network, _ = load_model(folder, official, device=device, dtype=chosen)
        config.name_or_path = str(folder)
        return cls(config, network).eval()

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Writes `config.json` and the weights under their official names."""
        if options:
            raise KeyeError(f"unknown option {', '.join(sorted(options))}; save_pretrained takes only a folder.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_model(self.network, folder)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.network.model.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.network.lm_head

    def can_generate(self) -> bool:
        """False for `transformers`, whose own completion this class does not use; see `generate`."""
        return False

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, *, logits_to_keep: int = 0, return_dict: bool = True, **inputs: Any) -> Any:
        """Logits float32 [B, L, V] of whole sequences, 0 at padding; with `logits_to_keep` n > 0 only the last n.

        `input_ids` int64 [B, L]; see `_prompts` for the other inputs, which are those of the processor.
        """
        length, keep = input_ids.shape[1], logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(input_ids.shape[0], keep, self.network.config.text.vocab_size, device=input_ids.device)
        for row, (places, prompt) in enumerate(self._prompts(input_ids, **inputs)):
            is_wanted = places >= length - keep
            logits[row, places[is_wanted] - (length - keep)] = self.network.logits(self._hidden(prompt)[is_wanted])
        return CausalLMOutputWithPast(logits=logits) if return_dict else (logits,)

    @torch.inference_mode()
    def generate(
        self, input_ids: Tensor, *, do_sample: bool | None = None, max_new_tokens: int | None = None,
        max_length: int | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """The rows with their replies behind them, int64 [B, L + n], short ones filled up with the padding token.

        Greedy unless `do_sample`; `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and `seed` then count,
        the model's `generation_config.json` for those not given. `eos_token_id` and `pad_token_id` replace the model's.
        `max_new_tokens` (512) counts before `max_length`, which includes the prompt. There is one reply for each row:
        no beams. The rest are the inputs of `forward`; unknown options are errors.
        """
        for name in ("num_beams", "num_return_sequences"):
            if (number := options.pop(name, None)) not in (None, 1):
                raise KeyeError(f"{name} is {number!r}: keye generates one reply without beams; leave it at 1.")
        if max_new_tokens is None:
            max_new_tokens = 512 if max_length is None else max_length - input_ids.shape[1]
            if max_new_tokens < 1:
                length = input_ids.shape[1]
                raise KeyeError(f"max_length is {max_length}, but the prompt has {length} tokens; raise it.")
        config, defaults = self.network.config, self.generation_defaults
        eos = options.pop("eos_token_id", None) or defaults.eos_token_ids or config.eos_token_ids
        eos = (eos,) if isinstance(eos, int) else tuple(eos)
        pad = options.pop("pad_token_id", None)
        pad = next(iter(value for value in (pad, config.pad_token_id, *eos) if value is not None), 0)
        do_sample = defaults.do_sample if do_sample is None else do_sample
        fields = {name: options.pop(name) for name in SamplingParams.fields() if name in options}
        settings = {name: value for name, value in fields.items() if value is not None}
        if do_sample:
            own = {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p")}
            settings = {"temperature": 1.0, **{k: v for k, v in own.items() if v is not None}, **settings}
        else:
            settings["temperature"] = 0.0
        stops = tuple(token for token in eos if 0 <= token < config.text.vocab_size)
        params = SamplingParams(**{**settings, "max_tokens": max_new_tokens, "stop_token_ids": stops})
        # The parameters may be changed between calls, so nothing is cached from one to the next.
        runtime = Runtime.create("transformers", self.network, Tokenizer.blank(), Processor(ProcessorConfig()))
        prompts = [prompt for _, prompt in self._prompts(input_ids, **options)]
        try:
            results = Engine(runtime).generate(prompts, params, ignore_eos=True)
        finally:  # ledger and prefixes refer to each other: what they hold would wait for garbage collection
            runtime.prefixes.clear()
        replies = [list(result.completions[0].token_ids) for result in results]
        longest = max(map(len, replies))
        filled = [reply + [pad] * (longest - len(reply)) for reply in replies]
        return torch.cat([input_ids, torch.tensor(filled, device=input_ids.device)], dim=1)

    def _prompts(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None, video_grid_thw: Tensor | None = None, use_cache: bool | None = None,
        **unknown: Any,
    ) -> Iterator[tuple[Tensor, Prompt]]:  # fmt: skip
        """For each row the places of its tokens, and these as a prompt.

        `attention_mask` [B, L] is 0 at padding; `position_ids` int64 [3, B, L] as the processor gives them, else they
        follow from the grids; patches [P, 3, 14, 14] and grids [n, 3] of all images and of all videos in the order of
        the rows. Everything is computed again for each call: `use_cache` has no effect.
        """
        if names := sorted(name for name, value in unknown.items() if value is not None):
            raise KeyeError(f"unknown input {', '.join(names)}; keye.hf is for inference, train with `keye train`.")
        config = self.network.config
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        merge = config.vision.spatial_merge_size
        rows = {
            config.image_token_id: _Rows("image", pixel_values, image_grid_thw, merge),
            config.video_token_id: _Rows("video", pixel_values_videos, video_grid_thw, merge),
        }
        for row in range(input_ids.shape[0]):
            places = mask[row].nonzero()[:, 0]
            ids = input_ids[row, places].cpu()
            # In the order of their placeholders: as long as they are of one kind, as one medium.
            runs = groupby(token for token in ids.tolist() if token in rows)
            media = [rows[token].take(len(list(run))) for token, run in runs]
            if position_ids is not None:
                positions = position_ids[:, row, places].cpu()
            else:
                grids = {
                    token: np.concatenate([item.grid_thw for item in media if item.kind == source.kind])
                    for token, source in rows.items()
                    if any(item.kind == source.kind for item in media)
                }
                array, _ = build_position_ids(ids.tolist(), grids, merge_size=merge)
                positions = torch.from_numpy(array)
            yield places, Prompt(ids, positions, visual_mask(config, ids), int(positions.max()) + 1, tuple(media))

    def _hidden(self, prompt: Prompt) -> Tensor:
        """Hidden states [n, d] of a row, computed in chunks of the same size as by the engine."""
        network, text = self.network, self.network.config.text
        patches = prompt.vision()
        visual = None if patches is None else network.encode_vision(patches[0].to(network.device), patches[1])
        x = network.embed(prompt.token_ids.to(network.device), visual)
        positions = prompt.position_ids.to(network.device)
        cache, hidden = KVCache(text.num_hidden_layers), list[Tensor]()
        for start in range(0, prompt.length, ALONE_TOKENS):
            part = slice(start, min(start + ALONE_TOKENS, prompt.length))
            step = CachedStep([Span(0, part.stop - part.start, cache)], text)
            hidden.append(network(x[part], positions[:, part], step))
        return torch.cat(hidden)


class _Rows:
    """Patches and grid rows of one kind of media, given to the rows of a batch in order."""

    def __init__(self, kind: MediumKind, patches: Tensor | None, grid: Tensor | None, merge_size: int) -> None:
        if patches is not None and grid is None:
            raise KeyeError("pixel values need their grid: pass image_grid_thw or video_grid_thw as well.")
        self.kind, self._merge, self._row = kind, merge_size**2, 0
        self._grid = np.zeros((0, 3), dtype=np.int64) if patches is None or grid is None else grid.cpu().numpy()
        self._patches = None if patches is None else patches.float().cpu().numpy()
        self._starts = np.concatenate([[0], self._grid.prod(axis=1).cumsum()])

    def take(self, tokens: int) -> MediaItem:
        """The next grid rows, whose visual tokens are `tokens`."""
        first, count = self._row, 0
        while count < tokens and self._row < len(self._grid):
            count += int(self._grid[self._row].prod()) // self._merge
            self._row += 1
        if count != tokens:
            raise KeyeError(f"a row has {tokens} {self.kind} placeholders, but the {self.kind}s give {count} visual "
                            "tokens for them: use the processor.")  # fmt: skip
        assert self._patches is not None
        patches = self._patches[self._starts[first] : self._starts[self._row]]
        vision = VisionInput(patches, self._grid[first : self._row])
        return MediaItem(self.kind, vision, (VisualSpan(self.kind, tokens),))


def _one_device(device_map: Any) -> str:
    """The device that a `device_map` stands for; keye keeps a model on one."""
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(devices) != 1:
        raise KeyeError(f"device_map is {device_map!r}: keye keeps a model on one device, such as cuda:0.")
    device = devices.pop()
    if device is None:
        return "cpu"
    if isinstance(device, int):
        device = f"cuda:{device}"
    elif device in ("auto", "balanced", "balanced_low_0", "sequential"):
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    check_device(str(device))
    return str(device)


class KeyeForConditionalGeneration(_Model):
    """Preview."""

    config_class = KeyeConfigHF


class KeyeVL1_5ForConditionalGeneration(_Model):
    """1.5."""

    config_class = KeyeVL1_5ConfigHF


class KeyeVL2MoeForConditionalGeneration(_Model):
    """2.0 and keye-nano."""

    config_class = KeyeVL2ConfigHF
