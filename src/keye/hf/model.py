"""keye's network behind the interface of a generative model of `transformers`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from keye.cache.sequence import KVCache
from keye.config import load_generation_config
from keye.engine.generate import PREFILL_CHUNK, Decoding, generate
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError, KeyeWarning
from keye.hf.config import KeyeConfigHF, KeyeVL1_5ConfigHF, KeyeVL2ConfigHF, folder_of
from keye.media.positions import build_position_ids
from keye.models.attention import AttentionMode, CachedStep, Span
from keye.models.keye import KeyeModel
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
            warnings.warn(
                KeyeWarning(f"attn_implementation={attention!r} has no effect; keye chooses its own attention"),
                stacklevel=2,
            )
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

    @property
    def _mode(self) -> AttentionMode:
        return "dense" if self.network.config.text.sparse is None else "sparse"

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.network.model.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.network.lm_head

    def can_generate(self) -> bool:
        """False for `transformers`, whose own generation this class does not use; see `generate`."""
        return False

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, *, logits_to_keep: int = 0, return_dict: bool = True, **inputs: Any) -> Any:
        """Logits float32 [B, L, V] of whole sequences, 0 at padding; with `logits_to_keep` n > 0 only the last n.

        `input_ids` int64 [B, L]; see `_rows` for the other inputs, which are those of the processor.
        """
        length, keep = input_ids.shape[1], logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(input_ids.shape[0], keep, self.network.config.text.vocab_size, device=input_ids.device)
        for row, (places, hidden, _, _) in enumerate(self._rows(input_ids, **inputs)):
            kept = places >= length - keep
            logits[row, places[kept] - (length - keep)] = self.network.logits(hidden[kept])
        return CausalLMOutputWithPast(logits=logits) if return_dict else (logits,)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        *,
        do_sample: bool | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> Tensor:
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
                raise KeyeError(
                    f"max_length is {max_length}, but the prompt has {input_ids.shape[1]} tokens; raise it."
                )
        config, defaults = self.network.config, self.generation_defaults
        eos = options.pop("eos_token_id", None) or defaults.eos_token_ids or config.eos_token_ids
        eos = (eos,) if isinstance(eos, int) else tuple(eos)
        pad = options.pop("pad_token_id", None)
        pad = next(iter(value for value in (pad, config.pad_token_id, *eos) if value is not None), 0)
        do_sample = defaults.do_sample if do_sample is None else do_sample
        given = {name: options.pop(name) for name in SamplingParams.fields() if name in options}
        settings = {name: value for name, value in given.items() if value is not None}
        if do_sample:
            own = {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p")}
            settings = {"temperature": 1.0, **{k: v for k, v in own.items() if v is not None}, **settings}
        else:
            settings["temperature"] = 0.0
        params = SamplingParams(**{**settings, "max_tokens": max_new_tokens})
        replies = []
        for _, hidden, cache, position in self._rows(input_ids, **options):
            decoding = Decoding(self.network, mode=self._mode)
            decoding.cache, decoding.position = cache, position
            decoding.logits = self.network.logits(hidden[-1:])[0]
            reply, ended = [], False
            for token in generate(decoding, params, ()):
                reply.append(token)
                if ended := token in eos:
                    break
            assert ended or len(reply) == max_new_tokens
            replies.append(reply)
        longest = max(map(len, replies))
        filled = [reply + [pad] * (longest - len(reply)) for reply in replies]
        return torch.cat([input_ids, torch.tensor(filled, device=input_ids.device)], dim=1)

    def _rows(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        use_cache: bool | None = None,
        **unknown: Any,
    ) -> Iterator[tuple[Tensor, Tensor, KVCache, int]]:
        """For each row: the places of its tokens, their hidden states [n, d], its cache, and the next position.

        `attention_mask` [B, L] is 0 at padding; `position_ids` int64 [3, B, L] as the processor gives them, else they
        follow from the grids; patches [P, 3, 14, 14] and grids [n, 3] of all images and of all videos in the order of
        the rows. Everything is computed again for each call: `use_cache` has no effect.
        """
        if given := sorted(name for name, value in unknown.items() if value is not None):
            raise KeyeError(f"unknown input {', '.join(given)}; keye.hf is for inference, train with `keye train`.")
        config = self.network.config
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kinds = {config.image_token_id: (pixel_values, image_grid_thw),
                 config.video_token_id: (pixel_values_videos, video_grid_thw)}  # fmt: skip
        visual = {token: self._encode(*medium) for token, medium in kinds.items() if medium[0] is not None}
        grids = {token: _Grids(medium[1], config.vision.spatial_merge_size) for token, medium in kinds.items()}
        taken = dict.fromkeys(kinds, 0)
        for row in range(input_ids.shape[0]):
            places = mask[row].nonzero()[:, 0]
            ids = input_ids[row, places]
            parts = self.network.embed(torch.where(_among(ids, kinds), 0, ids))
            used = {}
            for token in kinds:
                here = ids == token
                count = int(here.sum())
                tokens = visual.get(token, parts.new_zeros(0, parts.shape[1]))[taken[token] : taken[token] + count]
                if len(tokens) != count:
                    raise KeyeError(
                        f"row {row} has {count} placeholders of id {token}, but {len(tokens)} visual tokens."
                    )
                parts[here] = tokens.to(parts.dtype)
                taken[token] += count
                if count:
                    used[token] = grids[token].take(count)
            if position_ids is not None:
                positions = position_ids[:, row, places]
            else:
                array, _ = build_position_ids(ids.tolist(), used, merge_size=config.vision.spatial_merge_size)
                positions = torch.from_numpy(array).to(ids.device)
            hidden, cache = self._prefill(parts, positions)
            yield places, hidden, cache, int(positions.max()) + 1

    def _encode(self, patches: Tensor | None, grid: Tensor | None) -> Tensor:
        if patches is None or grid is None:
            raise KeyeError("pixel values need their grid: pass image_grid_thw or video_grid_thw as well.")
        return self.network.encode_vision(patches.to(self.network.device), grid.to(self.network.device))

    def _prefill(self, x: Tensor, positions: Tensor) -> tuple[Tensor, KVCache]:
        """Hidden states [n, d] of one row, computed in the same chunks as by `keye.engine`, and its cache."""
        text = self.network.config.text
        cache, hidden = KVCache(text.num_hidden_layers), []
        for start in range(0, x.shape[0], PREFILL_CHUNK):
            part = slice(start, min(start + PREFILL_CHUNK, x.shape[0]))
            step = CachedStep([Span(0, part.stop - part.start, cache)], text, mode=self._mode)
            hidden.append(self.network(x[part], positions[:, part], step))
        return torch.cat(hidden), cache


def _among(ids: Tensor, tokens: Mapping[int, object]) -> Tensor:
    return torch.isin(ids, torch.tensor(list(tokens), device=ids.device))


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


class _Grids:
    """Grid rows handed out to the rows of a batch, by the visual tokens each of them holds."""

    def __init__(self, grid: Tensor | None, merge_size: int) -> None:
        self._rows = [] if grid is None else grid.tolist()
        self._merge = merge_size**2

    def take(self, tokens: int) -> np.ndarray:
        """The next rows, whose visual tokens are `tokens`."""
        taken, count = [], 0
        while count < tokens and self._rows:
            taken.append(self._rows.pop(0))
            count += int(np.prod(taken[-1])) // self._merge
        if count != tokens:
            raise KeyeError(f"a row has {tokens} visual placeholders, but the grids give {count}: use the processor.")
        return np.array(taken)


class KeyeForConditionalGeneration(_Model):
    """Preview."""

    config_class = KeyeConfigHF


class KeyeVL1_5ForConditionalGeneration(_Model):
    """1.5."""

    config_class = KeyeVL1_5ConfigHF


class KeyeVL2MoeForConditionalGeneration(_Model):
    """2.0 and keye-nano."""

    config_class = KeyeVL2ConfigHF
