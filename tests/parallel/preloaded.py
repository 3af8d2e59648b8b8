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

with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
    for _name in SLOW:
        if util.find_spec(_name.partition(".")[0]):
            import_module(_name)
