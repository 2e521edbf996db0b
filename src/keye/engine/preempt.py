"""What a request holds, taken away and given back: at its end for good, at a preemption until there is room again."""

from __future__ import annotations

from pathlib import Path

from keye.cache.saved import SavedCaches
from keye.cache.sequence import KVCache
from keye.engine.request import Choice, Task
from keye.errors import KeyeError


def save(task: Task, folder: Path) -> bool:
    """Frees what a task holds in memory and keeps it in a file of `folder`, so that the task goes on with the same
    numbers. Where the disk has no room, its prompt and what it wrote will be computed again. Returns whether it held
    anything."""
    if task.saved is not None:
        return False  # there was no room to restore it
    held, saved = _caches(task), None
    computed = any(cache.length(0) for _, cache in held)
    if computed:
        past = task.prompt.past if task.prompt is not None else None
        try:
            saved = SavedCaches.save([cache for _, cache in held], folder, () if past is None else past.block_table)
        except KeyeError:  # no room on the disk, or no such folder
            saved = None
    release(task)
    if saved is None:
        _forget(task)
    else:
        task.saved, task.holders = saved, [holder for holder, _ in held]
    return computed


def restore(task: Task) -> bool:
    """Gives a task back what `save` kept. `OutOfMemory` where there is no room, and nothing changes."""
    assert task.saved is not None
    caches = task.saved.restore()
    for holder, cache in zip(task.holders, caches, strict=True):
        holder.cache = cache
    task.saved, task.holders = None, []
    return True


def release(task: Task) -> None:
    """Frees all that a task holds."""
    if task.vision is not None:
        task.vision.close()
        task.vision = None
    if task.saved is not None:
        task.saved.free()
        task.saved, task.holders = None, []
    for holder, cache in _caches(task):
        cache.free()
        holder.cache = None


def _caches(task: Task) -> list[tuple[Task | Choice, KVCache]]:
    """Who of a task holds which sequence."""
    holders: list[Task | Choice] = [task, *task.choices]
    return [(holder, holder.cache) for holder in holders if holder.cache is not None]


def _forget(task: Task) -> None:
    """Back to the prompt: what comes with its tokens comes again."""
    task.done, task.logits, task.prompt_probs, task.counts, task.counted = 0, None, [], None, 0
    for choice in task.live:
        choice.pending, choice.logits = [], None
