"""One thread a process and repeatable examples: tests run side by side on small machines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; more threads than cores stall one another

from hypothesis import settings

settings.register_profile("keye", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("keye")
