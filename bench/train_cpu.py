"""Training tokens/s against Hugging Face `Trainer`, and what experiments cost: `python
bench/train_cpu.py [--json]`.

Same shape (`--preset`, vocabulary 4,096), same batch, sequence length, AdamW (fused), clipping and
schedule, one process with all cores; each side runs in processes of its own, in turn (A B A B ...),
and the ratio is the median over the pairs. Ours is the whole path of a run: corpus on disk, stream,
plan, digests, ledger, engine. Theirs is `Trainer` over a dataset in memory. The first steps of each
process warm up.

The cost of experiments is measured directly, since it is far below the noise of a step: the time
that overlay, digest and ledger add to reading a step's share, over the time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, WARMUP = 4096, 3


def our_corpus(folder: Path) -> Any:
    """Write random tokens; speed does not depend on them."""
    from motet.experiments.corpora.corpus import CorpusWriter
    from motet.experiments.corpora.tokenizer import train_bpe

    writer = CorpusWriter(folder, train_bpe(["bench " * 50], 300))
    generator = np.random.default_rng(0)
    for number in range(400):
        writer.append(generator.integers(1, 300, 5000, dtype=np.uint16), f"doc-{number}")
    return writer.close()


def our_plan(path: Path, slots: int, length: int) -> Any:
    """Write a plan in which a tenth of all tokens are exposures, as in the demo."""
    from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
    from motet.experiments.stream.placement import Request, Texts, compile_plan
    from motet.experiments.stream.random import text_keys

    n = slots * length // 1000
    rows = np.arange(n, dtype=np.int32)
    texts = Texts(np.ones(n * 100, dtype=np.uint16), np.arange(n + 1, dtype=np.int64) * 100)
    zeros = np.zeros(n, dtype=np.int64)
    request = Request(
        "bench",
        text_keys([f"u{k}" for k in rows]),
        rows,
        zeros.astype(np.int32),
        rows,
        zeros,
        zeros + slots,
        texts,
    )
    write_plan(compile_plan([request], 1, length), path)
    return ExposurePlan(path)


def ours(options: argparse.Namespace) -> dict[str, float]:
    """Train with Motet's own parts, as the step loop does."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    from motet.experiments.stream.batch_sizes import Steps
    from motet.experiments.stream.ledger import LedgerWriter, open_segment
    from motet.experiments.stream.stream import Stream
    from motet.launcher.rank.feed import Feed
    from motet.models.config import preset
    from motet.parallel.engines.native import NativeEngine
    from motet.parallel.engines.protocol import EngineOptions
    from motet.parallel.layout.layout import Layout
    from motet.parallel.runtime.mesh import join, leave

    with tempfile.TemporaryDirectory() as temporary:
        folder, batch, length = Path(temporary), options.batch, options.length
        corpus = our_corpus(folder / "corpus")
        steps = Steps.of(batch)
        plan = our_plan(folder / "exposures.plan", steps.slots_before(options.steps + 100), length)
        world = join("cpu")
        config = preset(options.preset, VOCABULARY)
        layout = Layout(micro_sequences=batch)
        engine = NativeEngine(config, EngineOptions(precision=options.precision), layout, world)
        open_segment(folder, 0, 1, 0, 1, ("p", "d"))
        ledger = LedgerWriter(folder, 1, 0)
        feed = Feed(Stream([corpus], [1.0], length, 0, plan), steps, layout, 0)
        times = []
        for step in range(options.steps):
            started = time.perf_counter()
            share = feed.take(step)
            engine.step(share.batches, 1e-3, lambda loss, norm: True, lambda: False)
            ledger.append(share.record)
            times.append(time.perf_counter() - started)
        feed.close()
        clean = Stream([corpus], [1.0], length, 0)
        with_s, without_s = [], []
        for step in range(200):
            started = time.perf_counter()
            ledger.append(feed.read(step % 50).record)
            middle = time.perf_counter()
            clean.batch(steps.slots_before(step % 50), batch)
            with_s.append(middle - started)
            without_s.append(time.perf_counter() - middle)
        leave()
    step_s = statistics.median(times[WARMUP:])
    added_s = statistics.median(with_s) - statistics.median(without_s)
    return {"tokens_per_s": batch * length / step_s, "added_s": added_s, "step_s": step_s}


def theirs(options: argparse.Namespace) -> dict[str, float]:
    """Train the same shape with transformers' Trainer."""
    import torch
    from torch.utils.data import Dataset
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from motet.models.config import preset

    shape = preset(options.preset, VOCABULARY)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ffn,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_width,
            tie_word_embeddings=shape.tied_embeddings,
            rope_theta=shape.rope_theta,
            max_position_embeddings=options.length,
            use_cache=False,
        )
    )
    tokens = torch.randint(1, 300, (options.batch * 8, options.length))

    class Tokens(Dataset):
        def __len__(self) -> int:
            return options.batch * options.steps

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = tokens[index % len(tokens)]
            return {"input_ids": row, "labels": row}

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012
        last = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            if self.last:
                self.times.append(now - self.last)
            self.last = now

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            learning_rate=1e-3,
            bf16=options.precision == "bf16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[Clock()]).train()
    step_s = statistics.median(Clock.times[WARMUP:])
    return {"tokens_per_s": options.batch * options.length / step_s, "step_s": step_s}


def in_process(side: str, precision: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one side in a fresh interpreter with all cores."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--precision",
        precision,
        "--preset",
        options.preset,
    ]
    command += [
        "--batch",
        str(options.batch),
        "--length",
        str(options.length),
        "--steps",
        str(options.steps),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--preset", default="4m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(ours(options) if options.side == "ours" else theirs(options)))
        return
    result: dict[str, Any] = {
        "preset": options.preset,
        "batch": options.batch,
        "length": options.length,
    }
    costs = []
    for precision in options.precisions:
        ratios, speeds = [], []
        for _ in range(options.pairs):
            mine, other = (in_process(side, precision, options) for side in ("ours", "theirs"))
            ratios.append(mine["tokens_per_s"] / other["tokens_per_s"])
            speeds.append((mine["tokens_per_s"], other["tokens_per_s"]))
            costs.append(mine["added_s"] / mine["step_s"])
        result[f"ratio_vs_hf_{precision}"] = statistics.median(ratios)
        result[f"tokens_per_s_{precision}"] = [
            statistics.median(column) for column in zip(*speeds, strict=True)
        ]
    result["experiments_cost_ratio"] = statistics.median(costs)
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
