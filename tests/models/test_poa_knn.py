"""Weighted k-NN on features."""

from __future__ import annotations

import torch

from motet.models.poa.knn import cls_features, knn_accuracy, knn_labels
from motet.models.vit import ViT, ViTConfig, ViTSize, extract


def test_near_neighbours_outvote_more_numerous_far_ones() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([2, 1, 1, 0])
    query = torch.nn.functional.normalize(
        torch.tensor([[0.9, 0.3], [0.1, 0.9], [-1.0, 0.1]]), dim=1
    )
    assert knn_labels(query, known, labels, 3, 0.07).tolist() == [2, 1, 0]
    assert knn_labels(query, known, labels, 3, 1e6).tolist() == [1, 1, 1]  # a plain vote
    accuracy = knn_accuracy(query, torch.tensor([2, 1, 1]), known, labels, neighbours=99)
    assert round(accuracy, 4) == round(2 / 3, 4)


def test_features_of_a_slice_are_those_of_the_network_extracted() -> None:
    vit = ViT(ViTConfig(8, 2, 32, 3, head_dim=8, channels=1, layer_scale=1.0))
    images = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    size = ViTSize(16, 2)
    ours = cls_features(vit, images, size, batch=3)
    torch.testing.assert_close(ours, cls_features(extract(vit, size), images), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(7))
