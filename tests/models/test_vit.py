"""Every slice of a vision transformer is a vision transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from motet.models.config import ModelError
from motet.models.vit import ViT, ViTConfig, ViTSize, chosen_blocks, elastic_linear, extract

CONFIG = ViTConfig(
    image_size=8, patch_size=2, width=32, depth=5, head_dim=8, channels=1, layer_scale=0.3
)
SIZES = [ViTSize(width, depth) for width in (8, 16, 24, 32) for depth in range(1, 6)]


def trained(config: ViTConfig = CONFIG) -> ViT:
    """A network in which no parameter is 0 or 1, so that a forgotten one shows."""
    vit = ViT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in vit.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return vit


def images(pixels: int = 8) -> Tensor:
    return torch.randn(3, 1, pixels, pixels, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_width_and_depth_is_extracted_and_gives_what_its_slice_gives(size: ViTSize) -> None:
    vit, masks = trained(), torch.zeros(3, 16, dtype=torch.bool)
    masks[0, 3:9] = True
    plain = extract(vit, size)
    assert plain.config.size == size
    for pixels, masked in ((8, None), (8, masks), (4, None)):
        slices, alone = vit(images(pixels), size, masked), plain(images(pixels), None, masked)
        torch.testing.assert_close(alone.cls_BW, slices.cls_BW, atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.patches_BPW, slices.patches_BPW, atol=1e-5, rtol=0)


def encoder_layers(vit: ViT) -> nn.Sequential:
    """PyTorch's own encoder with a network's weights, LayerScale folded into the last product."""
    config, layers = vit.config, []
    for block in vit.blocks:
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.width // config.head_dim,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.norm_eps,
            batch_first=True,
            norm_first=True,
        ).eval()
        state = block.state_dict()
        one, two = state["ls1.gamma"], state["ls2.gamma"]
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": state["attn.qkv.weight"],
                "self_attn.in_proj_bias": state["attn.qkv.bias"],
                "self_attn.out_proj.weight": one[:, None] * state["attn.proj.weight"],
                "self_attn.out_proj.bias": one * state["attn.proj.bias"],
                "linear1.weight": state["mlp.fc1.weight"],
                "linear1.bias": state["mlp.fc1.bias"],
                "linear2.weight": two[:, None] * state["mlp.fc2.weight"],
                "linear2.bias": two * state["mlp.fc2.bias"],
                "norm1.weight": state["norm1.weight"],
                "norm1.bias": state["norm1.bias"],
                "norm2.weight": state["norm2.weight"],
                "norm2.bias": state["norm2.bias"],
            }
        )
        layers.append(layer)
    return nn.Sequential(*layers)


@torch.no_grad()
def test_what_is_extracted_is_a_stack_of_pytorchs_own_encoder_layers() -> None:
    vit = trained()
    size = ViTSize(16, 3)
    plain, x = extract(vit, size), images()
    tokens = torch.cat([plain.cls_token.expand(3, -1, -1), plain.patch_embed(x)], 1)
    out = nn.functional.layer_norm(
        encoder_layers(plain)(tokens + plain.pos_embed),
        (16,),
        plain.norm.weight,
        plain.norm.bias,
        eps=1e-6,
    )
    torch.testing.assert_close(out[:, 0], vit(x, size).cls_BW, atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, 1:], vit(x, size).patches_BPW, atol=1e-5, rtol=0)


def test_a_slice_trains_its_own_channels_and_blocks_and_no_others() -> None:
    vit = trained()
    features = vit(images(), ViTSize(16, 3))
    (features.cls_BW.sum() + features.patches_BPW.square().sum()).backward()
    assert [block.attn.qkv.weight.grad is not None for block in vit.blocks] == [
        at in chosen_blocks(3, 5) for at in range(5)
    ]
    used = vit.blocks[0].attn.qkv.weight.grad.abs().view(3, 32, 32) > 0
    assert used[:, :16, :16].all()
    assert not used[:, 16:].any()
    assert not used[:, :, 16:].any()
    assert not vit.blocks[2].mlp.fc2.weight.grad[:, 64:].any()
    assert not vit.norm.weight.grad[16:].any()
    assert vit.pos_embed.grad[..., :16].all()
    assert not vit.pos_embed.grad[..., 16:].any()


def test_blocks_are_evenly_spaced_as_published() -> None:
    for of in range(1, 33):
        for depth in range(1, of + 1):
            published = np.linspace(0, of - 1, depth).astype(np.int64).tolist()
            ours = chosen_blocks(depth, of)
            exact = [at * (of - 1) // max(depth - 1, 1) for at in range(depth)]
            assert ours == exact
            assert len(set(ours)) == depth
            # linspace in floating point may end just below a whole number
            assert all(0 <= a - b <= 1 for a, b in zip(ours, published, strict=True))
    for depth in range(12, 25):  # the published space
        assert chosen_blocks(depth, 24) == np.linspace(0, 23, depth).astype(np.int64).tolist()


def test_inputs_of_a_slice_are_scaled_and_its_bias_is_not() -> None:
    linear = nn.Linear(8, 6)
    nn.init.ones_(linear.weight)
    nn.init.constant_(linear.bias, 5.0)
    assert elastic_linear(torch.ones(1, 2), linear, 3).tolist() == [[13.0] * 3]
    assert elastic_linear(torch.ones(1, 8), linear, 6).tolist() == [[13.0] * 6]


def test_drop_path_drops_only_where_its_chances_are_given() -> None:
    vit = trained(ViTConfig(8, 2, 32, 5, 8, 1, drop_path=0.5))
    x = images()
    whole = vit(x).cls_BW
    assert torch.equal(vit(x).cls_BW, whole)
    seeded = [vit(x, drop=torch.Generator().manual_seed(s)).cls_BW for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert not torch.equal(seeded[0], whole)


def test_first_values_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = ViT(CONFIG, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = ViT(CONFIG, seed=3).state_dict(), ViT(CONFIG, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((12, 2), "width 12 .* multiple of head_dim=8, from 8 to 32"),
        ((40, 2), "width 40 .* from 8 to 32"),
        ((16, 0), "depth 0 .* from 1 to 5"),
        ((16, 6), "depth 6 .* from 1 to 5"),
    ],
)
def test_a_size_that_is_no_slice_is_told(size: tuple[int, int], said: str) -> None:
    for what in (
        lambda: extract(trained(), ViTSize(*size)),
        lambda: trained()(images(), ViTSize(*size)),
    ):
        with pytest.raises(ModelError, match=said):
            what()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"width": 30}, "width=30 is no multiple of head_dim=8; 24 or 32 would work"),
        ({"width": 4}, "width=4 is no multiple of head_dim=8; 8 would work"),
        ({"patch_size": 3}, "image_size=8 is no multiple of patch_size=3; 6 or 9 would work"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"drop_path": 1.0}, "drop_path=1.0 must be at least 0 and below 1"),
    ],
)
def test_a_shape_that_cannot_be_is_told(changed: dict[str, float], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ViTConfig(**{**vars(CONFIG), **changed})
