"""Randomness that is addressed, not consumed: counter-based numbers keyed by names.

Every draw is a pure function of (key, counter), so no draw depends on what was drawn before it, on
the order of experiments, or on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_PHILOX_M0 = np.uint64(0xD2511F53)
_PHILOX_M1 = np.uint64(0xCD9E8D57)
_PHILOX_W0 = 0x9E3779B9
_PHILOX_W1 = 0xBB67AE85
_LOW32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6
_CHUNK = 1 << 14


def name_key(*parts: str | int) -> int:
    """Return a stable 64-bit key of a path of names and numbers.

    Parts are length-prefixed before hashing (BLAKE2b), so `("a", "bc")` and `("ab", "c")` differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def mix64(x: U64) -> U64:
    """Return the SplitMix64 finalizer of each word: a bijection in which every input bit reaches
    every output bit.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014),
    variant 13.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def text_keys(ids: Sequence[str]) -> U64:
    """Return one stable 64-bit key per string, vectorized over a million strings.

    The strings' code points are absorbed one column at a time; the padding of shorter strings is
    not absorbed, so a key depends on its own string only. Two strings share a key with probability
    2^-64: callers that need distinct keys check.
    """
    table = np.asarray(ids, dtype=np.str_)
    keys = np.empty(len(table), dtype=np.uint64)
    for start in range(0, len(table), _CHUNK):
        keys[start : start + _CHUNK] = _absorb(table[start : start + _CHUNK])
    return keys


def _absorb(table: npt.NDArray[np.str_]) -> U64:
    """Return the keys of one chunk of strings that share a padded width."""
    keys = np.full(len(table), 0x243F6A8885A308D3, dtype=np.uint64)
    width = table.dtype.itemsize // 4
    points = table.view(np.uint32).reshape(len(table), width).T.astype(np.uint64)
    for code in points:
        absorbed = mix64((keys ^ code) + _GOLDEN)
        keys = np.where(code != 0, absorbed, keys)
    return mix64(keys)


def philox(key: int, c0: U64, c1: U64) -> tuple[U64, U64]:
    """Return 128 random bits, as two words, for each counter (c0[i], c1[i]) under a 64-bit key.

    Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section
    3.3.
    """
    # In pieces that stay in the cache: the ten rounds pass over their words again and again.
    out0, out1 = np.empty_like(c0), np.empty_like(c1)
    for start in range(0, len(c0), _CHUNK):
        part = slice(start, start + _CHUNK)
        out0[part], out1[part] = _philox_rounds(key, c0[part], c1[part])
    return out0, out1


def _philox_rounds(key: int, c0: U64, c1: U64) -> tuple[U64, U64]:
    """Return the ten rounds on one chunk that fits the processor's cache."""
    x0, x1 = c0 & _LOW32, c0 >> _32
    x2, x3 = c1 & _LOW32, c1 >> _32
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = x0 * _PHILOX_M0, x2 * _PHILOX_M1
        x0, x2 = (
            (product1 >> _32) ^ x1 ^ np.uint64(k0),
            (product0 >> _32) ^ x3 ^ np.uint64(k1),
        )
        x1, x3 = product1 & _LOW32, product0 & _LOW32
        k0, k1 = (k0 + _PHILOX_W0) & 0xFFFFFFFF, (k1 + _PHILOX_W1) & 0xFFFFFFFF
    return x0 | (x1 << _32), x2 | (x3 << _32)


def uniform_int(
    bits: U64, low: npt.NDArray[np.int64] | int, high: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.int64]:
    """Return integers uniform in [low, high), one per word.

    The word is reduced modulo the range; for ranges below 2^40 the bias is under 2^-24, far below
    what any count of exposures can show.
    """
    # No rejection: it would take a number of words that depends on their values.
    span = np.asarray(high, dtype=np.int64) - np.asarray(low, dtype=np.int64)
    if np.any(span <= 0):
        raise ValueError("uniform_int needs low < high everywhere")
    return np.asarray(low, dtype=np.int64) + (bits % span.astype(np.uint64)).astype(np.int64)


def permute(
    index: npt.NDArray[np.int64], n: int, key: int | npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Return the keyed pseudo-random permutation of [0, n) at each index.

    A Feistel network over Z_a x Z_b with a * b just above n, and cycle walking for the few values
    that leave [0, n) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002,
    section 5). No table is kept: memory is that of `index`.

    Args:
        index: int64, any shape, every value in [0, n).
        n: size of the domain, at least 1.
        key: one key, or one per index.
    """
    if n < 1 or (index.size and (index.min() < 0 or index.max() >= n)):
        raise ValueError(f"permute needs every index in [0, {n})")
    a = int(np.ceil(np.sqrt(n)))
    b = -(-n // a)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    value = _feistel(index.astype(np.uint64), a, b, keys)
    # a * b exceeds n by at most a: few walk, and a walk is short.
    outside = value >= np.uint64(n)
    while outside.any():
        value[outside] = _feistel(value[outside], a, b, keys[outside])
        outside = value >= np.uint64(n)
    return value.astype(np.int64)


def _feistel(value: U64, a: int, b: int, keys: U64) -> U64:
    """Return one pass of the network over [0, a * b)."""
    size_a, size_b = np.uint64(a), np.uint64(b)
    left, right = value // size_b, value % size_b
    for round_index in range(_FEISTEL_ROUNDS):
        tweak = mix64(keys + np.uint64(int(_GOLDEN) * (round_index + 1) & 0xFFFFFFFFFFFFFFFF))
        if round_index % 2 == 0:
            left = (left + mix64(right ^ tweak) % size_a) % size_a
        else:
            right = (right + mix64(left ^ tweak) % size_b) % size_b
    return left * size_b + right
