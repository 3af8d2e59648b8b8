"""The training step: an intact and an elastic student learn from a teacher that follows the first.

Everything that is random is a function of seed, step and place in the batch, so that a run resumes
exactly, and any number of processes that divides the groups trains the same network.
"""

# V views, B images, C colours, S pixels a side, P patches, N masked patches, W active width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from motet.models.config import ModelError
from motet.models.keyed import key_of, order
from motet.models.poa import schedules
from motet.models.poa.config import PoaConfig
from motet.models.poa.crops import CropBatch, crop
from motet.models.poa.heads import ProjectionHeads
from motet.models.poa.losses import (
    StudentOutputs,
    Sum,
    Targets,
    centred,
    koleo,
    same_view,
    student_terms,
)
from motet.models.vit import ViT, ViTSize, extract


def _alone(_: Tensor) -> None:
    """The sum over one process."""


@dataclass(frozen=True)
class Replicas:
    """Which part of the batch a process takes, and how sums over all of them are made.

    Under torch.distributed: `Replicas(get_rank(), get_world_size(), all_reduce)`.
    """

    index: int = 0
    count: int = 1
    add: Sum = _alone


ALONE = Replicas()


@dataclass(frozen=True)
class DistillationStep:
    """What a step did.

    Attributes:
        loss: mean over all groups of all processes.
        skipped: some process saw no number; no process changed anything.
        sizes: of the elastic student, for each group of this process.
    """

    step: int
    loss: float
    skipped: bool
    sizes: tuple[ViTSize | None, ...]


class NetworkWithHeads(nn.Module):
    """A network and its projection heads."""

    def __init__(self, config: PoaConfig) -> None:
        super().__init__()
        self.vit = ViT(config.vit, config.seed)
        self.heads = ProjectionHeads(config.vit.width, config.heads, config.seed)


