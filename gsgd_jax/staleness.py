"""Where gradients come from: emulated workers inside one jitted step.

A worker reads parameters, takes a gradient, and meanwhile others update the
parameters. `asynchronous` emulates a parameter server and its workers by a
ring of gradients in flight, `delayed` a constant delay (a pipeline's stages,
leaf by leaf: `pipeline`). Rounds at shared parameters are in `rounds`. Each
hands its inner transformation *packets* (see `_protocol`): whatever is inside,
guided SGD or a delay compensation or a plain optimizer, would run unchanged on
a real server that supplies the same extra arguments.

The cost of a step does not grow with the number of workers: `_ring` says how.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gsgd_jax import _cluster, _protocol, _ring, clock, pipeline
from gsgd_jax.arrivals import ArrivalProcess, checked, round_robin


class InFlight(NamedTuple):
  """Packets under way: every leaf has a leading axis of workers."""

  updates: optax.Updates
  value: jax.Array  # shape=(workers,), float.
  batch: Any  # None without `batch_like`.
  stale_params: optax.Params | None  # None without `keep_params`.


class AsynchronousState(NamedTuple):
  """State of `asynchronous`, and of `delayed` with an int."""

  count: jax.Array  # shape=(), dtype=int32: calls so far.
  version: jax.Array  # shape=(), dtype=int32: updates applied so far.
  worker: jax.Array  # shape=(), dtype=int32: who takes the next gradient.
  read_at: jax.Array | None  # shape=(workers,), int32: version each one read.
  applied: _protocol.Applied  # Gradients so far; see `worker_shares`.
  overwritten: jax.Array | None  # shape=(), dtype=int32: gradients so far.
  lost: jax.Array | None  # shape=(), dtype=int32: likewise, by failures.
  clock: _protocol.Clock  # Of the last arrival; see `simulated_time`.
  cluster: _cluster.Cluster  # What everybody is computing.
  reading: jax.Array | None  # shape=(workers,), bool; `max_ahead` only.
  in_flight: InFlight | None  # None with one worker.
  worker_state: _protocol.Unread  # Of `worker_transform`, workers stacked.
  inner_state: optax.OptState


def asynchronous(
  inner: optax.GradientTransformation,
  workers: int,
  *,
  arrivals: ArrivalProcess = round_robin(),
  worker_transform: optax.GradientTransformation | None = None,
  batch_like: Any = None,
  keep_params: bool = False,
  overwrite_within: float | None = None,
  max_ahead: int | None = None,
  sync_cost: float = 0.1,
  seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""An asynchronous parameter server and its N workers, emulated.

  All workers read :math:`w_0` and compute. Whenever one arrives, its gradient
  is applied and it reads the new parameters:

  .. math::

    w_{t+1} = w_t + \mathrm{inner}(g_t), \quad
    g_t = \nabla f(w_{t - \tau_t}; \text{batch})

  where the staleness :math:`\tau_t` counts the updates applied between the
  worker's read and its gradient's arrival. (What :func:`drop_stale` or
  :func:`rennala` inside refuse or only keep is no update.) With round-robin
  arrivals the first N gradients have staleness 0, 1, ..., N-1 and every later
  one N-1.

  Each call of ``update`` is given one gradient, taken at
  ``worker_params(params, state)``. It is put into the slot of the worker that
  read those parameters; then the next worker arrives and its gradient is
  applied. The first N-1 calls only fill slots: they return zero updates and
  leave ``inner`` alone. One worker is plain ``inner``.

  ``inner`` is given the *arrived* packet as extra arguments: its ``value`` (if
  the caller passes values), its ``batch`` (with ``batch_like``),
  ``staleness``, ``worker`` and, with ``keep_params``, ``stale_params``. All
  other extra arguments are forwarded as they come.

  Who arrives next, and when, is decided by ``arrivals`` on a simulated clock:
  see :func:`simulated_time`.

  Args:
    inner: The server's optimizer, any optax transformation.
    workers: How many workers, N, at least 1. It decides shapes: with
      ``optax.inject_hyperparams`` name it in ``static_args``.
    arrivals: Who arrives next, an :class:`ArrivalProcess`.
    worker_transform: A transformation that each worker applies to its own
      gradients when it takes them, with a state of its own (local momentum,
      clipping, compression). All N states start alike, a random
      transformation's key included.
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s. If given, ``batch``
      is required and travels with its gradient.
    keep_params: Whether to keep what each worker read, for inner
      transformations that want ``stale_params``: one more copy of the
      parameters a worker.
    overwrite_within: Gradients share one place at the server: of those that
      follow one another within so much time (in mean gradient computations)
      only the last is applied, the others are *overwritten*, and counted. (If
      all follow one another that closely, none is ever applied.) None is no
      such thing.
    max_ahead: Bounded staleness (stale synchronous parallel): a worker that
      has finished over ``max_ahead`` tasks more than the slowest one waits, and
      reads once the others have caught up; at 0 nobody begins a round before
      all have ended the last. A call may then apply no gradient, or several
      one after another: all of them see the same other extra arguments.
      None is no bound.
    sync_cost: What a synchronisation of all workers costs on the clock, in
      mean gradient computations: every shared replay of :func:`guided` is one.
    seed: Seed of the arrival process.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is an
    ``AsynchronousState``: one gradient a worker (:func:`state_memory` says how
    much). Its diagnostics: ``version`` (updates applied so far), ``worker``
    (whose gradient is taken next), ``overwritten`` and ``lost`` (gradients so
    far, where there can be any), ``inner_state``. Donate it, or every step
    copies it. Steps run ``inner`` in a loop of
    zero or one trips, which cannot be differentiated in reverse.

  Raises:
    ValueError: ``workers`` is not an int of at least 1; ``overwrite_within``,
      ``max_ahead`` or ``sync_cost`` is out of its range, or ``max_ahead`` has
      to wait for workers that stop for good; ``batch_like`` is given and
      ``batch`` is missing or different; ``value`` is no scalar;
      ``keep_params`` without parameters; :func:`dana` inside is made for fewer
      workers.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(optax.sgd(0.1), workers=3)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(4):
    ...   grads = gsgd_jax.worker_params(params, state)  # Of w^2 / 2.
    ...   updates, state = tx.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{params[0]:.2f}', state.version)
    1.00 0
    1.00 0
    0.90 1
    0.80 2

  References:
    Dean et al., `Large Scale Distributed Deep Networks`, 2012.
    Ho et al., `More Effective Distributed ML via a Stale Synchronous Parallel
    Parameter Server`, NIPS 2013.
    Sharma, `Guided parallelized stochastic gradient descent for delay
    compensation`, arXiv:2101.07259, 2021.
  """
  return transformation(
    asynchronous_server(
      inner,
      workers,
      arrivals=arrivals,
      worker_transform=worker_transform,
      batch_like=batch_like,
      keep_params=keep_params,
      overwrite_within=overwrite_within,
      max_ahead=max_ahead,
      sync_cost=sync_cost,
      seed=seed,
    )
  )


