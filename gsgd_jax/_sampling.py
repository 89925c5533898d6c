"""Random durations in integer arithmetic: the same bits wherever they run.

A compiler may fuse a product and a sum of floats, and does so or not by
backend, by program, under `vmap` or alone; one last bit, added up over many
tasks, then changes who arrives first. So a duration is drawn through the
inverse of its distribution function, tabulated when the process is made, and
interpolated in unsigned 32-bit integers.

The table has `_BINS` equally likely bins, the first and the last one split into
as many again, so that it ends where some 2^-23 of the probability is left.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsgd_jax.clock import TICKS, Time

_LOG_BINS = 11
_BINS = 2**_LOG_BINS


class Table(NamedTuple):
  """A distribution of positive numbers, by its quantiles."""

  knots: np.ndarray  # shape=(3 * _BINS - 1,), uint32: quantiles times 2^bits.
  bits: int


def table(quantile: Callable[[np.ndarray], np.ndarray]) -> Table:
  """Tabulates a vectorised quantile function, whose values are below 2^30."""
  # At the very ends, where a quantile may be infinite, half a bin is left out.
  tail = np.append(0.5, np.arange(1, _BINS)) / _BINS**2
  p = np.concatenate([tail, np.arange(1, _BINS) / _BINS, 1 - tail[::-1]])
  values = quantile(p)
  bits = 31 - max(1, math.ceil(math.log2(values[-1] + 1e-9)))
  return Table(np.round(values * 2.0**bits).astype(np.uint32), bits)


def draw(
  table: Table, key: jax.Array, counters: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """A number of the distribution, times 2^bits: uint32.

  Args:
    table: The distribution.
    key: A raw key, uint32, shape (2,).
    counters: Two int32 scalars: which number of that key.
  """
  first, fraction = threefry(key, *counters)
  bin_ = first >> (32 - _LOG_BINS)
  in_tail = (first >> (32 - 2 * _LOG_BINS)) & (_BINS - 1)
  inside = (bin_ > 0) & (bin_ < _BINS - 1)
  bin_ = jnp.where(bin_ > 0, bin_ + _BINS - 1, 0)
  bin_ = jnp.where(inside, bin_, bin_ + in_tail)
  knots = jnp.asarray(table.knots)
  low = knots[bin_]
  more, _ = _product(knots[bin_ + 1] - low, fraction)
  return low + more


def threefry(
  key: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 with 20 rounds: two random uint32 for two counters.

  JAX's own is a loop on the CPU, whose every turn is a call in the compiled
  step; written out it is fused into what is around it and costs next to nothing
  (a step of 26 us takes 43 with the loop).

  Source: Salmon et al., `Parallel random numbers: as easy as 1, 2, 3`, 2011.
  """
  keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
  x, y = first.astype(jnp.uint32) + key[0], second.astype(jnp.uint32) + key[1]
  for group in range(5):
    for by in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
      x = x + y
      y = ((y << by) | (y >> (32 - by))) ^ x
    x = x + keys[(group + 1) % 3]
    y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
  return x, y


def as_time(number: jax.Array, bits: int) -> Time:
  """A number times 2^bits as a time; uint32."""
  return _shifted(jnp.zeros_like(number), number, bits)


def product(number: jax.Array, bits: int, other: jax.Array, more: int) -> Time:
  """The product of two numbers, times 2^bits and 2^more, as a time."""
  return _shifted(*_product(number, other), bits + more)


def _product(a, b):
  """The high and the low 32 bits of a product of two uint32."""
  half = 0xFFFF
  a_high, a_low, b_high, b_low = a >> 16, a & half, b >> 16, b & half
  middle = a_low * b_high + ((a_low * b_low) >> 16)
  other = a_high * b_low + (middle & half)
  return a_high * b_high + (middle >> 16) + (other >> 16), a * b


def _shifted(high, low, bits):
  """A number of 64 bits, `bits` of them behind the point, as a time."""
  whole = _right(high, low, bits)
  ticks = low << (30 - bits) if bits < 30 else _right(high, low, bits - 30)
  return Time(whole.astype(jnp.int32), (ticks & (TICKS - 1)).astype(jnp.int32))


def _right(high, low, by):
  """The low 32 bits of a number of 64, moved to the right by a Python int."""
  if by >= 32:
    return high >> (by - 32)
  if by == 0:
    return low
  return (high << (32 - by)) | (low >> by)


def exponential_quantile(p: np.ndarray) -> np.ndarray:
  """Of mean 1."""
  return -np.log1p(-p)


def gamma_quantile(cv: float) -> Callable[[np.ndarray], np.ndarray]:
  """Of the gamma distribution of mean 1 and a coefficient of variation.

  The distribution function is the integral of its density over log x, where
  it is smooth for every shape.
  """
  shape = 1 / cv**2

  def log_density(y):  # Of y = log(x / mean), up to a constant.
    return shape * (y - np.exp(y) + 1)

  # Within these bounds it is above e^-60 of its peak, which is at y = 0.
  y = np.linspace(-60 / shape - 15 * cv, 11 * cv, 400_001)
  density = np.exp(log_density(y))
  steps = np.concatenate([[0], (density[1:] + density[:-1]) / 2])
  cumulative = np.cumsum(steps)

  def quantile(p):
    return np.exp(np.interp(p * cumulative[-1], cumulative, y))

  return quantile
