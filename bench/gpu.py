"""One GPU: Motet against Hugging Face `Trainer` and a bare PyTorch loop of the same shape:
`bench/gpu.sh [--json] [--tiny]`.

Every arm trains the same decoder (`--preset 1b`: 16 layers, width 2,048, vocabulary 50,304) on
synthetic tokens with whole optimizer steps: bf16 products, fp32 weights, clipping at norm 1, fused
AdamW. Each arm is a process of its own and prints when it is done, so that a run that is cut short
keeps what it has. Arms:

  attention       milliseconds of the attention kernels alone, forward and backward, and TFLOP/s of
                  one large matrix product
  motet           the native engine, every block compiled, the loss too
  bare            the plainest good PyTorch: torch.compile of the whole model, SDPA, autocast,
                  F.cross_entropy
  hf              Hugging Face Trainer: LlamaForCausalLM, SDPA, bf16, torch_compile
  motet-documents as motet, with documents of 800 tokens on average, which attention does not cross
  (flex attention) motet-eager     as motet, without compilation
  ARM+cudnn       as ARM, with cuDNN's attention kernel first

Step time is the median after warm-up, between CUDA events. MFU divides
`models.counts.training_flops_per_token` (6 N + 12 L D T, PaLM, arXiv:2204.02311, appendix B: the
whole T x T square) by `--peak-tflops`, 790 by default: an 8192-cubed bf16 product on an H200,
measured; `mfu_causal` counts the causal half of the square only. With documents both still count
the sequence as one document.

Phases: `data` is until the forward pass starts, `forward` holds the loss (and, in Motet, the head's
gradient), `backward` also the norm and the clipping. Trainer shows forward and backward as one.
`rest` is what lies between the update and the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from gpu_arms import Clock, attention_arm, bare_arm, hf_arm, motet_arm, shape_of
from torch.nn.attention import SDPBackend, sdpa_kernel

MOTET = ("motet", "motet+cudnn", "motet-eager")
PEERS = ("bare", "hf", "bare+cudnn", "hf+cudnn")
ARMS = ("attention", "motet", "bare", "hf", "motet-documents", "motet+cudnn", "motet-eager")
LEAST_ARM_S = 40.0  # an arm is not started with less time left


def measure(o: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in this process."""
    from motet.models.counts import training_flops_per_token

    torch.manual_seed(0)
    name, _, kernel = o.arm.partition("+")
    if name == "attention":
        return attention_arm(o)
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[None] = nullcontext()
    if kernel == "cudnn":
        context = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *order], set_priority=True)
    clock, started = Clock(o.device), time.perf_counter()
    arms: dict[str, Callable[[], list[float]]] = {
        "motet": lambda: motet_arm(o, clock, compiled=True),
        "motet-eager": lambda: motet_arm(o, clock, compiled=False),
        "motet-documents": lambda: motet_arm(o, clock, compiled=True, documents=True),
        "bare": lambda: bare_arm(o, clock),
        "hf": lambda: hf_arm(o, clock),
    }
    with context:
        losses = arms[name]()
    steps = clock.steps()
    totals = [sum(step.values()) for step in steps[o.warmup :]]
    shape, step_ms = shape_of(o), statistics.median(totals)
    tokens_per_s = 1e3 * o.tokens * o.micro_batches / step_ms
    flops = training_flops_per_token(shape, o.length)
    square = 12 * shape.n_layers * shape.query_width * o.length
    peak = o.peak_tflops * 1e12
    return {
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * flops / peak,
        "mfu_causal": tokens_per_s * (flops - square / 2) / peak,
        "step_ms": step_ms,
        "step_ms_range": [min(totals), max(totals)],
        "phases_ms": {
            phase: statistics.median(step.get(phase, 0.0) for step in steps[o.warmup :])
            for phase in steps[-1]
        },
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if clock.cuda else None,
        "loss": [losses[0], losses[-1]],
        "process_s": time.perf_counter() - started,
    }


def in_process(o: argparse.Namespace, arm: str, length: int, left_s: float) -> dict[str, Any]:
    """Run one arm in a fresh interpreter; a failure is a result too."""
    settings = {**vars(o), "arm": arm, "length": length}
    command = [sys.executable, __file__, "--settings", json.dumps(settings)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=None if o.profile else subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = child.communicate(timeout=left_s)
    except BaseException as error:
        os.killpg(child.pid, signal.SIGKILL)  # compilers' workers are in its session
        child.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return {"error": f"cut off after {left_s:.0f} s"}
    if child.returncode:
        return {"error": "\n".join((errors or out).strip().splitlines()[-12:])}
    return dict(json.loads(out.strip().splitlines()[-1]))


def results(o: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the arms in turn, round after round, until all are done or the time is over."""
    end = time.monotonic() + o.budget_s
    for number in range(o.rounds):
        for length in o.lengths:
            for arm in o.arms:
                head = {"round": number, "length": length, "arm": arm}
                left_s = end - time.monotonic()
                if left_s < LEAST_ARM_S:
                    yield {**head, "error": f"not started: {left_s:.0f} s left"}
                else:
                    yield {**head, **in_process(o, arm, length, left_s)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per length, Motet's best against the fastest peer; medians over rounds.

    Documents count on neither side.
    """
    found = []
    for length in dict.fromkeys(row["length"] for row in rows):
        speeds: dict[str, list[float]] = {}
        for row in rows:
            if row["length"] == length and "tokens_per_s" in row:
                speeds.setdefault(row["arm"], []).append(row["tokens_per_s"])
        median = {arm: statistics.median(values) for arm, values in speeds.items()}
        best, peer = (
            max((a for a in median if a in side), key=median.__getitem__, default=None)
            for side in (MOTET, PEERS)
        )
        line: dict[str, Any] = {"length": length, "best": best, "fastest_peer": peer}
        if best and peer:
            line["ratio"] = median[best] / median[peer]
        found.append(line)
    return found


def described(row: dict[str, Any]) -> str:
    """Return one row as text."""
    head = f"T={row['length']} {row['arm']:<16}"
    if "error" in row:
        return f"{head} {row['error']}"
    if "tokens_per_s" not in row:
        return f"{head} " + ", ".join(
            f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)
        )
    memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"
    phases = ", ".join(f"{name} {value:.1f}" for name, value in row["phases_ms"].items())
    low, high = row["step_ms_range"]
    return (
        f"{head} {row['tokens_per_s']:>9,.0f} tokens/s, MFU {row['mfu']:.1%} (causal "
        f"{row['mfu_causal']:.1%}), peak {memory}, "
        f"step {row['step_ms']:.1f} ms ({low:.1f} to {high:.1f}): {phases}; loss "
        f"{row['loss'][-1]:.3f}; {row['process_s']:.0f} s"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--tokens", type=int, default=32_768, help="of one micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="of one step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--peak-tflops", type=float, default=790.0)
    parser.add_argument("--budget-s", type=float, default=560.0, help="for all arms together")
    parser.add_argument("--profile", action="store_true", help="a table of kernels per arm")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    o = parsed()
    if o.settings:
        settings = argparse.Namespace(**json.loads(o.settings))
        settings.precision = "bf16" if settings.device == "cuda" else "fp32"
        print(json.dumps(measure(settings)))
        return 0
    rows = []
    for row in results(o):
        rows.append(row)
        print(json.dumps(row) if o.json else described(row), flush=True)
    for line in summary(rows):
        ratio = f"{line['ratio']:.3f}" if "ratio" in line else "not known"
        text = f"T={line['length']}: {line['best']} / {line['fastest_peer']} = {ratio}"
        print(json.dumps(line) if o.json else text, flush=True)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
