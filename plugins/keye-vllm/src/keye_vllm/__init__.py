"""Keye-VL-2.0 in vLLM, as a plug-in that vLLM finds by itself: `pip install keye-vllm`, then `vllm serve MODEL`.

vLLM brings the engine and the layers of the decoder; keye brings the indexer, sparse attention, the vision tower, media
and prompts. What each module knows:

* `config`: the configuration that vLLM reads, and which settings of vLLM it allows.
* `model`, `decoder`: the networks; `attention`: sparse attention over vLLM's blocks; `cache`: the rows in them.
* `media`: images and videos of a prompt; `prompts`: conversations.

Of keye only the names of `keye` itself and `keye.spi` are imported.
"""

from __future__ import annotations

import re

from keye import KeyeError

#: vLLM that this was tested with: at least the first, below the second.
TESTED = ((0, 32), (0, 33))
ARCHITECTURES = ("KeyeVL2MoeForConditionalGeneration", "KeyeVL2ForConditionalGeneration")


def register() -> None:
    """Makes vLLM know Keye-VL-2.0; vLLM calls it in each of its processes. KeyeError for a vLLM of another version."""
    try:
        import vllm
    except ImportError:
        raise KeyeError("keye-vllm needs vLLM: pip install 'keye-vllm[vllm]'") from None
    check_version(vllm.__version__)
    from keye_vllm import hooks

    hooks.install()


def check_version(version: str) -> None:
    """`KeyeError` unless this is a version of vLLM that the plug-in was tested with."""
    match = re.match(r"(\d+)\.(\d+)", version)
    least, below = (".".join(map(str, pair)) for pair in TESTED)
    if match is None or not TESTED[0] <= (int(match[1]), int(match[2])) < TESTED[1]:
        raise KeyeError(
            f"keye-vllm was tested with vLLM from {least} on and below {below}, and this is {version}: install one of "
            f"those (pip install 'vllm>={least},<{below}'), or a keye-vllm that was made for it"
        )
