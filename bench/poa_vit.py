"""Vision transformers of every size from one POA run, against runs of one size each.

    python bench/poa_vit.py --json            train what is missing, then print the table
    python bench/poa_vit.py --summary --json  print the table from what is kept, train nothing

The table has the seeds of which every arm is there; what is missing is told on stderr.

Images are scikit-learn's 1,797 digits of 8 x 8 pixels: 1,297 of them are trained on, without
labels, and are the labelled neighbours of the other 500. A member's score is the accuracy of
weighted k-NN (20 neighbours, temperature .07) on the cls features of the teacher's slice.

    poa           one run; small, middle and large are extracted from its teacher
    alone-SIZE    a run of that size alone: same crops, same order of images, same steps
    slice         small and middle cut out of alone-large, which was never trained to be cut

An arm that ends is a row of `--results`; one that is stopped goes on from its last kept state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motet.core.files import write_json
from motet.models.poa.config import CropConfig, HeadConfig, PoaConfig
from motet.models.poa.knn import cls_features, knn_accuracy
from motet.models.poa.training import SelfDistillation
from motet.models.vit import ViT, ViTConfig, ViTSize

RESULTS = Path(__file__).parent / "results" / "poa_vit.json"
MEMBERS = {"small": ViTSize(16, 2), "middle": ViTSize(32, 3), "large": ViTSize(48, 4)}
ARMS = ("poa", *(f"alone-{member}" for member in MEMBERS))
TRAINED_ON = 1297
KEPT_EVERY_STEPS = 50


def settings(seed: int, steps: int, size: ViTSize | None = None) -> PoaConfig:
    """The POA run, or the run of one size; nothing else differs."""
    whole = size or MEMBERS["large"]
    vit = ViTConfig(
        image_size=8,
        patch_size=2,
        width=whole.width,
        depth=whole.depth,
        head_dim=16,
        channels=1,
        layer_scale=1.0,
        init_std=0.1,
    )
    return PoaConfig(
        vit,
        widths=(whole.width,) if size else (16, 32, 48),
        depths=(whole.depth,) if size else (2, 3, 4),
        steps=steps,
        images_per_step=32,
        seed=seed,
        heads=HeadConfig((32, 64, 128, 256), hidden=64, bottleneck=32),
        crops=CropConfig(8, 4, 2, (0.5, 1.0), (0.2, 0.5), jitter=0.2, flip=False),
        temperature_warmup_steps=steps // 10,
        ibot_start_step=steps // 10,
        frozen_steps=TRAINED_ON // 32,
        warmup_steps=steps // 20,
        momentum=(0.98, 0.9999),
        lr_at_1024=8e-3,
    )


def arm_settings(arm: str, seed: int, steps: int) -> PoaConfig:
    return settings(seed, steps, None if arm == "poa" else MEMBERS[arm.removeprefix("alone-")])


def fingerprint(steps: int) -> str:
    """What a kept arm must have been made with to count."""
    told = [[asdict(arm_settings(arm, 0, steps)) for arm in ARMS], TRAINED_ON]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] with mean 0 and variance 1, and labels, in one fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.argsort(np.random.Philox(key=0).random_raw(len(found.target)))
    images = torch.from_numpy(found.images[order]).float()[:, None]
    return (images - images.mean()) / images.std(), torch.from_numpy(found.target[order])


def accuracy(vit: ViT, images: Tensor, labels: Tensor) -> float:
    features = cls_features(vit, images)
    known, asked = features[:TRAINED_ON], features[TRAINED_ON:]
    return round(knn_accuracy(asked, labels[TRAINED_ON:], known, labels[:TRAINED_ON]), 4)


def products(config: PoaConfig, size: ViTSize, rows: int, tokens: int, crops: int) -> float:
    """FLOPs of one forward pass: crops of so many tokens, and rows that go through the heads."""
    width, depth = size
    block = 2 * 12 * width**2 + 4 * tokens * width  # linear layers; scores and what they mix
    patch = 2 * config.vit.patch_size**2 * config.vit.width
    hidden, bottleneck = config.heads.hidden, config.heads.bottleneck
    head = sum(
        2 * (width * hidden + hidden**2 + hidden * bottleneck + bottleneck * prototypes)
        for prototypes in config.heads.prototypes
    )
    return crops * tokens * (depth * block + patch) + rows * head


def flops(config: PoaConfig, step: int) -> float:
    """FLOPs of a step: three passes for each student, one for the teacher."""
    whole, images = config.vit.size, config.images_per_step
    tokens = 1 + config.vit.patches
    local = 1 + (config.crops.local_size // config.vit.patch_size) ** 2
    share = config.crops.masked_images * sum(config.crops.masked_share) / 2
    masked = 2 * images * config.vit.patches * share if step >= config.ibot_start_step else 0
    views = config.crops.local_crops * images

    def student(size: ViTSize) -> float:
        rows = round(2 * images + views + masked)
        return products(config, size, rows, tokens, 2 * images) + products(
            config, size, 0, local, views
        )

    total = 3 * student(whole) + products(
        config, whole, round(2 * images + masked), tokens, 2 * images
    )
    drawn = config.drawn(step, 0)
    return total + (3 * student(drawn) if drawn else 0)


def train(config: PoaConfig, images: Tensor, state: Path) -> tuple[SelfDistillation, float]:
    """Train an arm, from its last kept state on; the run and its processor seconds."""
    run, seconds = SelfDistillation(config), 0.0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        run.load_state_dict(kept["run"])
        seconds = kept["seconds"]
    while run.step < config.steps:
        began = time.process_time()
        assert not run.train_step(images).skipped
        seconds += time.process_time() - began
        if run.step % KEPT_EVERY_STEPS == 0:
            aside = state.with_suffix(".tmp")
            torch.save({"run": run.state_dict(), "seconds": seconds}, aside)
            os.replace(aside, state)
    return run, seconds


def measure(arm: str, seed: int, steps: int, state: Path) -> dict[str, Any]:
    """One row: an arm trained, and the accuracy of every member that it gives."""
    images, labels = digits()
    config = arm_settings(arm, seed, steps)
    untrained = SelfDistillation(config)
    run, seconds = train(config, images[:TRAINED_ON], state)
    members = MEMBERS if arm in ("poa", "alone-large") else {arm[6:]: config.vit.size}
    return {
        "settings": fingerprint(steps),
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "knn": {
            name: accuracy(run.extract(size), images, labels) for name, size in members.items()
        },
        "untrained": {
            name: accuracy(untrained.extract(size), images, labels)
            for name, size in members.items()
        },
        "flops": sum(flops(config, step) for step in range(steps)),
        "cpu_s": round(seconds, 1),
    }


def kept_rows(results: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of the results file that were made with these settings."""
    rows = json.loads(results.read_text()) if results.exists() else []
    return [row for row in rows if row["settings"] == fingerprint(steps)]


