"""What is stored of a prompt before it is computed, and what is kept of it afterwards. Knows requests, no tensors."""

from __future__ import annotations

from keye.cache.prefix import PrefixCache, cut_points
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.config import KeyeConfig
from keye.engine.request import Task


def find_past(task: Task, prefixes: PrefixCache, store: KVStore, config: KeyeConfig) -> KVCache:
    """The sequence from which a prompt goes on: that of its index, a prefix that is known, or an empty one."""
    prompt = task.prompt
    assert prompt is not None
    if prompt.past is not None:
        return prompt.past.fork()
    if not task.request.deterministic and task.request.prompt_logprobs is None:
        spans = prompt.spans
        found = None if spans is None else prefixes.find(prompt.token_ids, spans, _secret(task))
        if found is not None:
            return found
    return KVCache(config.text.num_hidden_layers, store)


def remember(task: Task, prefixes: PrefixCache) -> None:
    """Keeps a complete prompt for whoever begins with it, where there is room."""
    prompt, cache = task.prompt, task.cache
    assert prompt is not None and cache is not None
    if task.request.deterministic or prompt.past is not None:
        return
    if (spans := prompt.spans) is not None:
        prefixes.keep(prompt.token_ids, spans, _secret(task), cache, cut_points(task.length, spans))


def _secret(task: Task) -> bytes:
    """What parts one owner's prefixes from another's, and one way to compute from another."""
    return task.request.salt + b"\0" + task.request.attention.encode()
