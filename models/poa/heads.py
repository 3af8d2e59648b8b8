"""Projection heads of several sizes, of which only the first layer is elastic."""

# ... any shape, W active width, Z bottleneck, O prototypes of a head

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from motet.models.poa.config import HeadConfig
from motet.models.vit import elastic_linear, initialize


class ProjectionHead(nn.Module):
    """Three linear layers with GELU, unit length, and cosines to prototypes.

    The last layer is weight-normed with its gain fixed at 1 (`norm_last_layer` of DINO,
    arXiv:2104.14294), so that outputs stay between -1 and 1 and Sinkhorn-Knopp cannot overflow.
    """

    def __init__(self, width: int, prototypes: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp0 = nn.Linear(width, config.hidden)
        self.mlp1 = nn.Linear(config.hidden, config.hidden)
        self.mlp2 = nn.Linear(config.hidden, config.bottleneck)
        self.last_layer = nn.Linear(config.bottleneck, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> cosines [..., O]."""
        x = F.gelu(elastic_linear(x, self.mlp0, self.mlp0.out_features))
        x = self.mlp2(F.gelu(self.mlp1(x)))
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.last_layer.weight, dim=-1))


class ProjectionHeads(nn.Module):
    """One head per number of prototypes (POA's multiple projection heads, section 3.3)."""

    def __init__(self, width: int, config: HeadConfig, seed: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            ProjectionHead(width, prototypes, config) for prototypes in config.prototypes
        )
        initialize(self, seed)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[..., W] -> cosines of every head, [..., O] each."""
        return [head(x) for head in self.heads]
