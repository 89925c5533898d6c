"""Simulated time, exactly.

Sums of floats lose the order in which workers arrive: in float32 after some
thousand updates, and the clock itself stands still after some ten million. So
time is a whole number of units and a whole number of *ticks*, 2^30 of them a
unit, both int32. Additions and comparisons are exact, on every backend and
under every transformation; 2^31 units are as far as it goes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import custom_batching, lax

from gsgd_jax import _protocol

_BITS = 30
TICKS = 2**_BITS  # A unit.
_NEVER = 2**31 - 1


class Time(NamedTuple):
  """A time, or a duration, of at least 0; a unit is a mean gradient's time.

  Attributes:
    whole: Whole units, int32. The largest int32 is *never*.
    ticks: Ticks of 2^-30 units on top of them, int32, in ``[0, 2**30)``.

  Examples:
    A worker whose gradients always take a unit and one tick:

    >>> import jax.numpy as jnp
    >>> import gsgd_jax
    >>> one = jnp.ones([], jnp.int32)
    >>> process = gsgd_jax.ArrivalProcess(
    ...     init=lambda workers, key: (),
    ...     duration=lambda state, worker, task, now: gsgd_jax.Time(one, one))
  """

  whole: jax.Array | np.ndarray
  ticks: jax.Array | np.ndarray


def simulated_time(
  state: optax.OptState,
) -> jax.Array | np.ndarray | np.floating:
  r"""The simulated clock, in mean gradient computations.

  .. math::

    T = T_{workers} + n_{serial}
        + \sum_{windows} \lceil n_{parallel} / N \rceil
        + n_{shared} \left( \frac{1}{\min(N, B)} + c \right)
        + 2 n_{exact}

  where :math:`T_{workers}` is when the last gradient arrived, or the last
  round ended; the rest is what the replays of :func:`guided` cost, by its
  ``replay_model``: a unit for each that the server takes itself
  (``serial``), a unit for every N of a window (``parallel``), or :math:`B`
  examples split over the N workers and a synchronisation (``shared``); and two
  units for every product of :func:`exact_delay_compensation`.
  Meanwhile the workers wait, and their own clock, by which machines fail and
  traces are recorded, stands still. (Where one gradient is of several batches,
  as in rounds of :func:`synchronous` by their mean, or in :func:`rennala`, it
  costs that many units.)
  Scoring and verification are forward passes and cost nothing on this clock.

  Args:
    state: The state of :func:`asynchronous`, :func:`delayed` with an int,
      :func:`synchronous` or :func:`data_parallel`, or of any chain around one.

  Returns:
    Where the state is known, a NumPy float64, exact to 2^-30 units; inside a
    transformation of JAX a float of its default precision: the exact time,
    rounded once. Shapes follow the state's (seeds under ``vmap``).

  Raises:
    ValueError: ``state`` holds no clock (:func:`delayed` with a tree of
      delays and plain optimizers have none).

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(optax.sgd(0.1), workers=4)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(3 + 10):  # 3 calls until the first gradient arrives.
    ...   updates, state = tx.update(params, state, params)
    >>> print(gsgd_jax.simulated_time(state))
    2.5
  """
  clocks = _protocol.announced(state, _protocol.Clock)
  if not clocks:
    raise ValueError(
      'simulated_time found no clock in this state: asynchronous, delayed with '
      'an int, synchronous and data_parallel have one; one worker alone is '
      'asynchronous(inner, workers=1)'
    )
  clock = clocks[0]  # The outermost.
  now = in_units(clock.time)
  for replays in _protocol.announced(state, _protocol.Replays):
    now = now + _cost(replays, clock)
  for gradients in _protocol.announced(state, _protocol.ServerGradients):
    now = now + _taken(gradients, clock)
  return now


def _cost(replays, clock):
  xp = np
  leaves = jax.tree.leaves((replays, clock))
  if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
    xp = jnp
  dtype = xp.zeros(()).dtype
  serial, parallel, shared, workers, size, batches = (
    xp.asarray(n).astype(dtype)
    for n in (*replays[:3], clock.workers, *replays[3:])
  )
  taken = xp.arange(1, parallel.shape[-1] + 1).astype(dtype)
  rounds = xp.ceil(taken / workers[..., None]) * parallel
  unit = xp.asarray(in_units(clock.unit)).astype(dtype) * batches
  sync = xp.asarray(in_units(clock.sync_cost)).astype(dtype)
  split = unit / xp.minimum(workers, size) + sync
  return (serial + rounds.sum(axis=-1)) * unit + shared * split


def _taken(gradients, clock):
  """What gradients cost that the server took itself, of its own."""
  serial = _protocol.Replays(
    serial=gradients.count,
    parallel=gradients.count[..., None] * 0,
    shared=gradients.count * 0,
    batch_size=gradients.count * 0 + 1,
    batches=gradients.batches,
  )
  return _cost(serial, clock)


def zero(shape: tuple[int, ...] = ()) -> Time:
  """The beginning."""
  return Time(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))


def never(shape: tuple[int, ...] = ()) -> Time:
  """A time that does not come."""
  return Time(jnp.full(shape, _NEVER, jnp.int32), jnp.zeros(shape, jnp.int32))


def is_never(time: Time) -> jax.Array:
  """Whether a time does not come."""
  return time.whole == _NEVER


def of(units: Any) -> Time:
  """A time from units: a float, rounded to a tick, or a `Time` as it is.

  What is negative is 0; NaN, infinity and what lies beyond 2^31 are never.
  """
  if isinstance(units, Time):
    return Time(*(jnp.asarray(x, jnp.int32) for x in units))
  if isinstance(units, float | int):
    return fixed(units)
  units = jnp.asarray(units)
  if not jnp.issubdtype(units.dtype, jnp.floating):
    units = units.astype(jnp.float32)
  units = jnp.maximum(units, 0)
  comes = units < 2**31 - 129  # The largest float32 below 2^31 - 1.
  units = jnp.where(comes, units, 0)
  # A remainder, as a compiler may fuse a difference with a product before it.
  fraction = lax.rem(units, jnp.ones_like(units))
  ticks = jnp.round(fraction * TICKS).astype(jnp.int32)
  whole = units.astype(jnp.int32) + (ticks >> _BITS)
  return where(comes, Time(whole, ticks & (TICKS - 1)), never(whole.shape))


def in_units(time: Time) -> jax.Array | np.ndarray | np.floating:
  """As a float: NumPy's float64 where it is known, else JAX's default float.

  That is exact up to 2^23 units where it is known; a float32 is the exact
  time, rounded.
  """
  if isinstance(time.whole, jax.core.Tracer):
    dtype = jnp.zeros(()).dtype
    units = time.whole.astype(dtype) + time.ticks.astype(dtype) / TICKS
    return jnp.where(is_never(time), jnp.inf, units)
  whole, ticks = (np.asarray(x) for x in time)
  units = whole + ticks / TICKS
  return np.where(whole == _NEVER, np.inf, units)[()]


def of_float64(units: np.ndarray | np.float64) -> Time:
  """NumPy's: the same, from float64 units."""
  comes = units < _NEVER
  units = np.where(comes, np.maximum(units, 0), 0)
  whole = np.floor(units)
  ticks = np.round((units - whole) * TICKS).astype(np.int64)
  whole = np.where(comes, whole.astype(np.int64) + (ticks >> _BITS), _NEVER)
  return Time(whole.astype(np.int32), (ticks & (TICKS - 1)).astype(np.int32))


