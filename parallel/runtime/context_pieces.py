"""Which positions a context-parallel rank holds, and what its queries see of another rank's keys.

B batch, T tokens. The split that gives all ranks equal causal work follows Striped Attention
(arXiv:2311.09431), with two chunks per rank, one from the head of a sequence and one from its tail.
Documents need no mask: they are contiguous, so what a block of queries may see of a block of keys
is a few full rectangles (`Piece`), each a plain kernel call, and what no document needs is not
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALL = slice(None)


def chunk_order(cp: int) -> list[tuple[int, int]]:
    """Return for each rank the two of 2 x `cp` equal chunks of a sequence that it holds."""
    return [(rank, 2 * cp - 1 - rank) for rank in range(cp)]


def context_slice(x_BT: Tensor, rank: int, cp: int) -> Tensor:
    """Return [B, T / cp, ...]: the positions that `rank` of `cp` holds of [B, T, ...].

    Raises:
        ValueError: T is not a multiple of 2 x `cp`.
    """
    # Two chunks for each rank: the early one has few keys before it, the late one many.
    length, chunks = x_BT.shape[1], 2 * cp
    if length == 0 or length % chunks:
        raise ValueError(
            f"a sequence of {length:,} tokens does not split into {chunks} equal chunks (2 x the "
            "context"
            f" parallel degree {cp}); nearest is {max(chunks, round(length / chunks) * chunks):,}"
        )
    parts = x_BT.split(length // chunks, dim=1)
    first, second = chunk_order(cp)[rank]
    return torch.cat((parts[first], parts[second]), dim=1)


def context_join(parts: Sequence[Tensor], cp: int) -> Tensor:
    """Return [B, T, ...] from what `context_slice` gave to ranks 0 .. `cp` - 1."""
    chunks: dict[int, Tensor] = {}
    for order, part in zip(chunk_order(cp), parts, strict=True):
        chunks |= zip(order, part.chunk(2, dim=1), strict=True)
    return torch.cat([chunks[place] for place in range(2 * cp)], dim=1)


def ring_bytes(
    tokens_local: int, kv_width: int, bytes_per_value: int, cp: int, segments: bool
) -> dict[str, int]:
    """Return the bytes that one rank sends in one layer, "forward" and "backward".

    forward = (cp - 1) x tokens x (2 x kv_width x bytes_per_value + (8 if segments)): keys and
    values, and int64 segments once. backward = (cp - 1) x tokens x 2 x kv_width x (bytes_per_value
    + max(4, bytes_per_value)): keys and values once more, and their gradients, which travel in fp32
    or wider. A rank's gradient of its own keys waits at home, so gradients move cp - 1 times and
    not cp times. Recomputation in backward sends the forward bytes again.

    Args:
        tokens_local: tokens that a rank holds, all sequences of the micro-batch together.
        kv_width: key-value heads of this rank x channels per head.
        bytes_per_value: of the values' type.
        cp: ranks in the ring.
        segments: whether `RingAttention` gets a tensor of segments (not a `RingPlan`, which was
            paid for before).
    """
    # Own keys and values do not travel: cp - 1 moves bring a rank those of all others.
    moved, values = (cp - 1) * tokens_local, 2 * kv_width
    return {
        "forward": moved * (values * bytes_per_value + 8 * segments),
        "backward": moved * values * (bytes_per_value + max(4, bytes_per_value)),
    }


@dataclass(frozen=True)
class Piece:
    """Queries that see keys, as slices of what two ranks hold.

    Attributes:
        rows: sequences of the batch.
        queries, keys: tokens.
        causal: query i sees keys 0 .. i (there are as many of both); else every query sees every
            key.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class RingPlan:
    """What one rank computes for sequences of `tokens` local tokens: `steps[s]` with the keys of
    rank - s.
    """

    tokens: int
    steps: tuple[tuple[Piece, ...], ...]


def causal_piece(rank: int, source: int, tokens: int) -> Piece:
    """Return what the queries of `rank` see of the keys of `source`: half of the square, for every
    pair of ranks.

    Own keys: the local order is the true order, so plain causal attention. Keys of an earlier rank:
    its first chunk lies before both of ours, its second after both. Keys of a later rank: only our
    second chunk sees any, and it sees both.
    """
    # Local order is chunk `rank`, then chunk 2 cp - 1 - rank: the halves of what a rank holds.
    every, half = slice(0, tokens), tokens // 2
    if source == rank:
        return Piece(ALL, every, every, causal=True)
    if source < rank:
        return Piece(ALL, every, slice(0, half), causal=False)
    return Piece(ALL, slice(half, tokens), every, causal=False)


def document_pieces(whole: Piece, queries_BT: Tensor, keys_BT: Tensor) -> tuple[Piece, ...]:
    """Return the parts of `whole` in which queries and keys share a document.

    Args:
        whole: what is seen without documents.
        queries_BT, keys_BT: int64 CPU tensors, the segments of both ranks; a segment is contiguous.
    """
    rows = []
    # Other ranks' numbers mean the same documents, because all of them count along one sequence.
    for ids_T, key_ids_T in zip(queries_BT.unbind(), keys_BT.unbind(), strict=True):
        queries = _runs(ids_T[whole.queries], whole.queries.start)
        keys = _runs(key_ids_T[whole.keys], whole.keys.start)
        shared = [segment for segment in queries if segment in keys]
        rows.append([replace(whole, queries=queries[s], keys=keys[s]) for s in shared])
    # One call for all sequences where they have the same documents, as without documents.
    if all(row == rows[0] for row in rows):
        return tuple(rows[0])
    return tuple(replace(x, rows=slice(b, b + 1)) for b, row in enumerate(rows) for x in row)


def _runs(ids_T: Tensor, offset: int) -> dict[int, slice]:
    """Return where each segment stands; `offset` is the place of the first token."""
    # On the CPU, once per micro-batch: slices are Python's, and a device would be waited for.
    ids, counts = torch.unique_consecutive(ids_T, return_counts=True)
    stops = (counts.cumsum(0) + offset).tolist()
    starts = [offset, *stops[:-1]]
    return {s: slice(a, b) for s, a, b in zip(ids.tolist(), starts, stops, strict=True)}