def asynchronous_server(
  inner: optax.GradientTransformation,
  workers: int,
  *,
  arrivals: ArrivalProcess = round_robin(),
  worker_transform: optax.GradientTransformation | None = None,
  batch_like: Any = None,
  keep_params: bool = False,
  overwrite_within: float | None = None,
  max_ahead: int | None = None,
  sync_cost: float = 0.1,
  seed: int | jax.Array = 0,
) -> 'Server':
  """The checked settings of `asynchronous`."""
  checked(arrivals)
  if overwrite_within is not None:
    overwrite_within = _protocol.real_or_traced(
      'overwrite_within', overwrite_within
    )
  if max_ahead is not None:
    max_ahead = _protocol.positive_int('max_ahead', max_ahead, minimum=0)
    if arrivals.stopping or arrivals.length is not None:
      raise ValueError(
        'max_ahead waits for the slowest worker, but with these arrivals some '
        'stop for good: everybody would wait for ever'
      )
  if worker_transform is None:
    worker_transform = optax.identity()
  return Server(
    inner=optax.with_extra_args_support(inner),
    workers=_protocol.positive_int('workers', workers),
    who='asynchronous',
    arrivals=arrivals,
    transform=optax.with_extra_args_support(worker_transform),
    batch_like=batch_like,
    keep_params=keep_params,
    overwrite_within=overwrite_within,
    max_ahead=max_ahead,
    sync_cost=_protocol.real_or_traced('sync_cost', sync_cost),
    seed=seed,
  )


