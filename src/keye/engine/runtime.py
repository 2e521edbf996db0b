"""What belongs to one loaded model and is shared by the engine, sessions, evaluation and every front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.cache.ledger import Ledger
from keye.cache.prefix import PrefixCache
from keye.cache.slabs import KVOptions, KVStore
from keye.cache.vision import VisionCache
from keye.chat.template import ChatTemplate, template_of
from keye.chat.tokenizer import Tokenizer
from keye.config import GenerationConfig, KeyeConfig
from keye.engine.adapters import Adapters
from keye.engine.media import VideoIndex
from keye.engine.prompt import PromptBuilder
from keye.engine.request import check_attention
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError
from keye.media.processor import Processor
from keye.media.source.fetch import Source
from keye.models.adapters import Adapter
from keye.models.attention import AttentionMode
from keye.models.keye import KeyeModel

if TYPE_CHECKING:
    from keye.cache.fingerprint import Fingerprint
    from keye.chat.foreign_template import CheckpointTemplate


@dataclass(frozen=True)
class Runtime:
    """A model and everything that is computed with it; create one with `Runtime.create`.

    `attention` is the mode of requests that name none. `store` holds keys and values; every byte of it, of the caches,
    of `adapters` and of scratch is reserved in `ledger`. `notes` are sentences about what loading left out or took for
    granted. `open_index` opens an index of a video as the beginning of prompts; without it, indexes are rejected.
    `folder` holds the files of the model, None for one that was made in memory.
    """

    name: str
    model: KeyeModel
    tokenizer: Tokenizer
    processor: Processor
    generation_config: GenerationConfig
    template: ChatTemplate | CheckpointTemplate
    attention: AttentionMode
    kv: KVOptions
    ledger: Ledger
    store: KVStore
    vision_cache: VisionCache
    prefixes: PrefixCache
    adapters: Adapters
    notes: tuple[str, ...] = ()
    open_index: Callable[[Runtime, Source], VideoIndex] | None = None
    folder: Path | None = None

    @classmethod
    def create(
        cls,
        name: str,
        model: KeyeModel,
        tokenizer: Tokenizer,
        processor: Processor,
        generation_config: GenerationConfig | None = None,
        *,
        attention: AttentionMode = "sparse",
        template: ChatTemplate | CheckpointTemplate | None = None,
        kv: KVOptions | None = None,
        notes: Sequence[str] = (),
        open_index: Callable[[Runtime, Source], VideoIndex] | None = None,
        folder: Path | None = None,
    ) -> Runtime:
        """A runtime with empty caches. `template` is keye's own for the model's release by default; `attention`
        "sparse" becomes "dense" for a model without an indexer."""
        check_attention(attention)
        generation_config, kv = generation_config or GenerationConfig(), kv or KVOptions()
        own = template_of(model.config.release, generation_config.default_system)
        if not isinstance(template, ChatTemplate | None):
            template = template.for_model(own, generation_config.default_system)
        ledger = Ledger(kv.memory)
        store = kv.store(kv.layout(model.cache_rows(), model.dtype), model.device, ledger)
        return cls(
            name=name, model=model, tokenizer=tokenizer, processor=processor, generation_config=generation_config,
            template=template or own, attention=attention if model.config.text.sparse is not None else "dense",
            kv=kv, ledger=ledger, store=store, vision_cache=VisionCache(ledger=ledger), prefixes=PrefixCache(store),
            adapters=Adapters(model, ledger), notes=tuple(notes), open_index=open_index, folder=folder,
        )  # fmt: skip

    @property
    def config(self) -> KeyeConfig:
        return self.model.config

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        return self.generation_config.eos_token_ids or self.config.eos_token_ids

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Lays out prompts for the model."""
        open_index = None if self.open_index is None else partial(self.open_index, self)
        return PromptBuilder(self.config, self.tokenizer, self.processor, open_index)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Tells this model from others."""
        from keye.cache.fingerprint import fingerprint

        return fingerprint(self.name, self.model, self.processor.config)

    def forget_weights(self) -> None:
        """Forgets what was computed with weights that were replaced since; the caller has ended what uses it."""
        self.prefixes.clear()
        self.vision_cache.clear()
        self.__dict__.pop("fingerprint", None)

    def resolve_attention(self, attention: AttentionMode | None) -> AttentionMode:
        """The mode of a request that asks for `attention`, None for the default; `KeyeError` for a mode that the model
        does not have."""
        if attention is None:
            return self.attention
        check_attention(attention)
        if attention == "sparse" and self.config.text.sparse is None:
            raise KeyeError(f"{self.name} has no sparse-attention indexer; leave attention out or set it to dense")
        return attention

    def resolve_adapter(self, adapter: str | Adapter | None) -> Adapter | None:
        """The adapter of a request that asks for one by name, or has it; None for the default. `KeyeError` for one that
        is not loaded."""
        return adapter if isinstance(adapter, Adapter | None) else self.adapters.get(adapter)

    def use_by_default(self, name: str) -> None:
        """All requests that name no adapter use this one from now on, and so does whatever else is computed; meant for
        the time before the first of them."""
        self.model.adapter_rows.default = self.adapters.get(name)
        self.forget_weights()

    def sampling_params(self, **options: Any) -> SamplingParams:
        """The model's sampling defaults with the given fields in their place; `None` means not given."""
        known = SamplingParams.fields()
        if unknown := sorted(set(options) - set(known)):
            raise KeyeError(f"unknown option {', '.join(unknown)}; known are {', '.join(known)}")
        chosen = {**self.generation_config.sampling_defaults(), **{k: v for k, v in options.items() if v is not None}}
        if isinstance(chosen.get("stop"), str):
            chosen["stop"] = (chosen["stop"],)
        params, size = SamplingParams(**chosen), self.config.text.vocab_size
        for name, token in params.token_ids:
            if token >= size:
                raise KeyeError(f"{name} has the token {token}; this model's tokens are numbered 0 to {size - 1}")
        return params
