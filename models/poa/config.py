"""Settings of a self-distillation.

The defaults are the published ones (POA, ECCV 2024, arXiv:2408.01031; `vit_ssl_default_config.yaml`
of its code), with times in steps instead of epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from motet.models.config import ModelError
from motet.models.family.poa_list import draw, poa_repetitions
from motet.models.keyed import key_of
from motet.models.vit import ViTConfig, ViTSize

LEAST_TEMPERATURE = 0.03  # exp(-2 / 0.03) = 1e-29


@dataclass(frozen=True)
class CropConfig:
    """Crops of an image, and which patches are masked.

    Attributes:
        global_size, local_size: pixels a side.
        local_crops: how many beside the two global ones.
        global_scale, local_scale: smallest and largest share of the image's area.
        aspect: widest crop, width over height.
        jitter: largest change of brightness and contrast, as a share; on 4 crops of 5.
        blur: chance that a crop is blurred.
        flip: mirror half of the crops; not for digits.
        masked_images: chance that a global crop has masked patches.
        masked_share: smallest and largest share of its patches.
    """

    global_size: int = 224
    local_size: int = 96
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    aspect: float = 4 / 3
    jitter: float = 0.4
    blur: float = 0.5
    flip: bool = True
    masked_images: float = 0.5
    masked_share: tuple[float, float] = (0.1, 0.5)


@dataclass(frozen=True)
class HeadConfig:
    """Projection heads, one per number of prototypes; shared by whole images and patches.

    Attributes:
        prototypes: outputs of each head.
        hidden, bottleneck: channels of the two inner layers, and of the last.
    """

    prototypes: tuple[int, ...] = (8192, 16384, 32768, 65536)
    hidden: int = 2048
    bottleneck: int = 256


@dataclass(frozen=True)
class PoaConfig:
    """A run of self-distillation.

    Attributes:
        vit: the intact network.
        widths, depths: of the space, rising; the largest are the intact network's. One width and
            one depth: no elastic branch, plain self-distillation of one size.
        steps: of the run; every schedule is stretched over them.
        images_per_step: of all processes together.
        groups: parts of the batch with a size of their own each (the published code's ranks). They
            are dealt to processes, so their number, not the processes', decides what is trained.
        intact_share: lambda, of the intact student in the loss.
        student_temperature: of students, and of the intact one where it teaches.
        temperature: of the teacher, first and after the warm-up.
        temperature_warmup_steps: from the teacher's first temperature to its second.
        ibot_start_step: the first step with masked patches.
        frozen_steps: in which the heads' last layers rest.
        warmup_steps: of the learning rate.
        koleo, ibot: weights of these losses.
        momentum: of the teacher, first and last.
        lr_at_1024, lr_last: peak at 1024 images a step, scaled by the root; and the last one.
        weight_decay: first and last.
        clip: largest norm of the network's gradient, and of the heads'.
        layer_decay: learning rate of a block over that of the next.
        patch_lr: factor on the patch embedding's learning rate.
    """

    vit: ViTConfig
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    steps: int
    images_per_step: int
    groups: int = 1
    seed: int = 0
    heads: HeadConfig = field(default_factory=HeadConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    intact_share: float = 0.8
    student_temperature: float = 0.1
    temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup_steps: int = 24_000
    ibot_start_step: int = 24_000
    frozen_steps: int = 800
    warmup_steps: int = 8_000
    koleo: float = 0.1
    ibot: float = 1.0
    sinkhorn_iterations: int = 3
    momentum: tuple[float, float] = (0.992, 0.9999)
    lr_at_1024: float = 4e-3
    lr_last: float = 2e-5
    weight_decay: tuple[float, float] = (0.04, 0.4)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.5
    layer_decay: float = 0.9
    patch_lr: float = 0.2

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ModelError("\n".join(problems))

    @property
    def sizes(self) -> list[ViTSize]:
        """Every size of the space, width by width; the last is the intact network."""
        return [ViTSize(*size) for size in product(self.widths, self.depths)]

    def drawn(self, step: int, group: int) -> ViTSize | None:
        """Return the size that a group's elastic student has in a step; None = no elastic student.

        Each group walks the weighted list in an order of its own, without replacement: a function
        of seed, step and group.
        """
        repetitions = poa_repetitions(self.widths, self.depths)
        if not any(repetitions):
            return None
        return self.sizes[draw(repetitions, key_of("elastic size", self.seed, group), step)]


def _problems(config: PoaConfig) -> Iterator[str]:
    vit, crops = config.vit, config.crops
    for name, values, whole in (
        ("widths", config.widths, vit.width),
        ("depths", config.depths, vit.depth),
    ):
        if not values or list(values) != sorted(set(values)) or values[-1] != whole:
            yield (
                f"poa.{name}={list(values)} must rise and end with the intact network's, {whole}"
            )
    for width in config.widths:
        if width < 1 or width % vit.head_dim:
            yield (
                f"poa.widths: {width} is no multiple of head_dim={vit.head_dim}; "
                f"{max(width // vit.head_dim, 1) * vit.head_dim} would work"
            )
    if config.depths and config.depths[0] < 1:
        yield f"poa.depths: {config.depths[0]} must be at least 1"
    if config.groups < 1 or config.images_per_step < 1 or config.images_per_step % config.groups:
        yield (
            f"poa.images_per_step={config.images_per_step} cannot be dealt to "
            f"groups={config.groups}; {max(1, config.images_per_step // max(1, config.groups))} "
            "images for each group would work"
        )
    if config.steps < 1:
        yield f"poa.steps={config.steps} must be at least 1"
    if crops.global_size != vit.image_size:
        yield (
            f"poa.crops.global_size={crops.global_size} must be the network's image_size, "
            f"{vit.image_size}"
        )
    if crops.local_crops and (crops.local_size < 1 or crops.local_size % vit.patch_size):
        yield (
            f"poa.crops.local_size={crops.local_size} is no multiple of patch_size={vit.patch_size}"
        )
    if not config.heads.prototypes or min(config.heads.prototypes) < 2:
        yield f"poa.heads.prototypes={list(config.heads.prototypes)} must each be at least 2"
    if min(*config.temperature, config.student_temperature) < LEAST_TEMPERATURE:
        yield (
            f"poa.temperature={list(config.temperature)} and student_temperature="
            f"{config.student_temperature} must be at least {LEAST_TEMPERATURE}: below it, the "
            "exponential of a cosine leaves the range of fp32"
        )
    if not 0 < config.intact_share <= 1:
        yield f"poa.intact_share={config.intact_share} must be above 0 and at most 1"
