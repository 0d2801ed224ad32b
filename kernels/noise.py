"""Counter-based noise of a draw, on the device: a hash of (seed, position, counter).

The same bits as reference.noise_bits and its neighbours, so that a CPU and a GPU draw alike.
Source: Gumbel-max, Gumbel 1954; splitmix64, Steele et al. 2014 (constants of Stafford's mix 13);
the 32-bit finalizer is C. Wellons' lowbias32, https://github.com/skeeto/hash-prospector.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix64(z):
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def noise_key(seed, position):
    """The int64 key of a row's first draw at a position. Twin: reference.noise_keys."""
    return _mix64(_mix64(seed) + position.to(tl.int64) * -0x61C8864680B583EB)


@triton.jit
def next_noise_key(key):
    """The key of the draw after one that was dropped. Twin: reference.next_noise_keys."""
    return _mix64(key - 0x61C8864680B583EB)


@triton.jit
def noise_bits(key, counters):
    """31 random bits for each int32 counter: a token id, or -1 - tile. Twin: reference's."""
    x = counters.to(tl.uint32, bitcast=True) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    signed = x.to(tl.int32, bitcast=True)
    return signed ^ (signed >> 16)  # the shift copies the sign, so the sign ends as zero


@triton.jit
def log_exponential(bits):
    """log(E), E = -log(1 - u) with u in (0, 1) from the bits: minus a Gumbel."""
    # What wins has the smallest E, which comes from the smallest u, where a float is finest.
    # E = -log(u), as in the textbook, has steps of 2^-24 there: too coarse for 150k tokens.
    u = (bits.to(tl.float32) + 0.5) * 4.656612595521636e-10  # 2^-31 - 2^-55: below one
    series = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * 0.25)))
    return tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))
