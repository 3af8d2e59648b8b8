"""How good features are without training on them: a vote of the nearest labelled ones."""

# B queries, M labelled images, W width, N neighbours, L labels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from motet.models.vit import ViT, ViTSize


@torch.no_grad()
def cls_features(
    vit: ViT, images_BCSS: Tensor, size: ViTSize | None = None, batch: int = 256
) -> Tensor:
    """Return the cls features of images at a size of the network, [B, W], of unit length."""
    parts = [vit(images, size).cls_BW for images in images_BCSS.split(batch)]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def knn_labels(
    query_BW: Tensor, known_MW: Tensor, labels_M: Tensor, neighbours: int, temperature: float
) -> Tensor:
    """Return the label with most votes for each query; a vote weighs exp(cosine / temperature)."""
    neighbours = min(neighbours, len(known_MW))
    cosines_BN, places_BN = (query_BW @ known_MW.T).topk(neighbours, dim=1)
    votes_BL = query_BW.new_zeros(len(query_BW), int(labels_M.max()) + 1)
    votes_BL.scatter_add_(1, labels_M[places_BN], ((cosines_BN - 1) / temperature).exp())
    return votes_BL.argmax(1)


def knn_accuracy(
    query_BW: Tensor,
    labels_B: Tensor,
    known_MW: Tensor,
    labels_M: Tensor,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the share of queries that weighted k-NN labels right.

    Weighted votes of Wu et al. (arXiv:1805.01978, section 3.4), as DINO and POA evaluate.

    Args:
        query_BW, known_MW: features of unit length.
        neighbours: that vote; all where there are fewer.
    """
    found_B = knn_labels(query_BW, known_MW, labels_M, neighbours, temperature)
    return float((found_B == labels_B).float().mean())