def delayed(
  inner: optax.GradientTransformation,
  delay: int | Any,
  *,
  batch_like: Any = None,
  keep_params: bool = False,
  sync_cost: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
  r"""Every gradient arrives ``delay`` updates late.

  .. math::

    w_{t+1} = w_t + \mathrm{inner}(\nabla f(w_{t - \tau}; \text{batch}))

  With an int this is exactly :func:`asynchronous` with ``delay + 1``
  round-robin workers, from the first call: ``delay`` calls that only fill the
  ring, then stalenesses 0, 1, ..., ``delay``, then ``delay`` for good.
  ``inner`` is given ``value``, ``batch`` (with ``batch_like``), ``staleness``
  and ``stale_params`` (with ``keep_params``) of the gradient that arrives;
  never ``worker``. A delay of 0 is plain ``inner``.

  With a tree of ints, one a leaf of the parameters (or one a subtree: the
  stages of a pipeline), every leaf is late by its own delay. There is no
  single packet: ``staleness`` is a tree of int32, updates of ``inner``
  between a leaf's read and now; ``stale_params`` is what each leaf was when
  its gradient was taken; ``value`` and ``batch`` are not forwarded.
  ``inner`` starts when the smallest delay is filled; a leaf that is still
  filling is given zero gradients and its updates are zeroed.

  Args:
    inner: Any optax transformation.
    delay: Updates of delay, an int of at least 0 or a tree of them whose
      structure is that of the parameters or a prefix of it. It decides shapes:
      with ``optax.inject_hyperparams`` name it in ``static_args``.
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s. If given (with an
      int), ``batch`` is required and travels with its gradient.
    keep_params: Whether to keep the parameters that gradients were taken at.
    sync_cost: As in :func:`asynchronous`.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is an
    ``AsynchronousState`` (int) or a ``DelayedState`` (tree; it has no clock).

  Raises:
    ValueError: A delay is not an int or negative, its tree does not fit the
      parameters, or what :func:`asynchronous` raises.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.delayed(optax.sgd(0.1), {'first': 1, 'last': 0})
    >>> params = {'first': jnp.array([1.0]), 'last': jnp.array([1.0])}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...   updates, state = tx.update(params, state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(*(f'{name} {p[0]:.2f}' for name, p in params.items()))
    first 1.00 last 0.90
    first 0.90 last 0.81

  References:
    Kosson et al., `Pipelined Backpropagation at Scale`, arXiv:2003.11666, 2021.
  """
  if jax.tree.structure(delay) == jax.tree.structure(0):
    return transformation(
      delayed_server(
        inner,
        delay,
        batch_like=batch_like,
        keep_params=keep_params,
        sync_cost=sync_cost,
      )
    )
  if batch_like is not None:
    raise ValueError(
      'delayed with a tree of delays has no single batch to forward, got '
      'batch_like; leave it out, or give delay as one int'
    )
  delay = jax.tree.map(
    lambda d: _protocol.positive_int('delay', d, minimum=0), delay
  )
  if not jax.tree.leaves(delay):
    raise ValueError(f'delay must be an int or a tree of ints, got {delay!r}')
  return pipeline.delayed_leaves(inner, delay, keep_params)


def delayed_server(
  inner: optax.GradientTransformation,
  delay: int,
  *,
  batch_like: Any = None,
  keep_params: bool = False,
  sync_cost: float = 0.1,
) -> 'Server':
  """The checked settings of `delayed` with an int."""
  delay = _protocol.positive_int('delay', delay, minimum=0)
  settings = asynchronous_server(
    inner,
    delay + 1,
    batch_like=batch_like,
    keep_params=keep_params,
    sync_cost=sync_cost,
  )
  return settings._replace(who='delayed')


class Server(NamedTuple):
  """The settings of `asynchronous`, and of `delayed` with an int."""

  inner: optax.GradientTransformationExtraArgs
  workers: int
  who: str
  arrivals: ArrivalProcess
  transform: optax.GradientTransformationExtraArgs
  batch_like: Any
  keep_params: bool
  overwrite_within: float | None
  max_ahead: int | None
  sync_cost: float
  seed: int | jax.Array

  @property
  def alone(self) -> bool:
    """One worker of whom every gradient is applied needs no ring."""
    process = self.arrivals
    every = process.length is None and not process.outages
    return self.workers == 1 and every and self.overwrite_within is None


def transformation(server: Server) -> optax.GradientTransformationExtraArgs:
  """`asynchronous` or `delayed` with these settings."""
  update = _update
  if server.alone:
    update = _update_alone
  elif server.max_ahead is not None:
    update = _update_bounded

  def init_fn(params) -> _protocol.State:
    return begin(server, params)

  def update_fn(
    updates, state, params=None, **extra_args
  ) -> tuple[optax.Updates, _protocol.State]:
    return update(server, updates, state, params, extra_args)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def begin(server: Server, params: optax.Params) -> AsynchronousState:
  """The state before the first call."""
  workers, alone = server.workers, server.alone
  bounded = server.max_ahead is not None and not alone
  worker_state = server.transform.init(params)
  if not alone:
    worker_state = _ring.stack(worker_state, workers)
  inner_state = server.inner.init(params)
  _protocol.check_per_worker(server.who, workers, inner_state)
  # Every leaf is an array of its own: the state may be donated.
  zero = lambda: jnp.zeros([], jnp.int32)
  return AsynchronousState(
    count=zero(),
    version=zero(),
    worker=zero(),
    read_at=None if alone else jnp.zeros([workers], jnp.int32),
    applied=_protocol.Applied(jnp.zeros([workers], jnp.int32)),
    overwritten=None if server.overwrite_within is None else zero(),
    lost=zero() if _cluster.loses(server.arrivals) else None,
    clock=_cluster.clock_of(workers, server.sync_cost),
    cluster=_cluster.begin(server.arrivals, workers, server.seed, idle=bounded),
    reading=jnp.ones([workers], bool) if bounded else None,
    in_flight=None if alone else _nothing_in_flight(server, params),
    worker_state=_protocol.Unread(worker_state),
    inner_state=inner_state,
  )


def _nothing_in_flight(server, params):
  workers = server.workers
  return InFlight(
    updates=_ring.stack(optax.tree.zeros_like(params), workers),
    value=jnp.zeros([workers], _protocol.score_dtype()),
    batch=_ring.empty(_protocol.abstract(server.batch_like), workers),
    stale_params=_ring.stack(params, workers) if server.keep_params else None,
  )


def _packet_of_call(server, state, params, extra_args):
  """What the caller's gradient carries, without the gradient."""
  if server.keep_params:
    _protocol.required_params(server.who, params)
  value = _protocol.scalar_value(server.who, extra_args)
  batch = None
  if server.batch_like is not None:
    batch = _protocol.checked_batch(server.who, extra_args, server.batch_like)
  read = None
  if params is not None:
    read = _protocol.worker_params(params, state.inner_state)
  return value, batch, read


def _extras(server, extra_args, arrived, staleness, worker):
  """What the inner transformation is given beside the gradient."""
  packet = arrived._asdict()
  gradient = packet.pop('updates')
  if extra_args.get('value') is None:
    packet.pop('value')
  packet = {k: v for k, v in packet.items() if v is not None}
  if server.who == 'asynchronous':
    packet['worker'] = worker
  return {
    **_protocol.other_extras(extra_args, gradient),
    **packet,
    'staleness': staleness,
  }


def _update_alone(server, updates, state, params, extra_args):
  _, _, read = _packet_of_call(server, state, params, extra_args)
  sent, worker_state = server.transform.update(
    updates, state.worker_state.state, read, **extra_args
  )
  arrived = InFlight(
    sent,
    extra_args.get('value'),
    extra_args.get('batch'),
    read if server.keep_params else None,
  )
  zero = jnp.zeros([], jnp.int32)
  new_updates, inner_state = server.inner.update(
    sent,
    state.inner_state,
    params,
    **_extras(server, extra_args, arrived, zero, zero),
  )
  worker, now = _cluster.next_arrival(state.cluster)
  one, refused = _protocol.accepted(state.inner_state, inner_state)
  return new_updates, state._replace(
    count=_protocol.one_more(state.count),
    version=state.version + one,
    applied=_protocol.Applied(state.applied.by_worker + 1 - refused),
    clock=state.clock._replace(time=now),
    cluster=_cluster.restarted(
      server.arrivals, state.cluster, worker, now, jnp.ones([], bool)
    ),
    worker_state=_protocol.Unread(worker_state),
    inner_state=inner_state,
  )


def _update(server, updates, state, params, extra_args):
  in_flight, worker_state = received(server, updates, state, params, extra_args)

  def arrived_of(worker):
    arrived = _ring.read(in_flight, worker)
    return arrived._replace(updates=_ring.cast_like(arrived.updates, updates))

  new_updates, state = arrival(server, state, arrived_of, params, extra_args)
  return new_updates, state._replace(
    in_flight=in_flight, worker_state=worker_state
  )


def arrival(
  server: Server,
  state: AsynchronousState,
  arrived_of: Callable[[jax.Array], InFlight],
  params: optax.Params | None,
  extra_args: dict[str, Any],
) -> tuple[optax.Updates, AsynchronousState]:
  """What a call does once its gradient is in its slot: the next one arrives.

  Args:
    server: The settings; neither `alone` nor with `max_ahead`.
    state: The state; its rings are left alone.
    arrived_of: A worker's packet, in the dtypes of gradients.
    params: The server's parameters.
    extra_args: Those of the call.

  Returns:
    Updates and the new state, whose `worker` reads next.
  """
  worker, filled = next_arrival(server, state)
  now, arrives = clock.at(state.cluster.finish, worker), filled
  if server.arrivals.length is not None:  # After the last one nobody does.
    arrives = filled & ~clock.is_never(now)
  cluster = _cluster.restarted(
    server.arrivals, state.cluster, worker, now, arrives
  )
  applies, losses = _reaches(server, state, cluster, worker, now, arrives)
  arrived = arrived_of(worker)
  assert state.read_at is not None  # There are several workers.
  packet = _extras(
    server, extra_args, arrived, state.version - state.read_at[worker], worker
  )

  def apply(carry):
    gradient, inner_state = carry
    return server.inner.update(gradient, inner_state, params, **packet)

  new_updates, inner_state = _ring.applied_when(
    applies, apply, (arrived.updates, state.inner_state)
  )
  counts = _counted(state, inner_state, worker, applies)
  now = clock.where(arrives, now, state.clock.time)
  return new_updates, state._replace(
    count=_protocol.one_more(state.count),
    worker=jnp.where(filled, worker, state.worker + 1),
    read_at=_ring.write(state.read_at, worker, counts['version']),
    clock=state.clock._replace(time=now),
    cluster=cluster,
    inner_state=inner_state,
    **counts,
    **losses,
  )


def next_arrival(
  server: Server, state: AsynchronousState
) -> tuple[jax.Array, jax.Array]:
  """Who arrives next, and whether all slots are filled: else nobody does."""
  worker, _ = _cluster.next_arrival(state.cluster)
  return worker, state.count >= server.workers - 1


def _update_bounded(server, updates, state, params, extra_args):
  """Arrivals, one after another, until somebody may read."""
  in_flight, worker_state = received(server, updates, state, params, extra_args)
  reader = state.worker
  state = state._replace(
    count=_protocol.one_more(state.count),
    read_at=_ring.write(state.read_at, reader, state.version),
    cluster=_cluster.started(
      server.arrivals,
      state.cluster,
      reader,
      state.clock.time,
      # Where all wait for what never comes nobody reads any more.
      active=_ring.read(state.reading, reader),
    ),
    reading=_ring.write(state.reading, reader, False),
    # The loop carries none of these.
    in_flight=None,
    worker_state=None,
  )

  def arrival(carry):
    total, state = carry
    worker, now = _cluster.next_arrival(state.cluster)
    cluster = _cluster.stopped(state.cluster, worker)
    ahead = cluster.tasks - jnp.min(cluster.tasks)
    reading = cluster.idle & (ahead <= server.max_ahead)
    following = cluster
    if server.overwrite_within is not None:
      following = _cluster.all_started(server.arrivals, cluster, reading, now)
    arrives = jnp.ones([], bool)
    applies, losses = _reaches(server, state, following, worker, now, arrives)
    arrived = _ring.read(in_flight, worker)
    at = None if params is None else optax.apply_updates(params, total)
    packet = _extras(
      server, extra_args, arrived, state.version - state.read_at[worker], worker
    )

    def apply(carry):
      gradient, inner_state = carry
      return server.inner.update(gradient, inner_state, at, **packet)

    step, inner_state = _ring.applied_when(
      applies,
      apply,
      (_ring.cast_like(arrived.updates, updates), state.inner_state),
    )
    counts = _counted(state, inner_state, worker, applies)
    return jax.tree.map(jnp.add, total, step), state._replace(
      clock=state.clock._replace(time=now),
      cluster=cluster,
      reading=reading,
      inner_state=inner_state,
      **counts,
      **losses,
    )

  carry = (optax.tree.zeros_like(updates), state)
  carry = jax.tree.map(jnp.asarray, carry)

  def waits(carry):  # Unless what is awaited never comes.
    _, state = carry
    _, now = _cluster.next_arrival(state.cluster)
    return ~jnp.any(state.reading) & ~clock.is_never(now)

  total, state = lax.while_loop(
    waits, lambda carry: _ring.cast_like(arrival(carry), carry), carry
  )
  return total, state._replace(
    worker=jnp.argmax(state.reading).astype(jnp.int32),
    in_flight=in_flight,
    worker_state=worker_state,
  )


def _reaches(server, state, cluster, worker, now, arrives):
  """Whether the arriving gradient reaches the server; and what got lost."""
  losses, reaches = {}, arrives
  if state.lost is not None:
    lost = arrives & _ring.read(state.cluster.lost, worker)
    losses['lost'] = state.lost + lost.astype(jnp.int32)
    reaches &= ~lost
  if server.overwrite_within is not None:
    overwritten = reaches & _cluster.arrives_within(
      cluster, now, clock.of(server.overwrite_within)
    )
    losses['overwritten'] = state.overwritten + overwritten.astype(jnp.int32)
    reaches &= ~overwritten
  return reaches, losses


def _counted(state, inner_state, worker, reaches):
  """The counts after a gradient that reached the server, or did not."""
  one = reaches.astype(jnp.int32)
  updates, refused = _protocol.accepted(state.inner_state, inner_state)
  by_worker = _ring.read(state.applied.by_worker, worker) + one - refused
  return dict(
    version=state.version + one * updates,
    applied=_protocol.Applied(
      _ring.write(state.applied.by_worker, worker, by_worker)
    ),
  )


def received(
  server: Server,
  updates: optax.Updates,
  state: AsynchronousState,
  params: optax.Params | None,
  extra_args: dict[str, Any],
) -> tuple[InFlight, _protocol.Unread]:
  """Rings with the caller's packet in the slot of the worker that read."""
  value, batch, read = _packet_of_call(server, state, params, extra_args)
  sent, worker_state = _sent(server, updates, state, read, extra_args)
  assert state.in_flight is not None  # There are several workers.
  if value is None:
    value = _ring.read(state.in_flight.value, state.worker)
  packet = InFlight(sent, value, batch, read if server.keep_params else None)
  return _ring.write(state.in_flight, state.worker, packet), worker_state


def _sent(server, updates, state, read, extra_args):
  """Applies the worker's own transformation."""
  slots = state.worker_state.state
  if not jax.tree.leaves(slots):
    sent, _ = server.transform.update(updates, slots, read, **extra_args)
    return sent, state.worker_state
  slot = _ring.read(slots, state.worker)

  def apply(carry):
    sent, slot = carry
    return server.transform.update(sent, slot, read, **extra_args)

  # Always one trip, but the compiler cannot know: so the slot alone is
  # copied, never the ring.
  sent, slot = _ring.when(state.count >= 0, apply, (updates, slot))
  return sent, _protocol.Unread(_ring.write(slots, state.worker, slot))
