"""A vision transformer whose narrower and shallower slices are vision transformers themselves.

A slice has the first channels of every tensor and evenly spaced blocks; `extract` makes a plain
`ViT` of it. Parameters are named as DINOv2 and timm name them.

Source: POA (ECCV 2024, arXiv:2408.01031), section 3.2, and its `dynamic_ops.py`.
"""

# B images, C colours, S pixels a side, P patches, T tokens = 1 + P, D width, W active width,
# H heads, K channels per head

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motet.models.config import ModelError
from motet.models.keyed import key_of


class ViTSize(NamedTuple):
    """Channels and blocks of a slice."""

    width: int
    depth: int


class ViTFeatures(NamedTuple):
    """What a `ViT` makes of images, after the last norm."""

    cls_BW: Tensor
    patches_BPW: Tensor


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer (arXiv:2010.11929; pre-norm, GELU, LayerScale).

    Attributes:
        image_size, patch_size: pixels a side; smaller images get interpolated positions.
        width, depth: of the intact network.
        mlp_ratio: hidden channels of a feed-forward layer over the width.
        layer_scale: first value of LayerScale; None = no LayerScale.
        drop_path: chance that an image skips a branch of a block in training.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    head_dim: int = 64
    channels: int = 3
    mlp_ratio: int = 4
    layer_scale: float | None = 1e-5
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if problems := list(_config_problems(self)):
            raise ModelError("\n".join(problems))

    @property
    def size(self) -> ViTSize:
        """The intact network."""
        return ViTSize(self.width, self.depth)

    @property
    def patches(self) -> int:
        """Patches of an image of full size."""
        return (self.image_size // self.patch_size) ** 2


def _config_problems(config: ViTConfig) -> Iterator[str]:
    sizes = ("image_size", "patch_size", "width", "depth", "head_dim", "channels", "mlp_ratio")
    for name in sizes:
        if getattr(config, name) < 1:
            yield f"vit.{name}={getattr(config, name)} must be at least 1"
            return
    if config.image_size % config.patch_size:
        yield (
            f"vit.image_size={config.image_size} is no multiple of patch_size={config.patch_size}; "
            f"{_near(config.image_size, config.patch_size)}"
        )
    if config.width % config.head_dim:
        yield (
            f"vit.width={config.width} is no multiple of head_dim={config.head_dim}; "
            f"{_near(config.width, config.head_dim)}"
        )
    if not 0 <= config.drop_path < 1:
        yield f"vit.drop_path={config.drop_path} must be at least 0 and below 1"


def _near(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} or {below + step} would work" if below else f"{step} would work"


def check_size(config: ViTConfig, size: ViTSize) -> None:
    """Raise `ModelError` unless the network has such a slice."""
    width, depth = size
    if not 0 < width <= config.width or width % config.head_dim:
        raise ModelError(
            f"width {width} is no slice of a ViT of width {config.width}: it must be a multiple of "
            f"head_dim={config.head_dim}, from {config.head_dim} to {config.width}"
        )
    if not 0 < depth <= config.depth:
        raise ModelError(
            f"depth {depth} is no slice of a ViT of depth {config.depth}: it must be from 1 to "
            f"{config.depth}"
        )


def chosen_blocks(depth: int, of: int) -> list[int]:
    """Return `depth` evenly spaced blocks of `of`: floor(linspace(0, of - 1, depth)), exactly.

    The first block is always kept, and the last where there are two or more.
    """
    if depth == 1:
        return [0]
    return [at * (of - 1) // (depth - 1) for at in range(depth)]


def elastic_linear(x: Tensor, linear: nn.Linear, outputs: int) -> Tensor:
    """Apply the leading block of a linear layer to x [..., W]: [..., outputs].

    The input is scaled by D / W, which keeps sums over fewer channels at the size that the next
    layer is used to; the bias is not scaled.
    """
    active = x.shape[-1]
    if active != linear.in_features:
        x = x * (linear.in_features / active)
    return F.linear(x, linear.weight[:outputs, :active], linear.bias[:outputs])


class ElasticNorm(nn.LayerNorm):
    """LayerNorm over the channels that are there, with one gain and bias for every size."""

    def forward(self, input: Tensor) -> Tensor:
        active = input.shape[-1]
        return F.layer_norm(
            input, (active,), self.weight[:active], self.bias[:active], eps=self.eps
        )


class ViTAttention(nn.Module):
    """Self-attention over all tokens; a slice has the first W / K heads."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        images, tokens, active = x_BTW.shape
        weight, bias = sliced_qkv(self.qkv, active)
        scale = self.qkv.in_features / active
        # [B, T, 3 W] -> three of [B, H, T, K]
        qkv = F.linear(x_BTW * scale if scale != 1 else x_BTW, weight, bias)
        parts = qkv.view(images, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        query_BHTK, key_BHTK, value_BHTK = parts.unbind(0)
        mixed_BHTK = F.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK)
        return elastic_linear(mixed_BHTK.transpose(1, 2).flatten(2), self.proj, active)


def sliced_qkv(qkv: nn.Linear, active: int) -> tuple[Tensor, Tensor]:
    """Return weight [3 W, W] and bias [3 W]: the first rows of each of queries, keys and values."""
    full = qkv.in_features
    weight = qkv.weight.view(3, full, full)[:, :active, :active]
    return weight.reshape(3 * active, active), qkv.bias.view(3, full)[:, :active].reshape(-1)


class ViTMlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.ratio = config.mlp_ratio
        self.fc1 = nn.Linear(config.width, self.ratio * config.width)
        self.fc2 = nn.Linear(self.ratio * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        active = x.shape[-1]
        return elastic_linear(
            F.gelu(elastic_linear(x, self.fc1, self.ratio * active)), self.fc2, active
        )


class LayerScale(nn.Module):
    """A gain per channel on what a branch adds (arXiv:2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[: x.shape[-1]]


class ViTBlock(nn.Module):
    """Attention and feed-forward, each added to what comes in."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        scaled = config.layer_scale is not None
        self.norm1 = ElasticNorm(config.width, eps=config.norm_eps)
        self.attn = ViTAttention(config)
        self.ls1 = LayerScale(config.width) if scaled else nn.Identity()
        self.norm2 = ElasticNorm(config.width, eps=config.norm_eps)
        self.mlp = ViTMlp(config)
        self.ls2 = LayerScale(config.width) if scaled else nn.Identity()
        self.drop_path = config.drop_path

    def forward(self, x_BTW: Tensor, drop: torch.Generator | None = None) -> Tensor:
        x_BTW = x_BTW + self._dropped(self.ls1(self.attn(self.norm1(x_BTW))), drop)
        return x_BTW + self._dropped(self.ls2(self.mlp(self.norm2(x_BTW))), drop)

    def _dropped(self, x_BTW: Tensor, drop: torch.Generator | None) -> Tensor:
        """Stochastic depth, image by image (arXiv:1603.09382)."""
        if drop is None or not self.drop_path:
            return x_BTW
        keep = 1 - self.drop_path
        kept_B = torch.rand(len(x_BTW), generator=drop) < keep
        return x_BTW * (kept_B.to(x_BTW) / keep)[:, None, None]


class PatchEmbed(nn.Module):
    """Pixels of a patch to channels."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.proj = nn.Conv2d(config.channels, config.width, side, side)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        return self.proj(images_BCSS).flatten(2).mT


class ViT(nn.Module):
    """A vision transformer, and every slice of it.

    Args:
        config: of the intact network.
        seed: the first value of a parameter is a function of seed and name.
    """

    def __init__(self, config: ViTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.patches, config.width))
        self.mask_token = nn.Parameter(torch.empty(1, config.width))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm = ElasticNorm(config.width, eps=config.norm_eps)
        initialize(self, seed, config.init_std, config.layer_scale)

    def forward(
        self,
        images_BCSS: Tensor,
        size: ViTSize | None = None,
        masks_BP: Tensor | None = None,
        drop: torch.Generator | None = None,
    ) -> ViTFeatures:
        """Return the features of images.

        Args:
            size: the slice that runs; None = the intact network.
            masks_BP: patches that the mask token stands in for.
            drop: where the chances of drop-path come from; None = nothing is dropped.

        Raises:
            ModelError: the network has no such slice.
        """
        width, depth = size or self.config.size
        check_size(self.config, ViTSize(width, depth))
        # at full width, then its first channels: the layer is no elastic one and is not scaled
        x_BPW = self.patch_embed(images_BCSS)[..., :width]
        if masks_BP is not None:
            x_BPW = torch.where(masks_BP[..., None], self.mask_token[:, :width], x_BPW)
        cls_B1W = self.cls_token[..., :width].expand(len(x_BPW), -1, -1)
        x_BTW = torch.cat([cls_B1W, x_BPW], 1) + self._positions(images_BCSS.shape[-1], width)
        for block in chosen_blocks(depth, self.config.depth):
            x_BTW = self.blocks[block](x_BTW, drop)
        x_BTW = self.norm(x_BTW)
        return ViTFeatures(x_BTW[:, 0], x_BTW[:, 1:])

    def _positions(self, pixels: int, width: int) -> Tensor:
        """Return the positions of an image of so many pixels a side, [1, T, width]."""
        positions, side = self.pos_embed[..., :width], pixels // self.config.patch_size
        full = self.config.image_size // self.config.patch_size
        if side == full:
            return positions
        grid = positions[:, 1:].mT.unflatten(-1, (full, full))
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([positions[:, :1], grid.flatten(2).mT], 1)


def initialize(
    module: nn.Module, seed: int, std: float = 0.02, layer_scale: float | None = None
) -> None:
    """Give every parameter its first value, a function of seed and name.

    Biases are 0, gains of norms 1, LayerScale as asked, the cls token about 0, the mask token 0,
    everything else normal, cut off at 2.
    """
    with torch.no_grad():
        for name, weight in module.named_parameters():
            last = name.rpartition(".")[2]
            if last in ("bias", "mask_token"):
                weight.zero_()
            elif last == "gamma":
                weight.fill_(1.0 if layer_scale is None else layer_scale)
            elif "norm" in name:
                weight.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(key_of("first value", seed, name) >> 1)
                spread = 1e-6 if last == "cls_token" else std
                nn.init.trunc_normal_(weight, 0.0, spread, -2.0, 2.0, generator=generator)


def extract(vit: ViT, size: ViTSize) -> ViT:
    """Return the slice as a plain network of its own, with the scale of inputs in its weights.

    Its outputs are the slice's but for rounding. Any width that is a multiple of `head_dim` and
    any depth will do, whether or not training drew them.

    Raises:
        ModelError: the network has no such slice.
    """
    check_size(vit.config, size)
    plain = ViT(replace(vit.config, width=size.width, depth=size.depth))
    values = dict(sliced_parameters(vit, size))
    plain.load_state_dict({name: value.detach().clone() for name, value in values.items()})
    return plain.to(vit.cls_token.device, vit.cls_token.dtype)


def sliced_parameters(vit: ViT, size: ViTSize) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter of a slice's plain network."""
    width, full = size.width, vit.config.width
    place = {block: at for at, block in enumerate(chosen_blocks(size.depth, vit.config.depth))}
    for name, value in vit.state_dict().items():
        if name.startswith("blocks."):
            block, _, rest = name.removeprefix("blocks.").partition(".")
            if int(block) not in place:
                continue
            name = f"blocks.{place[int(block)]}.{rest}"
        if ".qkv." in name:
            # rows are queries, keys and values one below the other: each has its own first ones
            parts = value.unflatten(0, (3, -1))[:, :width].flatten(0, 1)
        elif name.startswith(("cls_token", "pos_embed", "mask_token")):
            parts = value[..., :width]
        else:
            parts = value[: len(value) * width // full]
        if parts.ndim == 2 and (".attn." in name or ".mlp." in name):
            parts = parts[:, : parts.shape[1] * width // full] * (full / width)
        yield name, parts