class SelfDistillation:
    """A run: both networks, the optimizer, and the number of the next step.

    `state_dict` is all that a later process needs to go on as if nothing had happened.
    """

    def __init__(self, config: PoaConfig) -> None:
        self.config = config
        self.student, self.teacher = NetworkWithHeads(config), NetworkWithHeads(config)
        self.teacher.requires_grad_(False)
        groups = schedules.parameter_groups(self.student.vit, self.student.heads, config)
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "step": self.step,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another process stopped.

        Raises:
            ModelError: the state is of a run with other settings.
        """
        ours, theirs = asdict(self.config), state["config"]
        if changed := sorted(key for key in ours if ours[key] != theirs.get(key)):
            told = "; ".join(f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in changed)
            raise ModelError(f"the state is of a run with other settings ({told})")
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def extract(self, size: ViTSize) -> ViT:
        """Return a size of the teacher, which is what is deployed, as a network of its own."""
        return extract(self.teacher.vit, size)

    def train_step(self, images: Tensor, replicas: Replicas = ALONE) -> DistillationStep:
        """Do the next step.

        Args:
            images: the whole data set, [images, C, S, S]; the step takes its own part.

        Raises:
            ModelError: the groups cannot be dealt to so many processes.
        """
        config, step = self.config, self.step
        batch = _batch(config, images, step, replicas)
        groups = _groups(config, replicas)
        targets = self._targets(batch, step, len(groups), replicas)
        self.optimizer.zero_grad(set_to_none=True)
        sizes = [config.drawn(step, group) for group in groups]
        total = torch.zeros((), device=images.device)
        for at, (group, size) in enumerate(zip(groups, sizes, strict=True)):
            loss = self._loss(_part(batch, at, len(groups)), targets[at], size, step, group)
            (loss / config.groups).backward()
            total += loss.detach() / config.groups
        replicas.add(total)
        # one number for all: what a process does next is decided by the sum, not by its own part
        skipped = not bool(torch.isfinite(total)) or not self._gradients(replicas)
        if not skipped:
            schedules.set_step(self.optimizer, config, step)
            self.optimizer.step()
            self._follow(schedules.momentum(config, step))
        self.step += 1
        return DistillationStep(step, float(total), skipped, tuple(sizes))

    @torch.no_grad()
    def _targets(
        self, batch: CropBatch, step: int, groups: int, replicas: Replicas
    ) -> list[Targets]:
        """Return the teacher's targets for each group of this process."""
        config, teacher = self.config, self.teacher
        masks_VBP = batch.masks_VBP if step >= config.ibot_start_step else None
        features = teacher.vit(batch.global_VBCSS.flatten(0, 1))
        temperature = schedules.teacher_temperature(config, step)

        def balanced(x: Tensor) -> list[Tensor]:
            heads = teacher.heads(x)
            return centred(heads, temperature, config.sinkhorn_iterations, replicas.add)

        cls = [head.unflatten(0, (2, -1)) for head in balanced(features.cls_BW)]
        by_group = list(zip(*(head.chunk(groups, 1) for head in cls), strict=True))
        if masks_VBP is None:
            return [Targets(list(part), [], torch.zeros(0)) for part in by_group]
        patches = balanced(features.patches_BPW[masks_VBP.flatten(0, 1)])
        # rows stand view by view; a group takes those of its images
        images = masks_VBP.shape[1]
        group_B = torch.arange(images, device=masks_VBP.device) * groups // images
        group_N = group_B[None, :, None].expand_as(masks_VBP)[masks_VBP]
        crops = 2 * images // groups
        counts_VB1 = masks_VBP.sum(-1, keepdim=True)
        weights_N = (1 / (counts_VB1.clamp(min=1) * crops)).expand_as(masks_VBP)[masks_VBP]
        return [
            Targets(list(part), [head[group_N == at] for head in patches], weights_N[group_N == at])
            for at, part in enumerate(by_group)
        ]

    def _loss(
        self, batch: CropBatch, targets: Targets, size: ViTSize | None, step: int, group: int
    ) -> Tensor:
        """Return a group's loss (POA's equations 5 to 9; see `losses`)."""
        config, temperature = self.config, self.config.student_temperature
        masked = step >= config.ibot_start_step
        place = (config.seed, step, group)
        intact = self._student(batch, None, masked, key_of("intact", *place))
        loss = student_terms(intact, targets, temperature, config.ibot)
        if size is None:
            return loss + config.koleo * koleo(intact.cls_VBW)
        elastic = self._student(batch, size, masked, key_of("elastic", *place))
        heads = range(len(targets.cls_VBO))
        distilled = [same_view(elastic, intact, head, temperature) for head in heads]
        loss = config.intact_share * loss + (1 - config.intact_share) * (
            student_terms(elastic, targets, temperature, config.ibot)
            + torch.stack(distilled).mean()
        )
        spread = koleo(intact.cls_VBW) + koleo(elastic.cls_VBW)
        return loss + config.koleo * spread / 2

    def _student(
        self, batch: CropBatch, size: ViTSize | None, masked: bool, key: int
    ) -> StudentOutputs:
        """Return what the student makes of a group's crops at one size."""
        vit, heads = self.student.vit, self.student.heads
        drop = torch.Generator().manual_seed(key >> 1)
        views, locals_ = len(batch.global_VBCSS), len(batch.local_VBCSS)
        masks_BP = batch.masks_VBP.flatten(0, 1) if masked else None
        whole = vit(batch.global_VBCSS.flatten(0, 1), size, masks_BP, drop)
        parts = [whole.cls_BW]
        if locals_:
            parts.append(vit(batch.local_VBCSS.flatten(0, 1), size, None, drop).cls_BW)
        if masks_BP is not None:
            parts.append(whole.patches_BPW[masks_BP])
        lengths = [len(part) for part in parts]
        outputs = [head.split(lengths) for head in heads(torch.cat(parts))]
        return StudentOutputs(
            [out[0].unflatten(0, (views, -1)) for out in outputs],
            [out[1].unflatten(0, (locals_, -1)) if locals_ else out[0][:0] for out in outputs],
            [out[-1] for out in outputs] if masked else [],
            whole.cls_BW.unflatten(0, (views, -1)),
        )

    def _gradients(self, replicas: Replicas) -> bool:
        """Add gradients up over all processes and clip them; return whether they are numbers.

        A weight that no group here used counts as 0, so that all processes add up the same list.
        """
        norms = []
        for part in (self.student.vit, self.student.heads):
            for weight in part.parameters():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                replicas.add(weight.grad)
            norms.append(nn.utils.clip_grad_norm_(part.parameters(), self.config.clip))
        return bool(torch.isfinite(torch.stack(norms)).all())

    @torch.no_grad()
    def _follow(self, share: float) -> None:
        """Move the teacher towards the intact student."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        torch._foreach_lerp_(teacher, list(self.student.parameters()), 1 - share)


def _groups(config: PoaConfig, replicas: Replicas) -> range:
    """Return the groups of a process."""
    if config.groups % replicas.count:
        raise ModelError(
            f"poa.groups={config.groups} cannot be dealt to {replicas.count} processes; "
            f"{replicas.count * max(1, config.groups // replicas.count)} would work"
        )
    each = config.groups // replicas.count
    return range(replicas.index * each, (replicas.index + 1) * each)


def batch_rows(config: PoaConfig, images: int, slots: Sequence[int]) -> list[int]:
    """Return which image stands at each slot: every image once per epoch, in an order of its own.

    A function of seed and slot: processes and restarts read on where they are.
    """
    key, cycles = key_of("order of images", config.seed), {}
    for slot in slots:
        if slot // images not in cycles:
            cycles[slot // images] = order(images, key, slot // images)
    return [int(cycles[slot // images][slot % images]) for slot in slots]


def _batch(config: PoaConfig, images: Tensor, step: int, replicas: Replicas) -> CropBatch:
    """Return the crops of a process's part of a step."""
    groups, each = _groups(config, replicas), config.images_per_step // config.groups
    first = step * config.images_per_step
    slots = range(first + groups.start * each, first + groups.stop * each)
    rows = torch.tensor(batch_rows(config, len(images), slots))
    return crop(images[rows], slots, config.seed, config.vit.patch_size, config.crops)


def _part(batch: CropBatch, at: int, groups: int) -> CropBatch:
    """Return the part of a batch that belongs to one of its groups."""
    return CropBatch(*(views.chunk(groups, 1)[at] for views in batch))
