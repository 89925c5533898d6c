"""Who arrives next at the parameter server, and when.

A cluster is described by how long its workers' tasks take: an
`ArrivalProcess` is a pair of pure functions, `init` for what is known of the
machines, `duration` for the time of a worker's k-th task. Given the machines
that time depends on the worker, k and the clock alone, so nothing has to be
remembered; and it is computed in integers (`_sampling`), so a run is the same
to the last bit under `jit`, `scan` and `vmap`, and resumes exactly. Whoever
emulates the cluster (`_cluster`) keeps finish times and takes the earliest.

Processes: `round_robin`, `fixed_speeds`, `gamma_arrivals`, `uniform_arrivals`,
`exponential_arrivals`; `traces` has those that were recorded. `straggler` and
`failing` change one worker of any of them.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsgd_jax import _protocol, _sampling, clock
from gsgd_jax.clock import Time


class Outage(NamedTuple):
  """A worker is away; what it is computing when it leaves is lost.

  Attributes:
    worker: Which one, an int from 0.
    at: From when, in mean gradient computations since the start, on the
      workers' own clock (it stands still while the server replays).
    back: Until when; infinite if for good.

  Examples:
    >>> import gsgd_jax
    >>> gsgd_jax.failing(gsgd_jax.round_robin(), at=3.0, worker=1).outages
    (Outage(worker=1, at=3.0, back=inf),)
  """

  worker: int
  at: float
  back: float


class ArrivalProcess(NamedTuple):
  """How long workers' tasks take, and so who arrives next.

  Times are in mean gradient computations. All workers begin their first task
  at time 0; a worker that arrives begins its next one at once.

  Attributes:
    init: ``init(workers, key) -> machines``: what is known of the machines, a
      pytree of arrays. ``workers`` is a Python int, ``key`` a raw PRNG key
      (uint32, shape (2,)).
    duration: ``duration(machines, worker, task, now) -> time``: how long a
      worker's task takes that begins at ``now``: a float scalar of at least 0,
      or a :class:`Time` for exactness; infinite if it never ends (but for a
      trace, somebody has to go on). ``worker``
      and ``task`` are int32 scalars; a worker's tasks are numbered from 0 (in
      rounds of :func:`synchronous` from 1), ``now`` is a :class:`Time` on the
      workers' own clock, which stands still while the server replays.
    length: How many arrivals there are, if they end; None if they do not.
    outages: When workers are away, a tuple of :class:`Outage`.

  Examples:
    Every other task of a worker takes three times as long:

    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> hiccups = gsgd_jax.ArrivalProcess(
    ...     init=lambda workers, key: (),
    ...     duration=lambda machines, worker, task, now:
    ...         jnp.where(task % 2 == 0, 0.5, 1.5))
    >>> tx = gsgd_jax.asynchronous(optax.sgd(0.1), workers=4, arrivals=hiccups)
  """

  init: Callable[[int, jax.Array], Any]
  duration: Callable[[Any, jax.Array, jax.Array, Time], jax.Array | Time]
  length: int | None = None
  outages: tuple[Outage, ...] = ()

  @property
  def stopping(self) -> frozenset[int]:
    """The workers that stop for good."""
    return frozenset(o.worker for o in self.outages if o.back == math.inf)


_UNIT = Time(np.array(1, np.int32), np.array(0, np.int32))


def round_robin() -> ArrivalProcess:
  """Workers arrive in turn: 0, 1, ..., N-1, 0, 1, ...

  The kindest cluster: the first N gradients have staleness 0, 1, ..., N-1 and
  every later one N-1. A task takes one unit; worker i begins with a head start
  and arrives first after (i + 1) / N, so that arrivals are 1 / N apart. In
  rounds of :func:`synchronous` all take one unit.

  Returns:
    An :class:`ArrivalProcess`.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=4, arrivals=gsgd_jax.round_robin())
  """

  def init(workers, key):
    del key
    return clock.fractions(workers)

  def duration(first, worker, task, now):
    del now
    return clock.where(task == 0, clock.at(first, worker), _UNIT)

  return ArrivalProcess(init, duration)


def fixed_speeds(speeds: Sequence[float]) -> ArrivalProcess:
  """Every worker has a speed of its own, and keeps it.

  A task of worker i takes ``1 / speeds[i]`` units. Of workers that arrive at
  the same time the lower index comes first.

  Args:
    speeds: Gradients a unit, a positive number for each worker.

  Returns:
    An :class:`ArrivalProcess`.

  Raises:
    ValueError: ``speeds`` are not positive and finite, or (when the
      transformation is initialised) not as many as there are workers.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=3,
    ...     arrivals=gsgd_jax.fixed_speeds([2.0, 1.0, 0.25]))
  """
  given: Any = speeds
  try:
    given = np.asarray(speeds, np.float64)
    valid = given.ndim == 1 and np.all((given > 0) & (given < np.inf))
  except (TypeError, ValueError):
    valid = False
  if not valid:
    raise ValueError(
      f'speeds must be positive numbers, got {_protocol.in_a_line(given)}'
    )

  def init(workers, key):
    del key
    if len(given) != workers:
      raise ValueError(
        f'speeds must be as many as the workers, got {len(given)} for '
        f'{workers} workers'
      )
    return clock.arrays(clock.of_float64(1 / given))

  def duration(times, worker, task, now):
    del task, now
    return clock.at(times, worker)

  return ArrivalProcess(init, duration)


class Machines(NamedTuple):
  """What is known of machines with random task times."""

  # shape=(workers,), uint32: mean time of a task, in fractions of a unit; None
  # where it is one unit for all.
  mean: jax.Array | None
  key: jax.Array  # shape=(2,), uint32.


def gamma_arrivals(cv: float = 0.1, machine_cv: float = 0.0) -> ArrivalProcess:
  r"""Gamma-distributed task times on even or uneven machines.

  .. math::

    \mu_i \sim \mathrm{Gamma}(\text{mean } 1, \text{variation } v), \quad
    t_{ik} \sim \mathrm{Gamma}(\text{mean } \mu_i, \text{variation } c)

  with :math:`\mu_i` the mean task time of machine i, drawn once, and
  :math:`t_{ik}` the time of its k-th task; the variation is the standard
  deviation over the mean. With ``cv=0.1``, ``machine_cv=0`` is the usual
  homogeneous cluster, 0.6 the usual heterogeneous one (where the fast machines
  deliver 1.56 N gradients a unit between them, on average).

  Args:
    cv: c, from 0 to 2.
    machine_cv: v, from 0 to 2; at 0 all machines are equal.

  Returns:
    An :class:`ArrivalProcess`.

  Raises:
    ValueError: A variation is out of its range.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=64,
    ...     arrivals=gsgd_jax.gamma_arrivals(machine_cv=0.6))

  References:
    Ali et al., `Task execution time modeling for heterogeneous computing
    systems`, 2000.
    Hakimi et al., `Taming Momentum in a Distributed Asynchronous Environment`,
    arXiv:1907.11612, 2019.
  """
  return _random(_gamma('cv', cv), machine_cv)


def uniform_arrivals(
  spread: float = 0.5, machine_cv: float = 0.0
) -> ArrivalProcess:
  r"""Task times uniform in :math:`\mu_i (1 \pm \text{spread})`.

  Args:
    spread: From 0 to 1.
    machine_cv: As in :func:`gamma_arrivals`: the variation of :math:`\mu_i`.

  Returns:
    An :class:`ArrivalProcess`.

  Raises:
    ValueError: An argument is out of its range.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=4, arrivals=gsgd_jax.uniform_arrivals())
  """
  spread = _protocol.real('spread', spread)
  if spread > 1:
    raise ValueError(f'spread must be from 0 to 1, got {spread:g}')
  uniform = lambda p: 1 - spread + 2 * spread * p
  return _random(_sampling.table(uniform), machine_cv)


def exponential_arrivals(machine_cv: float = 0.0) -> ArrivalProcess:
  r"""Exponential task times: whoever computes may arrive at any moment.

  The memoryless cluster of queueing theory; a worker's task takes
  :math:`\mu_i` units on average.

  Args:
    machine_cv: As in :func:`gamma_arrivals`: the variation of :math:`\mu_i`.

  Returns:
    An :class:`ArrivalProcess`.

  Raises:
    ValueError: ``machine_cv`` is out of its range.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=4,
    ...     arrivals=gsgd_jax.exponential_arrivals())
  """
  exponential = _sampling.table(_sampling.exponential_quantile)
  return _random(exponential, machine_cv)


def _random(table, machine_cv):
  """Task times of a machine's mean times a number of the table, if any."""
  means = _gamma('machine_cv', machine_cv)

  def init(workers, key):
    machine_key, task_key = jax.random.split(key)
    mean = None
    if means is not None:
      counters = jnp.arange(workers, dtype=jnp.int32)
      counters = (counters, jnp.zeros_like(counters))
      mean = _sampling.draw(means, machine_key, counters)
    return Machines(mean, task_key)

  def duration(machines, worker, task, now):
    del now
    if means is None:
      if table is None:
        return _UNIT
      number = _sampling.draw(table, machines.key, (worker, task))
      return _sampling.as_time(number, table.bits)
    mean = machines.mean[worker]
    if table is None:
      return _sampling.as_time(mean, means.bits)
    number = _sampling.draw(table, machines.key, (worker, task))
    return _sampling.product(number, table.bits, mean, means.bits)

  return ArrivalProcess(init, duration)


