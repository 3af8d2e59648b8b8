"""Training tokens/s of `Decoder` against Hugging Face `LlamaForCausalLM` of the same shape, on the CPU.

    python bench/model_cpu.py --preset 1m --vocabulary 4096 --precision fp32 bf16

Steps of the two models alternate, so that whatever else the machine does falls on both. One step is
forward, backward and nothing else; the ratio is of the medians and of the fastest steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from motet.models.config import ModelConfig, preset
from motet.models.decoder import Decoder, initialize


def hugging_face(config: ModelConfig, length: int) -> LlamaForCausalLM:
    """Return the same shape in transformers, with its default (SDPA) attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ffn,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_width,
            max_position_embeddings=length,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied_embeddings,
        )
    )


def steps(
    config: ModelConfig, batch: int, length: int, bf16: bool
) -> dict[str, Callable[[], None]]:
    """Return one training step (without optimizer) of each model."""
    tokens = torch.randint(0, config.vocabulary_size, (batch, length + 1))
    ours, theirs = Decoder(config), hugging_face(config, length)
    initialize(ours, 0)

    def our_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            sums = ours(tokens[:, :-1], tokens[:, 1:], mode="loss")
        (sums.cross_entropy / sums.n_labels).backward()
        ours.zero_grad()

    def their_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = theirs(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        theirs.zero_grad()

    return {"motet": our_step, "transformers": their_step}


def measure(config: ModelConfig, batch: int, length: int, bf16: bool, repeats: int) -> dict:
    """Return median and fastest seconds of each, and the ratios (above 1: Motet is faster)."""
    runs = steps(config, batch, length, bf16)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, step in runs.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = {name: min(values) for name, values in seconds.items()}
    return {
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "fastest_s": {name: round(value, 4) for name, value in fastest.items()},
        "ratio_median": round(medians["transformers"] / medians["motet"], 3),
        "ratio_fastest": round(fastest["transformers"] / fastest["motet"], 3),
        "tokens_per_s": round(batch * length / medians["motet"]),
    }


def main() -> None:
    """Print one JSON line per precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    overrides = {} if arguments.kv_heads is None else {"n_kv_heads": arguments.kv_heads}
    config = preset(arguments.preset, arguments.vocabulary, **overrides)
    for precision in arguments.precision:
        result = measure(
            config, arguments.batch, arguments.length, precision == "bf16", arguments.repeats
        )
        print(
            json.dumps({"preset": arguments.preset, "precision": precision, **result}), flush=True
        )


if __name__ == "__main__":
    main()
