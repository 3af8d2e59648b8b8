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
_CHUNK = 1 << 15
_LENGTHS = [length.to_bytes(4, "little") for length in range(24)]
_TABLED = 1024


def name_key(*parts: str | int) -> int:
    """Return a stable 64-bit key of a path of names and numbers.

    Parts are length-prefixed before hashing (BLAKE2b), so `("a", "bc")` and `("ab", "c")` differ.
    """
    return int.from_bytes(key_state(*parts).digest(), "little")


def key_state(*parts: str | int) -> hashlib.blake2b:
    """Return the hash that `name_key` makes of a path, so that more parts can follow."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest


def key_after(state: hashlib.blake2b, number: int) -> int:
    """Return `name_key(*path, number)` from the state of the path, which stays as it is.

    A study draws millions of numbers, so this is one call; `number` has at most 18 digits.
    """
    digest = state.copy()
    digest.update(_PARTS[number] if 0 <= number < _TABLED else _part(number))
    return int.from_bytes(digest.digest(), "little")


def _part(number: int) -> bytes:
    """What `key_state` hashes of a number."""
    encoded = b"int:%d" % number
    return _LENGTHS[len(encoded)] + encoded


_PARTS = [_part(number) for number in range(_TABLED)]


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
    keys, space = _round_keys(key), np.empty((6, min(len(c0), _CHUNK)), np.uint64)
    for start in range(0, len(c0), _CHUNK):
        part = slice(start, start + _CHUNK)
        words = space[:, : len(c0[part])]
        words[0], words[1] = c0[part] & _LOW32, c0[part] >> _32
        words[2], words[3] = c1[part] & _LOW32, c1[part] >> _32
        _philox_rounds(keys, words)
        out0[part] = words[0] | (words[1] << _32)
        out1[part] = words[2] | (words[3] << _32)
    return out0, out1


def philox_grid(key: int, c0_N: U64, c1_D: U64) -> U64:
    """Return the first word of `philox` for every pair of counters, uint64 [D, N].

    c1_D: below 2^32. Until the third round no word depends on more than its row, its column, or
    their sum, so the counters are never spread out over the grid.
    """
    assert not c1_D.size or int(c1_D.max()) < 1 << 32
    out = np.empty((len(c1_D), len(c0_N)), dtype=np.uint64)
    keys = _round_keys(key)
    pieces = max(1, -(-len(c0_N) // _CHUNK))
    columns = np.array_split(np.arange(len(c0_N)), pieces)
    rows = max(1, _CHUNK // max(1, len(columns[0])))
    space = np.empty((6, rows * len(columns[0])), np.uint64)
    for column in columns:
        place = slice(int(column[0]), int(column[-1]) + 1) if len(column) else slice(0, 0)
        for row in range(0, len(c1_D), rows):
            target = out[row : row + rows, place]
            words = space[:, : target.size].reshape(6, *target.shape)
            _first_rounds(keys, c0_N[place], c1_D[row : row + rows], words)
            _philox_rounds(keys[2:9], words)
            # Of the last round only the half that the first word is made of.
            _, x1, x2, _, _, product = words
            np.multiply(x2, _PHILOX_M1, out=product)
            np.right_shift(product, _32, out=x2)
            np.bitwise_xor(x2, x1, out=x2)
            np.bitwise_xor(x2, keys[9][0], out=x2)
            np.left_shift(product, _32, out=product)
            np.bitwise_or(x2, product, out=target)
    return out


def _round_keys(key: int) -> list[tuple[np.uint64, np.uint64]]:
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    return [
        (
            np.uint64((low + number * _PHILOX_W0) & 0xFFFFFFFF),
            np.uint64((high + number * _PHILOX_W1) & 0xFFFFFFFF),
        )
        for number in range(10)
    ]


def _first_rounds(
    keys: list[tuple[np.uint64, np.uint64]], c0_N: U64, c1_D: U64, words: U64
) -> None:
    """Write the four words after two rounds on every pair of counters to words[:4], [D, N] each."""
    (a0, a1), (b0, b1) = keys[:2]
    product_N, product_D = (c0_N & _LOW32) * _PHILOX_M0, c1_D * _PHILOX_M1
    np.bitwise_xor(((product_D >> _32) ^ a0)[:, None], (c0_N >> _32)[None, :], out=words[4])
    second_N = ((product_N >> _32) ^ a1) * _PHILOX_M1
    np.multiply(words[4], _PHILOX_M0, out=words[4])
    np.bitwise_xor(((second_N >> _32) ^ b0)[None, :], (product_D & _LOW32)[:, None], out=words[0])
    words[1] = second_N & _LOW32
    np.right_shift(words[4], _32, out=words[2])
    np.bitwise_xor(words[2], ((product_N & _LOW32) ^ b1)[None, :], out=words[2])
    np.bitwise_and(words[4], _LOW32, out=words[3])


def _philox_rounds(keys: list[tuple[np.uint64, np.uint64]], words: U64) -> None:
    """Take words[:4] through the rounds, in place; words[4:6] is scratch space."""
    x0, x1, x2, x3, product0, product1 = words
    for k0, k1 in keys:
        np.multiply(x0, _PHILOX_M0, out=product0)
        np.multiply(x2, _PHILOX_M1, out=product1)
        np.right_shift(product1, _32, out=x0)
        np.bitwise_xor(x0, x1, out=x0)
        np.bitwise_xor(x0, k0, out=x0)
        np.right_shift(product0, _32, out=x2)
        np.bitwise_xor(x2, x3, out=x2)
        np.bitwise_xor(x2, k1, out=x2)
        np.bitwise_and(product1, _LOW32, out=x1)
        np.bitwise_and(product0, _LOW32, out=x3)


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
