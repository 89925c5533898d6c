"""A cluster at work: whose gradient is under way until when.

What the emulations share. Finish times are kept exactly (`clock`), the next to
arrive is an argmin over them, and only single entries are written, so that a
step costs the same for any number of workers but for that argmin.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsgd_jax import _protocol, _ring, clock
from gsgd_jax.arrivals import ArrivalProcess
from gsgd_jax.clock import Time


class Cluster(NamedTuple):
  """Workers and their tasks."""

  machines: Any  # What the arrival process knows.
  finish: Time  # shape=(workers,): when each one arrives; idle ones never do.
  tasks: jax.Array  # shape=(workers,), int32: how many each one has finished.
  lost: jax.Array | None  # shape=(workers,), bool: nothing comes of its task.
  idle: jax.Array | None  # shape=(workers,), bool; None where nobody ever is.


def clock_of(
  workers: int, sync_cost: Any, unit: float = 1.0
) -> _protocol.Clock:
  """A clock at its beginning; one worker has nobody to synchronise with."""
  return _protocol.Clock(
    time=clock.zero(),
    workers=jnp.asarray(workers, jnp.int32),
    unit=clock.fixed(unit),
    sync_cost=clock.of(sync_cost) if workers > 1 else clock.zero(),
  )


def begin(
  process: ArrivalProcess, workers: int, seed: Any, idle: bool = False
) -> Cluster:
  """Everybody begins the first task, or is idle."""
  if len(process.stopping) >= workers:
    raise ValueError(
      'every worker stops for good: nothing would arrive any more'
    )
  cluster = Cluster(
    process.init(workers, jax.random.PRNGKey(seed)),
    clock.never((workers,)),
    jnp.zeros([workers], jnp.int32),
    jnp.zeros([workers], bool) if loses(process) else None,
    jnp.ones([workers], bool) if idle else None,
  )
  if idle:
    return cluster
  finish, lost = jax.vmap(
    lambda worker: _task(process, cluster, worker, clock.zero())
  )(jnp.arange(workers, dtype=jnp.int32))
  return cluster._replace(finish=finish, lost=lost)


def loses(process: ArrivalProcess) -> bool:
  """Whether a worker comes back with nothing."""
  return any(outage.back < math.inf for outage in process.outages)


def _task(process, cluster, worker, now):
  """When a worker's next task ends, and whether it is lost."""
  task = _ring.read(cluster.tasks, worker)
  time = clock.of(process.duration(cluster.machines, worker, task, now))
  finish, lost = clock.add(now, time), jnp.zeros([], bool)
  for outage in reversed(process.outages):  # The first one decides.
    away = _away(outage, worker, now, time)
    finish = clock.where(away, clock.of(outage.back), finish)
    lost |= away
  return finish, lost if loses(process) else None


def _away(outage, worker, now, time):
  """Whether a task that begins now is interrupted, or cannot begin."""
  back = clock.at_most(clock.of(outage.back), now)
  done = clock.at_most(clock.add(now, time), clock.of(outage.at))
  return (worker == outage.worker) & ~back & ~done


def next_arrival(cluster: Cluster) -> tuple[jax.Array, Time]:
  """Who arrives next, and when: the earliest, of equal ones the first."""
  worker = clock.first(cluster.finish)
  return worker, clock.at(cluster.finish, worker)


def arrives_within(
  cluster: Cluster, now: Time, span: Time
) -> jax.Array | np.ndarray:
  """Whether a gradient, and not a lost one, arrives so soon after now."""
  finish = cluster.finish
  if cluster.lost is not None:
    finish = clock.where(cluster.lost, clock.never(), finish)
  following = clock.at(finish, clock.first(finish))
  soon = clock.at_most(following, clock.add(now, span))
  return soon & ~clock.is_never(following)


def started(
  process: ArrivalProcess,
  cluster: Cluster,
  worker: jax.Array,
  now: Time,
  active: jax.Array | bool = True,
) -> Cluster:
  """The worker begins its next task, if active."""
  finish, lost = _task(process, cluster, worker, now)
  if active is not True:
    finish = clock.where(active, finish, clock.at(cluster.finish, worker))
  if lost is not None and active is not True:
    lost = jnp.where(active, lost, _ring.read(cluster.lost, worker))
  idle = None
  if cluster.idle is not None:
    idle = _ring.read(cluster.idle, worker) & ~jnp.asarray(active)
  return cluster._replace(
    finish=_ring.write(cluster.finish, worker, finish),
    lost=_ring.write(cluster.lost, worker, lost),
    idle=_ring.write(cluster.idle, worker, idle),
  )


def restarted(
  process: ArrivalProcess,
  cluster: Cluster,
  worker: jax.Array,
  now: Time,
  active: jax.Array,
) -> Cluster:
  """The worker has finished a task and begins the next one, if active."""
  cluster = _one_more(cluster, worker, jnp.where(active, 1, 0))
  return started(process, cluster, worker, now, active)


def _one_more(cluster, worker, more):
  tasks = _ring.read(cluster.tasks, worker) + more
  return cluster._replace(tasks=_ring.write(cluster.tasks, worker, tasks))


def stopped(cluster: Cluster, worker: jax.Array) -> Cluster:
  """The worker has finished a task and is idle."""
  cluster = _one_more(cluster, worker, 1)
  return cluster._replace(
    finish=_ring.write(cluster.finish, worker, clock.never()),
    idle=_ring.write(cluster.idle, worker, True),
  )


def all_started(
  process: ArrivalProcess, cluster: Cluster, starting: jax.Array, now: Time
) -> Cluster:
  """All workers that are marked begin their next task."""
  workers = jnp.arange(len(cluster.tasks), dtype=jnp.int32)
  finish, lost = jax.vmap(lambda worker: _task(process, cluster, worker, now))(
    workers
  )
  if lost is not None and cluster.lost is not None:
    lost = jnp.where(starting, lost, cluster.lost)
  return cluster._replace(
    finish=clock.where(starting, finish, cluster.finish), lost=lost
  )


def round_ends(
  process: ArrivalProcess,
  machines: Any,
  workers: int,
  number: jax.Array,
  now: Time,
  share: float = 1.0,
) -> Time:
  """When each worker is done with a share of a task, in a round from now on.

  What an outage interrupts is begun again after it.
  """

  def one(worker):
    time = clock.of(process.duration(machines, worker, number + 1, now))
    time = time if share == 1 else clock.scale(time, share)
    begins = now
    for outage in process.outages:
      away = _away(outage, worker, begins, time)
      begins = clock.where(away, clock.of(outage.back), begins)
    return clock.add(begins, time)

  return jax.vmap(one)(jnp.arange(workers, dtype=jnp.int32))