def train_missing(results: Path, seeds: int, steps: int) -> None:
    """Train every arm that the results file lacks, seed by seed."""
    states = results.with_suffix(".state")
    states.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for arm in ARMS:
            rows = kept_rows(results, steps)
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            state = states / f"{fingerprint(steps)}-{seed}-{arm}.pt"
            rows.append(measure(arm, seed, steps, state))
            write_json(results, rows)
            state.unlink(missing_ok=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, its standard error (None for one seed), and the values."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": error, "values": list(values)}


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One line per member, over the seeds of which every arm is there."""
    by = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({seed for _, seed in by if all((arm, seed) in by for arm in ARMS)})
    for name, size in MEMBERS.items() if seeds else ():
        poa = [by["poa", seed]["knn"][name] for seed in seeds]
        alone = [by[f"alone-{name}", seed]["knn"][name] for seed in seeds]
        cut = [by["alone-large", seed]["knn"][name] for seed in seeds]
        untrained = [by["poa", seed]["untrained"][name] for seed in seeds]
        yield {
            "member": name,
            "width": size.width,
            "depth": size.depth,
            "seeds": seeds,
            "knn": spread(poa),
            "knn_alone": spread(alone),
            "knn_slice": spread(cut),
            "knn_untrained": spread(untrained),
            "poa_minus_alone": spread([a - b for a, b in zip(poa, alone, strict=True)]),
            "poa_minus_slice": spread([a - b for a, b in zip(poa, cut, strict=True)]),
            "flops_alone": float(np.mean([by[f"alone-{name}", s]["flops"] for s in seeds])),
            "flops_poa": float(np.mean([by["poa", s]["flops"] for s in seeds])),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.summary:
        train_missing(asked.results, asked.seeds, asked.steps)
    rows = kept_rows(asked.results, asked.steps)
    there = {(row["seed"], row["arm"]) for row in rows}
    if lacking := [
        f"{n} {arm}" for n in range(asked.seeds) for arm in ARMS if (n, arm) not in there
    ]:
        print(f"not trained yet (seed, arm): {', '.join(lacking)}", file=sys.stderr)
    lines = list(summary(rows))
    if asked.json:
        print(json.dumps(lines, indent=1))
        return
    print(f"{'member':8} {'size':>8} {'POA':>13} {'alone':>13} {'slice':>13} {'untrained':>13}")
    for line in lines:
        cells = [line[key] for key in ("knn", "knn_alone", "knn_slice", "knn_untrained")]
        shown = [f"{c['mean']:.3f} ± {c['error'] or 0:.3f}" for c in cells]
        size = f"{line['width']} x {line['depth']}"
        print(f"{line['member']:8} {size:>8} {' '.join(f'{cell:>13}' for cell in shown)}")


if __name__ == "__main__":
    main()
