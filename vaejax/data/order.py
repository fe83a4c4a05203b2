"""The order of the images in training: grain's shuffle, of many positions at a time.

grain computes the place of one image in Python and C++, which takes as long as copying its pixels
six times. This is the same permutation, bit for bit, in NumPy: a Feistel network (Simon, Beaulieu
et al. 2013, https://eprint.iacr.org/2013/404, of four rounds) permutes the numbers below a power of
four, and is applied again to those that fall outside the data set (Black and Rogaway 2002,
"Ciphers with Arbitrary Finite Domains"). It needs no memory that grows with the data set.
"""

import functools

import numpy as np
from jaxtyping import Int, Integer, UInt32

_ROUNDS = 4
_MIN_BITS = 16  # of a block: below that grain's authors saw patterns
_FEW = 1024  # images: so few of the block's numbers are among them that NumPy's calls are too many
_AT_A_TIME = 8192  # images: NumPy's overhead of a call is then small beside the work


class Order:
    """The indices of every batch, without end: a sequence with random access.

    Every epoch has `steps` full batches of its own permutation; the rest of it is left out.
    """

    def __init__(self, images: int, *, batch_size: int, seed: int):
        self._images, self._batch_size = images, batch_size
        self._steps = images // batch_size
        self._steps_at_a_time = max(1, _AT_A_TIME // batch_size)
        # grain's seed for a `shuffle()` right after a `seed()`
        self._seed = int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint32)[0])
        self._some_batches = functools.lru_cache(maxsize=4)(self._permute_batches)

    def __getitem__(self, number: int) -> Int[np.ndarray, " b"]:
        """Return the indices of the images in batch `number`, counted from 0."""
        epoch, step = divmod(number, self._steps)
        part, row = divmod(step, self._steps_at_a_time)
        return self._some_batches(epoch, part)[row]

    def _permute_batches(self, epoch: int, part: int) -> Int[np.ndarray, "s b"]:
        first = part * self._steps_at_a_time
        last = min(first + self._steps_at_a_time, self._steps)
        positions = np.arange(first * self._batch_size, last * self._batch_size)
        indices = permute(positions, self._images, seed=(self._seed + epoch) % 2**32)
        return indices.reshape(-1, self._batch_size)


def permute(positions: Int[np.ndarray, " n"], count: int, *, seed: int) -> Int[np.ndarray, " n"]:
    """Return the places of positions in the permutation of `range(count)` that belongs to a seed:
    `grain.experimental.index_shuffle(position, count - 1, seed, rounds=4)` of each."""
    if count < _FEW:
        import grain

        shuffle = grain.experimental.index_shuffle
        return np.array([shuffle(p, count - 1, seed, _ROUNDS) for p in positions.tolist()])
    bits = int(np.ceil(np.log2(count - 1)))  # one too few if count - 1 is a power of two: as grain
    half = max(bits + bits % 2, _MIN_BITS) // 2
    keys = _seed_sequence(seed, _ROUNDS) & np.uint32(2**half - 1)
    places = positions.astype(np.uint32 if half <= 16 else np.int64)  # 64 bits take twice as long
    outside = np.arange(len(places))
    while len(outside):
        places[outside] = _encrypt(places[outside], keys, half)
        outside = outside[places[outside] >= count]
    return places.astype(np.int64)


def _encrypt(
    values: Integer[np.ndarray, " n"], keys: UInt32[np.ndarray, " r"], half: int
) -> Integer[np.ndarray, " n"]:
    """Encrypt numbers of two halves, each of so many bits."""
    mask = 2**half - 1
    left, right = values >> half & mask, values & mask
    for first, second in zip(keys[::2].tolist(), keys[1::2].tolist(), strict=True):
        left ^= _mix(right, half) ^ first
        right ^= _mix(left, half) ^ second
    return left << half | right


def _mix(x: Integer[np.ndarray, " n"], half: int) -> Integer[np.ndarray, " n"]:
    """Simon's round function of a half."""
    one, eight, two = (x << by | x >> half - by for by in (1, 8, 2))
    return (one & eight ^ two) & 2**half - 1


def _seed_sequence(seed: int, count: int) -> UInt32[np.ndarray, " {count}"]:
    """Generate numbers of 32 bits from one: C++'s `std::seed_seq` ([rand.util.seedseq])."""
    mask, words = 2**32 - 1, [0x8B8B8B8B] * count
    t = (count - 1) // 2 if count < 7 else 3
    p, q = (count - t) // 2, (count - t) // 2 + t
    steps = max(2, count)

    def scramble(k: int) -> int:
        x = words[k % count] ^ words[(k + p) % count] ^ words[(k - 1) % count]
        return x ^ x >> 27

    for k in range(steps):
        r1 = 1664525 * scramble(k) & mask
        r2 = r1 + (1 if k == 0 else k % count + (seed if k == 1 else 0)) & mask
        words[(k + p) % count] = words[(k + p) % count] + r1 & mask
        words[(k + q) % count] = words[(k + q) % count] + r2 & mask
        words[k % count] = r2
    for k in range(steps, steps + count):
        x = words[k % count] + words[(k + p) % count] + words[(k - 1) % count] & mask
        r3 = 1566083941 * (x ^ x >> 27) & mask
        r4 = r3 - k % count & mask
        words[(k + p) % count] ^= r3
        words[(k + q) % count] ^= r4
        words[k % count] = r4
    return np.array(words, np.uint32)