def fixed(units: float) -> Time:
  """A time that is known in Python, as arrays of its own."""
  return arrays(of_float64(np.float64(units)))


def arrays(time: Time) -> Time:
  """NumPy's times as JAX's."""
  return Time(*map(jnp.asarray, time))


def fractions(number: int) -> Time:
  """1 / n, 2 / n, ..., 1, to the nearest tick; also of a huge number."""
  top = jnp.arange(1, number + 1, dtype=jnp.uint32)
  divisor = jnp.uint32(number)

  def digit(_, carry):  # Long division, in base 2.
    quotient, rest = carry
    more = rest * 2 >= divisor
    digit = jnp.where(more, jnp.uint32(1), jnp.uint32(0))
    return quotient * 2 + digit, rest * 2 - digit * divisor

  carry = (
    jnp.where(top == divisor, jnp.uint32(1), jnp.uint32(0)),
    top % divisor,
  )
  ticks, rest = lax.fori_loop(0, _BITS, digit, carry)
  rounded_up = (rest * 2 >= divisor).astype(jnp.int32)
  ticks = ticks.astype(jnp.int32) + rounded_up
  return Time(ticks >> _BITS, ticks & (TICKS - 1))


def add(time: Time, other: Time) -> Time:
  """The sum; never plus anything is never."""
  ticks = time.ticks + other.ticks  # Below 2^31.
  total = Time(time.whole + other.whole + (ticks >> _BITS), ticks & (TICKS - 1))
  beyond = is_never(time) | is_never(other) | (total.whole < 0)
  return where(beyond, never(total.whole.shape), total)


