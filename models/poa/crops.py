"""Crops of images in plain torch: each is a function of seed, place in the run, and image."""

# B images, V views, C colours, S pixels a side, P patches, J numbers per view

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from motet.models.keyed import key_of, uniforms
from motet.models.poa.config import CropConfig

_NUMBERS = 9  # per view: area, aspect, two of place, flip, jitter or not, two of jitter, blur
_MASK_NUMBERS = 5  # per global view: masked or not, share, two of place, shape
_GLOBAL_VIEWS = 2


class CropBatch(NamedTuple):
    """Two global crops and some local ones of every image, and the patches to mask."""

    global_VBCSS: Tensor
    local_VBCSS: Tensor
    masks_VBP: Tensor


def crop(
    images_BCSS: Tensor, slots: Sequence[int], seed: int, patch_size: int, config: CropConfig
) -> CropBatch:
    """Return crops of images.

    Args:
        slots: place of each image in the run (images before it); with the seed it decides on
            everything that is random, whatever stands beside the image in the batch.
    """
    views = _GLOBAL_VIEWS + config.local_crops
    count, key = views * _NUMBERS + _GLOBAL_VIEWS * _MASK_NUMBERS, key_of("crops", seed)
    numbers = torch.from_numpy(np.stack([uniforms(key, slot, count) for slot in slots])).float()
    of_views = numbers[:, : views * _NUMBERS].unflatten(1, (views, _NUMBERS)).transpose(0, 1)
    of_masks = numbers[:, views * _NUMBERS :].unflatten(1, (_GLOBAL_VIEWS, -1)).transpose(0, 1)
    global_VBJ, local_VBJ = of_views[:_GLOBAL_VIEWS], of_views[_GLOBAL_VIEWS:]
    side = config.global_size // patch_size
    return CropBatch(
        _views(images_BCSS, global_VBJ, config.global_size, config.global_scale, config),
        _views(images_BCSS, local_VBJ, config.local_size, config.local_scale, config),
        block_masks(of_masks, side, config).to(images_BCSS.device),
    )


def _views(
    images_BCSS: Tensor,
    numbers_VBJ: Tensor,
    size: int,
    scale: tuple[float, float],
    config: CropConfig,
) -> Tensor:
    """Return one crop of every image for each view, [V, B, C, size, size]."""
    images = images_BCSS.repeat(len(numbers_VBJ), 1, 1, 1)
    if not len(images):
        return images_BCSS.new_zeros(0, *images_BCSS.shape[:2], size, size)
    theta = _boxes(numbers_VBJ.flatten(0, 1), scale, config)
    shape = [len(images), images.shape[1], size, size]
    grid = F.affine_grid(theta.to(images), shape, align_corners=False)
    cut = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    cut = _recoloured(cut, numbers_VBJ.flatten(0, 1).to(images), config)
    return cut.unflatten(0, (len(numbers_VBJ), -1))


def _boxes(numbers_MJ: Tensor, scale: tuple[float, float], config: CropConfig) -> Tensor:
    """Return affine maps [M, 2, 3] from a crop's coordinates to the image's, both in [-1, 1]."""
    area = scale[0] + (scale[1] - scale[0]) * numbers_MJ[:, 0]
    aspect = ((2 * numbers_MJ[:, 1] - 1) * math.log(config.aspect)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(len(numbers_MJ), 2, 3)
    theta[:, 0, 0] = torch.where(config.flip & (numbers_MJ[:, 4] < 0.5), -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * numbers_MJ[:, 2] - 1) * (1 - width)
    theta[:, 1, 2] = (2 * numbers_MJ[:, 3] - 1) * (1 - height)
    return theta


def _recoloured(crops_MCSS: Tensor, numbers_MJ: Tensor, config: CropConfig) -> Tensor:
    """Return crops with other brightness and contrast, some of them blurred."""
    jitter_M2 = (2 * numbers_MJ[:, 6:8] - 1) * config.jitter * (numbers_MJ[:, 5:6] < 0.8)
    bright, contrast = (1 + jitter_M2)[..., None, None, None].unbind(1)
    mean = crops_MCSS.mean((1, 2, 3), keepdim=True)
    crops_MCSS = ((crops_MCSS - mean) * contrast + mean) * bright
    blurred = numbers_MJ[:, 8] < config.blur
    return torch.where(blurred[:, None, None, None], _blur(crops_MCSS), crops_MCSS)


def _blur(crops_MCSS: Tensor) -> Tensor:
    """Return crops smoothed by the binomial filter 1, 2, 1 along both sides."""
    filter_3 = torch.tensor([1.0, 2.0, 1.0]).to(crops_MCSS) / 4
    colours = crops_MCSS.shape[1]
    kernel = torch.outer(filter_3, filter_3).expand(colours, 1, 3, 3)
    padded = F.pad(crops_MCSS, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, groups=colours)


def block_masks(numbers_VBJ: Tensor, side: int, config: CropConfig) -> Tensor:
    """Return the patches to mask, [V, B, P]: in some images one block that grows from a patch.

    The patches nearest to a random place are masked, as many as the drawn share asks for; what
    "near" means makes the block wide or high (aspects of .3 to 3, as iBOT's blocks,
    arXiv:2111.07832).
    """
    row_P = torch.arange(side).repeat_interleave(side)
    column_P = torch.arange(side).repeat(side)
    masked, share, down, across, shape = numbers_VBJ[..., None].unbind(2)
    stretch = ((2 * shape - 1) * math.log(3) / 2).exp()
    far_down = (row_P + 0.5 - down * side).abs() * stretch
    far_across = (column_P + 0.5 - across * side).abs() / stretch
    rank_VBP = torch.maximum(far_down, far_across).argsort(dim=-1, stable=True).argsort(-1)
    low, high = config.masked_share
    count = ((low + (high - low) * share) * side * side).round().clamp(min=1)
    return (rank_VBP < count) & (masked < config.masked_images)
