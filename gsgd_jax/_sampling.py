"""Random durations in integer arithmetic: the same bits wherever they run.

A compiler may fuse a product and a sum of floats, and does so or not by
backend, by program, under `vmap` or alone; one last bit, added up over many
tasks, then changes who arrives first. So a duration is drawn through the
inverse of its distribution function, tabulated when the process is made, and
interpolated in unsigned 32-bit integers.

The table has `_BINS` equally likely bins, the last one split into as many
again, so that it ends where 2^-22 of the probability is left.
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

  knots: np.ndarray  # shape=(2 * _BINS,), uint32: quantiles times 2^bits.
  bits: int


def table(quantile: Callable[[np.ndarray], np.ndarray]) -> Table:
  """Tabulates a vectorised quantile function, whose values are below 2^30."""
  central = np.arange(_BINS) / _BINS
  # The tail's own end, where a quantile may be infinite, is a bin's middle.
  tail = np.append(np.arange(1, _BINS), _BINS - 0.5) / _BINS
  values = quantile(np.concatenate([central, central[-1] + tail / _BINS]))
  bits = 31 - max(1, math.ceil(math.log2(values[-1] + 1e-9)))
  return Table(np.round(values * 2.0**bits).astype(np.uint32), bits)


def draw(table: Table, key: jax.Array) -> jax.Array:
  """A number of the distribution, times 2^bits: uint32, of shape ()."""
  first, fraction = jax.random.bits(key, (2,), jnp.uint32)
  bin_ = first >> (32 - _LOG_BINS)
  in_tail = (first >> (32 - 2 * _LOG_BINS)) & (_BINS - 1)
  bin_ = jnp.where(bin_ == _BINS - 1, bin_ + in_tail, bin_)
  knots = jnp.asarray(table.knots)
  low = knots[bin_]
  more, _ = _product(knots[bin_ + 1] - low, fraction)
  return low + more


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
