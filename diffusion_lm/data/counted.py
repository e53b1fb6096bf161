"""Counted randomness on the host, in numpy: the twin of `core/rng.py` for what is drawn before a batch exists.

Every draw is a hash of what it is for (splitmix64, Steele et al. 2014), so it does not depend on call order, on the
number of hosts, or on the version of numpy.
"""

import zlib

import numpy as np

_ROUNDS = 8


def mix(values: np.ndarray) -> np.ndarray:
    """Returns the splitmix64 hash of u64[...], elementwise."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key(stream: str, *numbers: int) -> np.ndarray:
    """Returns the u64[1] key of a named stream and any non-negative numbers: seed, epoch, example id."""
    state = mix(np.array([zlib.crc32(stream.encode())], np.uint64))
    for number in numbers:
        state = mix(state ^ mix(np.array([number % 2**64], np.uint64)))
    return state


def uniform(key_: np.ndarray, count: int) -> np.ndarray:
    """Returns f64[count] uniforms in [0, 1) under a key of `key`."""
    bits = mix(key_ ^ mix(np.arange(count, dtype=np.uint64)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Returns where a permutation of range(size) sends each index, without ever holding the permutation.

    A Feistel network over the smallest even number of bits that holds `size`, walked until the value is back in range
    (at most four steps on average).

    Args:
      indices: i64[n], each in [0, size).
      size: length of the permuted range.
      keys: u64[n], one permutation each (u64[1] for the same one throughout).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    values = np.asarray(indices, np.uint64).copy()
    keys = np.broadcast_to(keys, values.shape)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & low
        for number in range(_ROUNDS):
            scrambled = mix(keys[outside] ^ mix(right | (np.uint64(number) << np.uint64(56))))
            left, right = right, left ^ (scrambled & low)
        values[outside] = (left << half) | right
        outside &= values >= size
    return values.astype(np.int64)
