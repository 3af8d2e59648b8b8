"""The arms of `gpu.py`: each trains the same shape in its own way, or times kernels.

Settings `o` are those of `gpu.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

MEAN_DOCUMENT_TOKENS = 800
BETAS, DECAY, CLIP, RATE = (0.9, 0.95), 0.1, 1.0, 1e-4


class Clock:
    """Marks along the steps of an arm: on the GPU's own time line, without waiting for it."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[tuple[str, bool, Any]] = []

    def mark(self, phase: str, step: bool = False) -> None:
        """Begin a phase, and with `step` a step."""
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((phase, step, now))

    def steps(self) -> list[dict[str, float]]:
        """Return milliseconds per phase of every step; the last mark only ends the last step."""
        if self.cuda:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        for (phase, step, start), (_, _, end) in zip(self.marks, self.marks[1:], strict=False):
            if step:
                found.append({})
            spent = start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
            found[-1][phase] = found[-1].get(phase, 0.0) + spent
        return found


class Bare(nn.Module):
    """A decoder of Llama's shape as one would write it without a library."""

    def __init__(self, shape: Any, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary_size, shape.d_model)
        self.blocks = nn.ModuleList(BareBlock(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.head = nn.Linear(shape.d_model, shape.vocabulary_size, bias=False)
        exponents = torch.arange(0, shape.head_width, 2).float() / shape.head_width
        angles = torch.arange(length).float()[:, None] / shape.rope_theta**exponents
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=shape.init_std)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


class BareBlock(nn.Module):
    def __init__(self, shape: Any) -> None:
        super().__init__()
        width, inner = shape.d_model, shape.d_ffn
        self.head_width = shape.head_width
        self.q, self.k, self.v, self.gate, self.up = (
            nn.Linear(width, out, bias=False)
            for out in (shape.query_width, shape.kv_width, shape.kv_width, inner, inner)
        )
        self.o = nn.Linear(shape.query_width, width, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=shape.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (
            p(y).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        q, k = turn(q, cos, sin).to(v.dtype), turn(k, cos, sin).to(v.dtype)
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class Batch:
    """Tokens of one micro-batch, as the stream gives them."""

    def __init__(self, o: argparse.Namespace, seed: int, documents: bool) -> None:
        generator = np.random.default_rng(seed)
        shape = (o.tokens // o.length, o.length)
        self.tokens_BT = generator.integers(0, o.vocabulary, shape, dtype=np.int32)
        self.labels_BT = np.full(shape, -100, dtype=np.int64)
        self.labels_BT[:, :-1] = self.tokens_BT[:, 1:]
        starts = generator.random(shape) < 1 / MEAN_DOCUMENT_TOKENS
        self.document_ids_BT = np.cumsum(starts, 1, dtype=np.int32) if documents else None


def batches(o: argparse.Namespace, documents: bool = False) -> list[list[Batch]]:
    """Return the micro-batches of four steps, to be used in turn."""
    many = range(o.micro_batches)
    return [[Batch(o, 100 * step + micro, documents) for micro in many] for step in range(4)]


def shape_of(o: argparse.Namespace) -> Any:
    from motet.models.config import preset

    return preset(o.preset, o.vocabulary)


def run_steps(
    o: argparse.Namespace, clock: Clock, step: Callable[[int], float | Tensor]
) -> list[float]:
    """Take all steps; return their losses."""
    losses = []
    for number in range(o.warmup + o.steps):
        clock.mark("data", step=True)
        losses.append(step(number))
    clock.mark("end")
    if o.profile:
        from torch.profiler import profile

        with profile() as traced:
            step(0)
        key = "self_device_time_total" if clock.cuda else "self_cpu_time_total"
        print(traced.key_averages().table(sort_by=key, row_limit=30), file=sys.stderr)
        clock.marks = clock.marks[: 1 + max(i for i, m in enumerate(clock.marks) if m[0] == "end")]
    return [float(loss) for loss in losses]


def motet_arm(
    o: argparse.Namespace, clock: Clock, compiled: bool, documents: bool = False
) -> list[float]:
    """Train with the native engine, as the step loop does."""
    from motet.parallel.engines import native as engine_native
    from motet.parallel.engines.protocol import EngineOptions
    from motet.parallel.layout.layout import Layout
    from motet.parallel.runtime.mesh import join, leave

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

    def drawn(name: str, shape: tuple[int, ...], config: Any, seed: int) -> Tensor:
        norm = name.split(".")[-2].endswith("norm")
        ones = torch.ones(shape, device=o.device)
        return ones if norm else ones.normal_(0.0, config.init_std)

    # On the device: drawing a billion reproducible numbers on the CPU takes longer than the steps.
    engine_native.initial_value = drawn  # type: ignore[attr-defined]
    options = EngineOptions(precision=o.precision, compile=compiled, betas=BETAS, clip_norm=CLIP)
    layout = Layout(micro_sequences=o.tokens // o.length)
    engine = engine_native.NativeEngine(shape_of(o), options, layout, join(o.device))
    decoder = engine.decoders[0]
    decoder.register_forward_pre_hook(lambda *_: clock.mark("forward"))
    decoder.register_forward_hook(lambda *_: clock.mark("backward"))
    engine.optimizer.register_step_pre_hook(lambda *_: clock.mark("optimizer"))
    engine.optimizer.register_step_post_hook(lambda *_: clock.mark("rest"))
    data = batches(o, documents)

    def step(number: int) -> float:
        result = engine.step(data[number % 4], RATE, lambda loss, norm: True, lambda: False)
        return result.loss

    losses = run_steps(o, clock, step)
    leave()
    return losses


def bare_arm(o: argparse.Namespace, clock: Clock) -> list[float]:
    """Train without any library."""
    with torch.device(o.device):
        plain = Bare(shape_of(o), o.length)
    model = torch.compile(plain)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
    data = [
        [(torch.from_numpy(b.tokens_BT).long(), torch.from_numpy(b.labels_BT)) for b in step]
        for step in batches(o)
    ]

    def step(number: int) -> Tensor:
        losses = []
        for tokens, labels in data[number % 4]:
            tokens, labels = (x.to(o.device, non_blocking=True) for x in (tokens, labels))
            clock.mark("forward")
            with torch.autocast(o.device, torch.bfloat16, enabled=o.precision == "bf16"):
                loss = model(tokens, labels) / o.micro_batches
            clock.mark("backward")
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        clock.mark("optimizer")
        optimizer.step()
        clock.mark("rest")
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    return run_steps(o, clock, step)


def hf_arm(o: argparse.Namespace, clock: Clock) -> list[float]:
    """Train with transformers' Trainer."""
    from torch.utils.data import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    shape = shape_of(o)
    config = LlamaConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ffn,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_width,
        rope_theta=shape.rope_theta,
        max_position_embeddings=o.length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(o.device):
        model = LlamaForCausalLM(config)
    if {p.dtype for p in model.parameters()} != {torch.float32}:
        raise RuntimeError("the weights of LlamaForCausalLM are not fp32, unlike all other arms'")
    rows = torch.cat([torch.from_numpy(b.tokens_BT) for step in batches(o) for b in step]).long()

    class Tokens(Dataset):
        def __len__(self) -> int:
            return o.tokens // o.length * o.micro_batches * (o.warmup + o.steps)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": rows[index % len(rows)], "labels": rows[index % len(rows)]}

    class Marks(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.mark("forward and backward", step=True)

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.mark("optimizer")

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.mark("rest")

    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            output_dir=folder,
            per_device_train_batch_size=o.tokens // o.length,
            gradient_accumulation_steps=o.micro_batches,
            max_steps=o.warmup + o.steps,
            optim="adamw_torch_fused",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta2=BETAS[1],
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            bf16=o.precision == "bf16",
            use_cpu=o.device == "cpu",
            torch_compile=True,
            logging_nan_inf_filter=False,  # it would wait for the device in every step
            logging_steps=10**6,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[Marks()])
        loss = trainer.train().training_loss
    clock.mark("end")
    return [loss]


def attention_arm(o: argparse.Namespace) -> dict[str, float]:
    """Time the attention kernels at the shape of the model, and a large matrix product."""
    from motet.models import flex
    from motet.models.attention import attend, document_positions

    shape = shape_of(o)
    dtype = torch.bfloat16 if o.precision == "bf16" else torch.float32
    size = (o.tokens // o.length, o.length)
    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    qkv = [
        torch.randn(*size, h, shape.head_width, device=o.device, dtype=dtype, requires_grad=True)
        for h in heads
    ]
    slope = torch.randn_like(qkv[0])

    def once(mask: Any = None) -> None:
        torch.autograd.grad(attend(*qkv, mask), qkv, slope)

    found: dict[str, float] = {}
    if o.device == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                found[f"{backend.name.lower()}_ms"] = milliseconds(once, o)
        ids = Batch(o, 0, documents=True).document_ids_BT
        positions = document_positions(torch.from_numpy(ids).to(o.device))[0]
        blocks = flex.block_mask(torch.arange(o.length, device=o.device) - positions)
        found["flex_documents_ms"] = milliseconds(lambda: once(blocks), o)
        one = flex.block_mask(torch.zeros_like(positions))
        found["flex_one_document_ms"] = milliseconds(lambda: once(one), o)
        found["block_mask_ms"] = milliseconds(lambda: flex.block_mask(positions * 0), o)
    else:
        found["sdpa_ms"] = milliseconds(once, o)
    side = 8192 if o.device == "cuda" else 512
    a, b = (torch.randn(side, side, device=o.device, dtype=dtype) for _ in range(2))
    found["matrix_product_tflops"] = 2e-9 * side**3 / milliseconds(lambda: a @ b, o)
    return found


def milliseconds(action: Callable[[], Any], o: argparse.Namespace) -> float:
    """Return the median time of an action."""
    clock = Clock(o.device)
    for _ in range(o.warmup + o.steps):
        clock.mark("action", step=True)
        action()
    clock.mark("end")
    return statistics.median(step["action"] for step in clock.steps()[o.warmup :])
