"""The bit contract again, in plain NumPy and Python integers, written from docs/bits.md."""

import numpy as np

WORD = 2**32


def threefry2x32(key, counter):
    """Threefry-2x32-20 in Python integers."""
    k = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + k[0]) % WORD, (counter[1] + k[1]) % WORD
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    for round_ in range(20):
        r = rotations[round_ % 8]
        x = (x + y) % WORD
        y = ((y << r) | (y >> (32 - r))) % WORD ^ x
        if round_ % 4 == 3:
            s = round_ // 4 + 1
            x, y = (x + k[s % 3]) % WORD, (y + k[(s + 1) % 3] + s) % WORD
    return x, y


def lowbias32(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) % WORD
    return x ^ (x >> 16)


def word(key_words, index):
    """The word of one element, from its global index."""
    *row, column = index if len(index) else (0,)
    row = row + [0] * (2 if not row else len(row) % 2)
    a, b = k0, k1 = key_words[0] ^ 0x64726F70, key_words[1] ^ 0x6A617802
    for pair in zip(row[::2], row[1::2], strict=True):
        a, b = threefry2x32((a, b), pair)
    c, d = lowbias32(column * 0x9E3779B9 % WORD ^ k0), lowbias32(column * 0x85EBCA6B % WORD ^ k1)
    x = (c ^ a) * (b | 1) % WORD
    x = (x ^ (x >> 15)) * 0x846CA68B % WORD
    return ((x ^ (x >> 16)) + d) % WORD


def words(key_words, shape, shared=()):
    """The words of an array; along shared dimensions the index is 0."""
    key_words = [int(k) for k in key_words]
    out = np.zeros(shape, np.uint32)
    for index in np.ndindex(*shape):
        out[index] = word(key_words, [0 if d in shared else i for d, i in enumerate(index)])
    return out


def threshold(rate):
    """round(float32(rate) * 2^32), half to even."""
    return round(float(np.float32(rate)) * WORD)


def keep(key_words, shape, rate, shared=()):
    return words(key_words, shape, shared).astype(np.uint64) >= threshold(rate)


def scale(rate):
    """1 / q in float32, of the keep rate q that the threshold realises."""
    q = np.float32((WORD - threshold(rate)) / WORD)
    return np.float32(1) / q if q else np.float32(0)
