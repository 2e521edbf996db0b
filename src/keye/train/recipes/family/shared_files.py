"""Files of the output folder that all processes of a run make alike: the first one writes them."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from keye.files import complete_file


def write_shared(path: Path, text: str) -> None:
    """Writes a file, complete or not at all; every process calls this, and goes on once the file is there."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with complete_file(path) as draft:
            draft.write_text(text, encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