def subtract(time: Time, other: Time) -> Time:
  """The time from `other` to a later `time`; never stays never."""
  ticks = time.ticks - other.ticks
  total = Time(time.whole - other.whole + (ticks >> _BITS), ticks & (TICKS - 1))
  return where(is_never(time), never(total.whole.shape), total)


def scale(time: Time, factor: float) -> Time:
  """A time so many times as long; a tick in float32's 2^24 may be lost."""
  units = (
    time.whole.astype(jnp.float32) + time.ticks.astype(jnp.float32) / TICKS
  )
  return where(is_never(time), never(units.shape), of(units * factor))


def at_most(time: Time, other: Time) -> jax.Array | np.ndarray:
  """Whether `time` is not later than `other`."""
  same = (time.whole == other.whole) & (time.ticks <= other.ticks)
  return (time.whole < other.whole) | same


def where(condition: jax.Array | bool, time: Time, other: Time) -> Time:
  """`time` where the condition holds, else `other`."""
  return Time(
    jnp.where(condition, time.whole, other.whole),
    jnp.where(condition, time.ticks, other.ticks),
  )


@custom_batching.custom_vmap
def first(times: Time) -> jax.Array:
  """The index of the earliest; of equal ones the first. int32."""
  ticks = jnp.where(times.whole == jnp.min(times.whole), times.ticks, TICKS)
  return jnp.argmin(ticks).astype(jnp.int32)


@first.def_vmap
def _first_of_many(axis_size, in_batched, times):
  """Where an argmin of many rows is slow on the CPU, and three minima are not.

  (Of one row it is the other way round: three minima are three calls.)
  """

  def one(times):
    ticks = jnp.where(times.whole == jnp.min(times.whole), times.ticks, TICKS)
    number = len(ticks)
    indices = lax.iota(jnp.int32, number)
    return jnp.min(jnp.where(ticks == jnp.min(ticks), indices, number))

  axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched[0])
  return jax.vmap(one, in_axes=(axes,), axis_size=axis_size)(times), True


def latest(times: Time) -> Time:
  """The latest of an array of times."""
  whole = jnp.max(times.whole)
  return Time(whole, jnp.max(jnp.where(times.whole == whole, times.ticks, 0)))


def order(times: Time) -> jax.Array:
  """Indices from the earliest to the latest; equal ones as they stand."""
  return jnp.lexsort((times.ticks, times.whole)).astype(jnp.int32)


def at(times: Time, index: jax.Array) -> Time:
  """One of an array of times."""
  return Time(*(jnp.asarray(x)[index] for x in times))
