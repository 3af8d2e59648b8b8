"""scratch"""
from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from motet.parallel.engine import EngineOptions, build_engine
from tests.parallel.training import share


def group_names(engine, world) -> dict[str, str]:
    names = {world.control.group_name: "control"}
    def put(pg, name):
        if pg.size() > 1:
            pass
            names[pg.group_name] = name
    for d in ("pp", "dp_replicate", "fsdp", "tp"):
        put(engine.meshes.dense[d].get_group(), d)
    if engine.meshes.experts is not None:
        for d in ("edp", "ep", "etp"):
            put(engine.meshes.experts[d].get_group(), d)
        e = engine.meshes.experts
        if e["dp_replicate"].size() > 1:
            put(e["dp_replicate"].get_group(), "dp_replicate")
    if engine.meshes.context is not None:
        put(engine.meshes.context, "cp")
    return names


class Recorder(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        ns = func.namespace
        if ns in ("c10d", "_c10d_functional", "c10d_functional") and "wait" not in func.__name__:
            pg = None
            for a in [*args, *(kwargs or {}).values()]:
                if isinstance(a, torch.ScriptObject):
                    try:
                        pg = dist.ProcessGroup.unbox(a).group_name
                        break
                    except Exception as e:
                        pass
                if isinstance(a, str) and a in self.names:
                    pg = a
            def sizes(x):
                if isinstance(x, Tensor): return [x.numel() * x.element_size()]
                if isinstance(x, (list, tuple)): return [s for y in x for s in sizes(y)]
                return []
            self.seen.append((self.names.get(pg, pg), f"{ns}.{func.__name__}", sum(sizes(args)), tuple(sizes(args))))
        return out


def scratch(world, layout, config, masked):
    engine = build_engine(config, EngineOptions(z_loss=1e-3), layout, world)
    names = group_names(engine, world)
    out = []
    for step in range(3):
        batches, _ = share(layout, world.rank, step, masked)
        with Recorder(names) as r:
            engine.step(batches, 1e-3, lambda a, b: True, False)
        out.append(r.seen)
    same = [Counter((x[0], x[1], x[2]) for x in s) for s in out]
    return [s == same[1] for s in same], sorted(Counter((x[0], x[1], x[3] if len(x[3])<8 else x[2]) for x in out[1]).items(), key=str)
