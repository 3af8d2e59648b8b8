"""Crops are a function of seed and place in the run."""

from __future__ import annotations

import torch

from motet.models.poa.config import CropConfig
from motet.models.poa.crops import CropBatch, block_masks, crop

CONFIG = CropConfig(global_size=8, local_size=4, local_crops=3)


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def same(a: CropBatch, b: CropBatch) -> bool:
    return all(torch.allclose(x.float(), y.float(), atol=1e-6) for x, y in zip(a, b, strict=True))


def test_an_images_crops_do_not_depend_on_what_stands_beside_it() -> None:
    whole = crop(images(), range(10, 16), 1, 2, CONFIG)
    assert [tuple(part.shape) for part in whole] == [
        (2, 6, 1, 8, 8),
        (3, 6, 1, 4, 4),
        (2, 6, 16),
    ]
    part = crop(images()[2:4], [12, 13], 1, 2, CONFIG)
    assert same(CropBatch(*(views[:, 2:4] for views in whole)), part)


def test_crops_change_with_seed_and_slot_and_leave_global_generators_alone() -> None:
    before = torch.get_rng_state()
    first = crop(images(), range(6), 1, 2, CONFIG)
    assert same(first, crop(images(), range(6), 1, 2, CONFIG))
    assert not same(first, crop(images(), range(6), 2, 2, CONFIG))
    assert not same(first, crop(images(), range(6, 12), 1, 2, CONFIG))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_crop_of_everything_is_the_image() -> None:
    whole = CropConfig(8, 4, 0, (1.0, 1.0), aspect=1.0, jitter=0.0, blur=0.0, flip=False)
    batch = crop(images(), range(6), 0, 2, whole)
    torch.testing.assert_close(batch.global_VBCSS[0], images(), atol=1e-5, rtol=0)
    assert len(batch.local_VBCSS) == 0
    mirrored = CropConfig(8, 4, 0, (1.0, 1.0), aspect=1.0, jitter=0.0, blur=0.0, flip=True)
    crops = crop(images(), range(6), 0, 2, mirrored).global_VBCSS.flatten(0, 1)
    for cut, image in zip(crops, images().repeat(2, 1, 1, 1), strict=True):
        assert torch.allclose(cut, image, atol=1e-5) or torch.allclose(
            cut, image.flip(-1), atol=1e-5
        )


def test_crops_stay_inside_the_image() -> None:
    """The image is a ramp: what a crop sees says where it lies."""
    ramp = torch.linspace(-7 / 8, 7 / 8, 8).expand(1, 1, 8, 8).repeat(64, 1, 1, 1)
    plain = CropConfig(8, 4, 4, jitter=0.0, blur=0.0, flip=False)
    batch = crop(ramp, range(64), 0, 2, plain)
    for views, (low, high) in (
        (batch.global_VBCSS, plain.global_scale),
        (batch.local_VBCSS, plain.local_scale),
    ):
        pixels = views.shape[-1]
        step = (views[..., 0, -1] - views[..., 0, 0]) / (pixels - 1)
        width = step * pixels / 2  # share of the image's side; less where the edge is repeated
        assert float(width.max()) <= min(1.0, (high * plain.aspect) ** 0.5) + 1e-5
        assert float(width.min()) >= 0.6 * (low / plain.aspect) ** 0.5
        assert float(views.abs().max()) <= 7 / 8 + 1e-6


def test_masks_are_one_block_of_the_share_that_was_drawn() -> None:
    config = CropConfig(masked_images=0.5, masked_share=(0.1, 0.5))
    numbers = torch.rand(2, 500, 5, generator=torch.Generator().manual_seed(0))
    masks = block_masks(numbers, 6, config)
    count = masks.sum(-1)
    masked = numbers[..., 0] < 0.5
    assert torch.equal(count > 0, masked)
    assert count[masked].min() >= 0.1 * 36 - 0.5
    assert count[masked].max() <= 0.5 * 36 + 0.5
    for grid in masks[masked][:50].view(-1, 6, 6):
        rows, columns = grid.any(1).nonzero().flatten(), grid.any(0).nonzero().flatten()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert grid.sum() > 0.4 * box  # a block, not patches here and there
