"""What ranks of tests import, loaded once in the process that they are forked from."""

from __future__ import annotations

import os
from importlib import import_module, util
from unittest import mock

SLOW = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.profiler",
    "pytest",
    "motet.parallel.engines.native",
    "motet.launcher.rank.checkpoint",
    "accelerate",
    "transformers",
    "deepspeed",
    "torch._inductor.compile_fx",  # which deepspeed.initialize imports
)

# Each rank that compiles would start a pool of processes that import torch once more.
READ_BY_IMPORTS = {"DS_ACCELERATOR": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

with mock.patch.dict(os.environ, READ_BY_IMPORTS):
    for _name in SLOW:
        if util.find_spec(_name.partition(".")[0]):
            import_module(_name)
