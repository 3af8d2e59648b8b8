"""Randomness that is addressed: bits and torch generators that are a function of names and numbers.

Nothing is consumed and nothing is kept, so a run that resumes at step 7 sees what it would have
seen, whatever ran before.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def key_of(*parts: str | int) -> int:
    """Return a stable 64-bit key of a path of names and numbers; ("a", "bc") is not ("ab", "c")."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def bits(key: int, counter: int, count: int) -> npt.NDArray[np.uint64]:
    """Return `count` words of Philox4x64-10 under a 64-bit key, the counter-th stretch of them.

    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Stretches of less than
    2^66 words do not overlap.
    """
    # numpy promises the words of a bit generator, not what Generator makes of them (NEP 19)
    return np.random.Philox(key=key, counter=counter << 64).random_raw(count)


def uniforms(key: int, counter: int, count: int) -> npt.NDArray[np.float64]:
    """Return `count` numbers in [0, 1), the counter-th stretch under a key."""
    high53 = bits(key, counter, count) >> np.uint64(11)
    return high53.astype(np.float64) * np.float64(2.0**-53)


def order(total: int, key: int, counter: int) -> npt.NDArray[np.int64]:
    """Return the counter-th random order of 0 to total - 1 under a key."""
    return np.argsort(bits(key, counter, total), kind="stable")
