"""Counter-based random numbers on the host, in NumPy: `core/rng.py` for draws made before a batch exists.

Every draw is a hash (splitmix64, Steele et al. 2014) of its key, so it does not depend on call order, on the number of
hosts, or on the version of NumPy.
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
    """Returns the key, u64[1], of a named stream and any integers, such as seed, epoch and example id."""
    state = mix(np.array([zlib.crc32(stream.encode())], np.uint64))
    for number in numbers:
        state = mix(state ^ mix(np.array([number % 2**64], np.uint64)))
    return state


def uniform(key_: np.ndarray, count: int) -> np.ndarray:
    """Returns f64[count], uniform in [0, 1), for a key from `key`."""
    bits = mix(key_ ^ mix(np.arange(count, dtype=np.uint64)))
    # A float64 has 53 significant bits.
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Applies a pseudo-random permutation of range(size) to each index, without storing the permutation.

    A Feistel network over the smallest even number of bits that holds `size - 1`. It is applied again until the value
    is in range (cycle walking), at most four times on average.

    Args:
      indices: i64[n], each in [0, size).
      size: length of the permuted range.
      keys: u64[n], the key of each index's permutation, or u64[1] for one permutation.
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
