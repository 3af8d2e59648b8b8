"""Where the indices of a longer, or shorter, axis of a weight come from.

N indices of the new axis, S indices of the old one that a new one is the sum of, K channels per
head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from motet.models.architecture import WeightSpec
from motet.models.keyed import key_of

Scale = Literal["value", "moment", "mean"]


@dataclass(frozen=True, eq=False)
class AxisMap:
    """Each index of the new axis as a weighted sum of indices of the old one.

    A first moment is a mean of gradients, so it follows how the gradient of the new weight comes
    from that of the old one; a second moment follows by its root, which keeps it above zero.

    Attributes:
        index_NS: int64 [N, S], indices of the old axis.
        value_NS: fp32 [N, S], their weights in a value.
        moment_NS: fp32 [N, S], their weights in a first moment and in the root of a second one.
        old_N: bool [N], where the old indices live on; the others are copies, or new.
    """

    index_NS: Tensor
    value_NS: Tensor
    moment_NS: Tensor
    old_N: Tensor

    def masked(self, mask_N: Tensor) -> AxisMap:
        """Return the map with zeros where the mask is False."""
        mask_N1 = mask_N[:, None]
        return replace(self, value_NS=self.value_NS * mask_N1, moment_NS=self.moment_NS * mask_N1)

    def apply(self, x: Tensor, dimension: int, scale: Scale) -> Tensor:
        """Return `x` with the new axis in place of the old one; a copy.

        Args:
            scale: "value" or "moment": weigh as a value or as a moment; "mean": as a moment, with
                equal weights that add up to one.
        """
        weight_NS = self.value_NS if scale == "value" else self.moment_NS
        if scale == "mean":
            weight_NS = (weight_NS != 0) / weight_NS.shape[1]
        total: Tensor | None = None
        for index_N, weight_N in zip(self.index_NS.unbind(1), weight_NS.unbind(1), strict=True):
            part = x.index_select(dimension, index_N)
            if not bool((weight_N == 1).all()):
                part.mul_(_along(weight_N.to(part.dtype), part, dimension))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


@dataclass(frozen=True, eq=False)
class Copies:
    """Which old index each index of a longer axis is a copy of.

    Attributes:
        index_N: int64 [N].
        old_N: bool [N]: the first copy of each old index, which it lives on in.
        size: of the old axis; each of its indices has a copy.
    """

    index_N: Tensor
    old_N: Tensor
    size: int

    @property
    def counts_N(self) -> Tensor:
        """Copies that the old index has which each new one is a copy of: fp32 [N]."""
        return torch.bincount(self.index_N, minlength=self.size)[self.index_N].float()

    @property
    def even(self) -> bool:
        """Whether each old index has as many copies."""
        return bool((self.counts_N == self.counts_N[0]).all())

    def outputs(self) -> AxisMap:
        """Return the map of an axis that a weight writes.

        A copy has the value of its original. The gradient of what was written is shared out among
        the copies, so each has 1 / copies of it: exactly, where readers weigh copies alike.
        """
        ones_N = torch.ones(len(self.index_N))
        return self._map(ones_N, 1.0 / self.counts_N)

    def inputs(self, scale_N: Tensor | None = None) -> AxisMap:
        """Return the map of an axis that a weight reads.

        Each copy is weighed so that they add up to the original (1 / copies), or by `scale_N`. What
        is read has its value in each copy, so the gradient is that of the original.
        """
        ones_N = torch.ones(len(self.index_N))
        return self._map(1.0 / self.counts_N if scale_N is None else scale_N, ones_N)

    def merged_outputs(self) -> AxisMap:
        """Return the way back along an axis that a weight writes: the mean of the copies.

        Of gradients the sum: merged and copied again, a moment is what it was.
        """
        places_NS = self._places()
        return AxisMap(places_NS, *self._weights(places_NS, 1 / places_NS.shape[1], 1.0))

    def merged_inputs(self) -> AxisMap:
        """Return the way back along an axis that a weight reads: the sum of the copies; of
        gradients the mean.
        """
        places_NS = self._places()
        return AxisMap(places_NS, *self._weights(places_NS, 1.0, 1 / places_NS.shape[1]))

    def channels(self, width: int) -> Copies:
        """Return the copies of the channels of heads, from those of the heads."""
        within = torch.arange(width)
        index_N = (self.index_N[:, None] * width + within).flatten()
        return Copies(index_N, self.old_N.repeat_interleave(width), self.size * width)

    def within(self, inner: Copies) -> Copies:
        """Return the copies of the members of groups, from those of the groups and of the places
        in a group: of query heads, from those of key-value heads and the places in their groups.

        A query head reads the key-value head of its group, so its original must stand in the
        original of the group. (Tiling query heads where key-value heads stay pairs them with other
        keys: apple/ml-hypercloning issue 1.)
        """
        index_N = (self.index_N[:, None] * inner.size + inner.index_N).flatten()
        old_N = (self.old_N[:, None] & inner.old_N).flatten()
        return Copies(index_N, old_N, self.size * inner.size)

    def _places(self) -> Tensor:
        """Return the copies of each old index, int64 [N, S]: as many of each, in order."""
        return torch.argsort(self.index_N, stable=True).view(self.size, -1)

    @staticmethod
    def _weights(places_NS: Tensor, value: float, moment: float) -> tuple[Tensor, Tensor, Tensor]:
        shape = places_NS.shape
        old_N = torch.ones(shape[0], dtype=torch.bool)
        return torch.full(shape, value), torch.full(shape, moment), old_N

    def _map(self, value_N: Tensor, moment_N: Tensor) -> AxisMap:
        value_N1, moment_N1 = value_N.float()[:, None], moment_N.float()[:, None]
        return AxisMap(self.index_N[:, None], value_N1, moment_N1, self.old_N)


def copies(size: int, wanted: int, chosen: str = "cyclic", *key: str | int) -> Copies:
    """Return the copies of an axis: the old indices first, in order, then copies of them.

    Args:
        size, wanted: of the old axis and of the new one, which is no shorter.
        chosen: "cyclic": from the first on, again and again; "random": any.
        key: names and numbers that a random choice is a function of.
    """
    places = torch.arange(wanted)
    if chosen == "random":
        generator = torch.Generator().manual_seed(key_of(*key) >> 1)
        drawn = torch.randint(0, size, (wanted - size,), generator=generator)
        return Copies(torch.cat([places[:size], drawn]), places < size, size)
    return Copies(places % size, places < size, size)


def axis_of(weight: WeightSpec, dimension: int) -> str:
    """Return what a dimension counts, with the channels of all heads told apart: "queries" or
    "keys" (of key-value heads).
    """
    axis = weight.axes[dimension]
    if axis != "heads":
        return axis
    part = weight.name.split(".")[-2]
    return "keys" if part in ("k_proj", "v_proj", "k_norm") else "queries"


def reads(weight: WeightSpec, dimension: int) -> bool:
    """Tell whether a weight reads the channels of a dimension; otherwise it writes them, or scales
    them where they are written.
    """
    last = len(weight.shape) - 1
    return 0 < last == dimension and weight.name != "embedding.weight"


def _along(weight_N: Tensor, x: Tensor, dimension: int) -> Tensor:
    """Return the vector in a shape that multiplies one dimension of `x`."""
    return weight_N.view([-1 if at == dimension else 1 for at in range(x.ndim)])