def _gamma(name, cv):
  """The table of a gamma distribution of mean 1; None if all are 1."""
  cv = _protocol.real(name, cv)
  if cv > 2:
    raise ValueError(f'{name} must be from 0 to 2, got {cv:g}')
  if cv < 1e-6:  # Nothing that a tick would show.
    return None
  return _sampling.table(_sampling.gamma_quantile(cv))


def straggler(
  arrivals: ArrivalProcess, slowdown: float, worker: int = 0
) -> ArrivalProcess:
  """One worker's tasks take ``slowdown`` times as long.

  Args:
    arrivals: The process without it.
    slowdown: A positive number; below 1 the worker is faster than it was.
    worker: Which one, from 0.

  Returns:
    An :class:`ArrivalProcess`.

  Raises:
    ValueError: ``slowdown`` is not positive; ``worker`` is not an int from 0,
      or (when the transformation is initialised) there is none of that number;
      ``arrivals`` are a trace.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=4,
    ...     arrivals=gsgd_jax.straggler(gsgd_jax.gamma_arrivals(), 10.0))
  """
  slowdown = _protocol.real('slowdown', slowdown)
  if slowdown == 0:
    raise ValueError('slowdown must be positive, got 0')
  worker = _protocol.positive_int('worker', worker, minimum=0)
  _check_not_recorded('straggler', arrivals)

  def duration(machines, this, task, now):
    time = clock.of(arrivals.duration(machines, this, task, now))
    return clock.where(this == worker, clock.scale(time, slowdown), time)

  return arrivals._replace(
    init=_with_worker(arrivals.init, worker), duration=duration
  )


def failing(
  arrivals: ArrivalProcess,
  at: float,
  worker: int = 0,
  back: float | None = None,
) -> ArrivalProcess:
  """One worker fails at a time, and may come back.

  What it was computing is lost. If it comes back it reads the parameters and
  begins anew; if not, nobody waits for it, and its last gradient is never
  applied. (Rounds of :func:`synchronous` that need everybody wait for one that
  comes back, and refuse one that does not.)

  Args:
    arrivals: The process without it.
    at: When it fails, in mean gradient computations since the start, on the
      workers' own clock (it stands still while the server replays).
    worker: Which one, from 0.
    back: When it comes back, likewise, after ``at``; None if never.

  Returns:
    An :class:`ArrivalProcess`.

  Raises:
    ValueError: A time is not finite or negative, ``back`` is not after ``at``,
      or the worker is away at that time already; ``worker`` is not an int from
      0, or (when the transformation is initialised) there is none of that
      number; ``arrivals`` are a trace.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=4,
    ...     arrivals=gsgd_jax.failing(gsgd_jax.gamma_arrivals(), at=50.0))
  """
  at = _protocol.real('at', at)
  worker = _protocol.positive_int('worker', worker, minimum=0)
  if back is None:
    back = math.inf
  elif _protocol.real('back', back) <= at:
    raise ValueError(f'back must be after at={at:g}, got {back:g}')
  _check_not_recorded('failing', arrivals)
  outage = Outage(worker, at, float(back))
  for other in arrivals.outages:
    apart = outage.back <= other.at or other.back <= outage.at
    if other.worker == worker and not apart:
      raise ValueError(
        f'worker {worker} is away from {other.at:g} to {other.back:g} already, '
        f'got at={at:g} and back={back:g}'
      )
  outages = sorted((*arrivals.outages, outage), key=lambda o: o.at)
  return arrivals._replace(
    init=_with_worker(arrivals.init, worker), outages=tuple(outages)
  )


def checked(arrivals: Any) -> ArrivalProcess:
  """Refuses what is no arrival process."""
  if not isinstance(arrivals, ArrivalProcess):
    raise ValueError(
      'arrivals must be an ArrivalProcess, say gsgd_jax.round_robin() or '
      'gsgd_jax.recorded_arrivals(trace), got '
      f'{_protocol.in_a_line(arrivals)}'
    )
  return arrivals


def _with_worker(init, worker):
  """`init` that refuses a cluster without that worker."""

  def checked(workers, key):
    if worker >= operator.index(workers):
      raise ValueError(
        f'worker must be below the number of workers, {workers}, got {worker}'
      )
    return init(workers, key)

  return checked


def _check_not_recorded(who, arrivals):
  if arrivals.length is not None:
    raise ValueError(
      f'{who} changes task times, but a trace says when everybody arrives: '
      'change the trace'
    )
