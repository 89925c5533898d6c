"""Where gradients come from: emulated workers inside one jitted step.

A worker reads parameters, takes a gradient, and meanwhile others update the
parameters. `asynchronous` emulates a parameter server and its workers by a
ring of gradients in flight, `delayed` a constant delay (a pipeline's stages,
leaf by leaf), `synchronous` rounds at shared parameters. Each hands its inner
transformation *packets* (see `_protocol`): whatever is inside, guided SGD or a
delay compensation or a plain optimizer, would run unchanged on a real server
that supplies the same extra arguments.

The cost of a step does not grow with the number of workers: `_ring` says how.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _protocol, _ring
from gsgd_jax.arrivals import ArrivalProcess, round_robin


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
  arrivals: Any  # State of the arrival process.
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
  seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""An asynchronous parameter server and its N workers, emulated.

  All workers read :math:`w_0` and compute. Whenever one arrives, its gradient
  is applied and it reads the new parameters:

  .. math::

    w_{t+1} = w_t + \mathrm{inner}(g_t), \quad
    g_t = \nabla f(w_{t - \tau_t}; \text{batch})

  where the staleness :math:`\tau_t` counts the updates applied between the
  worker's read and its gradient's arrival. With round-robin arrivals the
  first N gradients have staleness 0, 1, ..., N-1 and every later one N-1.

  Each call of ``update`` is given one gradient, taken at
  ``worker_params(params, state)``. It is put into the slot of the worker that
  read those parameters; then the next worker arrives and its gradient is
  applied. The first N-1 calls only fill slots: they return zero updates and
  leave ``inner`` alone. One worker is plain ``inner``.

  ``inner`` is given the *arrived* packet as extra arguments: its ``value`` (if
  the caller passes values), its ``batch`` (with ``batch_like``),
  ``staleness``, ``worker`` and, with ``keep_params``, ``stale_params``. All
  other extra arguments are forwarded as they come.

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
    seed: Seed of the arrival process.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is an
    ``AsynchronousState``: one gradient a worker (:func:`state_memory` says how
    much). Donate it, or every step copies it. Steps run ``inner`` in a loop of
    zero or one trips, which cannot be differentiated in reverse.

  Raises:
    ValueError: ``workers`` is not an int of at least 1; ``batch_like`` is
      given and ``batch`` is missing or different; ``value`` is no scalar;
      ``keep_params`` without parameters.

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
    Sharma, `Guided parallelized stochastic gradient descent for delay
    compensation`, arXiv:2101.07259, 2021.
  """
  return _server(
    inner,
    _protocol.positive_int('workers', workers),
    who='asynchronous',
    arrivals=arrivals,
    worker_transform=worker_transform,
    batch_like=batch_like,
    keep_params=keep_params,
    seed=seed,
  )


def _server(
  inner,
  workers,
  *,
  who,
  arrivals,
  worker_transform=None,
  batch_like=None,
  keep_params=False,
  seed=0,
):
  """`asynchronous`, and `delayed` with an int."""
  inner = optax.with_extra_args_support(inner)
  transform = optax.with_extra_args_support(
    optax.identity() if worker_transform is None else worker_transform
  )
  alone = workers == 1

  def init_fn(params):
    return AsynchronousState(
      count=jnp.zeros([], jnp.int32),
      version=jnp.zeros([], jnp.int32),
      worker=jnp.zeros([], jnp.int32),
      read_at=None if alone else jnp.zeros([workers], jnp.int32),
      arrivals=arrivals.init(workers, jax.random.PRNGKey(seed)),
      in_flight=None if alone else in_flight_init(params),
      worker_state=_protocol.Unread(
        transform.init(params)
        if alone
        else _ring.stack(transform.init(params), workers)
      ),
      inner_state=inner.init(params),
    )

  def in_flight_init(params):
    return InFlight(
      updates=_ring.stack(optax.tree.zeros_like(params), workers),
      value=jnp.zeros([workers], _protocol.score_dtype()),
      batch=_ring.empty(_protocol.abstract(batch_like), workers),
      stale_params=_ring.stack(params, workers) if keep_params else None,
    )

  def packet_of_call(state, params, extra_args):
    """What the caller's gradient carries, without the gradient."""
    if keep_params:
      _protocol.required_params(who, params)
    value = _protocol.scalar_value(who, extra_args)
    batch = None
    if batch_like is not None:
      batch = _protocol.checked_batch(who, extra_args, batch_like)
    read = None
    if params is not None:
      read = _protocol.worker_params(params, state.inner_state)
    return value, batch, read

  def extras(
    extra_args, gradient, value, batch, staleness, worker, stale_params
  ):
    packet = dict(value=value, batch=batch, stale_params=stale_params)
    packet = {k: v for k, v in packet.items() if v is not None}
    if who == 'asynchronous':
      packet['worker'] = worker
    return {
      **_protocol.other_extras(extra_args, gradient),
      **packet,
      'staleness': staleness,
    }

  def update_alone(updates, state, params=None, **extra_args):
    _, _, read = packet_of_call(state, params, extra_args)
    transformed, worker_state = transform.update(
      updates, state.worker_state.state, read, **extra_args
    )
    new_updates, inner_state = inner.update(
      transformed,
      state.inner_state,
      params,
      **extras(
        extra_args,
        transformed,
        extra_args.get('value'),
        extra_args.get('batch'),
        jnp.zeros([], jnp.int32),
        jnp.zeros([], jnp.int32),
        read if keep_params else None,
      ),
    )
    return new_updates, state._replace(
      count=optax.safe_increment(state.count),
      version=optax.safe_increment(state.version),
      worker_state=_protocol.Unread(worker_state),
      inner_state=inner_state,
    )

  def update_fn(updates, state, params=None, **extra_args):
    value, batch, read = packet_of_call(state, params, extra_args)
    sent, worker_state = send(updates, state, read, extra_args)
    in_flight = _ring.write(
      state.in_flight,
      state.worker,
      InFlight(
        updates=sent,
        value=_ring.read(state.in_flight.value, state.worker)
        if value is None
        else value,
        batch=batch,
        stale_params=read if keep_params else None,
      ),
    )
    filled = state.count >= workers - 1
    worker, arrivals_state = arrivals.next(state.arrivals)
    arrived = _ring.read(in_flight, worker)
    packet = extras(
      extra_args,
      arrived.updates,
      None if value is None else arrived.value,
      arrived.batch,
      state.version - state.read_at[worker],
      worker,
      arrived.stale_params,
    )

    def apply(carry):
      arrived, inner_state = carry
      return inner.update(arrived, inner_state, params, **packet)

    new_updates, inner_state = _ring.applied_when(
      filled,
      apply,
      (_ring.cast_like(arrived.updates, updates), state.inner_state),
    )
    version = state.version + filled.astype(jnp.int32)
    return new_updates, AsynchronousState(
      count=optax.safe_increment(state.count),
      version=version,
      worker=jnp.where(filled, worker, state.worker + 1),
      read_at=_ring.write(state.read_at, worker, version),
      arrivals=optax.tree.where(filled, arrivals_state, state.arrivals),
      in_flight=in_flight,
      worker_state=worker_state,
      inner_state=inner_state,
    )

  def send(updates, state, read, extra_args):
    """Applies the worker's own transformation."""
    if worker_transform is None:
      return updates, state.worker_state
    slots = state.worker_state.state
    slot = _ring.read(slots, state.worker)

    def apply(carry):
      sent, slot = carry
      return transform.update(sent, slot, read, **extra_args)

    # Always one trip, but the compiler cannot know: so the slot alone is
    # copied, never the ring.
    sent, slot = _ring.when(state.count >= 0, apply, (updates, slot))
    return sent, _protocol.Unread(_ring.write(slots, state.worker, slot))

  return optax.GradientTransformationExtraArgs(
    init_fn, update_alone if alone else update_fn
  )


class DelayedState(NamedTuple):
  """State of `delayed` with a tree of ints."""

  count: jax.Array  # shape=(), dtype=int32: calls so far.
  in_flight: optax.Updates  # A ring of delay + 1 slots a leaf; none for 0.
  stale_params: optax.Params | None  # Likewise, with `keep_params`.
  inner_state: optax.OptState


def delayed(
  inner: optax.GradientTransformation,
  delay: int | Any,
  *,
  batch_like: Any = None,
  keep_params: bool = False,
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

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is an
    ``AsynchronousState`` (int) or a ``DelayedState`` (tree).

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
    return _server(
      inner,
      _protocol.positive_int('delay', delay, minimum=0) + 1,
      who='delayed',
      arrivals=round_robin(),
      batch_like=batch_like,
      keep_params=keep_params,
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
  return _delayed_leaves(inner, delay, keep_params)


def _delayed_leaves(inner, delay, keep_params):
  """`delayed` with a tree of ints."""
  inner = optax.with_extra_args_support(inner)
  first = min(jax.tree.leaves(delay))

  def delays_of(params):
    try:
      return jax.tree.broadcast(delay, params)
    except ValueError as e:
      raise ValueError(
        f'delay must have the structure of the parameters or a prefix of it, '
        f'got {jax.tree.structure(delay)} for {jax.tree.structure(params)}'
      ) from e

  def rings_of(params):
    if not jax.tree.leaves(params):  # Also what optax.tree.map_params puts in.
      return params
    return jax.tree.map(
      lambda p, d: _ring.stack(p, d + 1 if d else 0),
      params,
      delays_of(params),
    )

  def through_ring(ring, x, d, count):
    """Writes `x`, reads what was written `d` calls ago."""
    if d == 0:
      return ring, x
    ring = _ring.write(ring, count % (d + 1), x)
    return ring, _ring.read(ring, (count + 1) % (d + 1)).astype(x.dtype)

  def through_rings(rings, tree, delays, count):
    pairs = jax.tree.map(
      lambda r, x, d: through_ring(r, x, d, count), rings, tree, delays
    )
    return jax.tree.transpose(
      jax.tree.structure(tree), jax.tree.structure((0, 0)), pairs
    )

  def init_fn(params):
    return DelayedState(
      count=jnp.zeros([], jnp.int32),
      # Slots that were never written hold zeros: no gradient yet.
      in_flight=rings_of(optax.tree.zeros_like(params)),
      stale_params=rings_of(params) if keep_params else None,
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if keep_params:
      _protocol.required_params('delayed', params)
    count, delays = state.count, delays_of(updates)
    in_flight, arrived = through_rings(state.in_flight, updates, delays, count)
    extras = _protocol.other_extras(extra_args, arrived)
    version = jnp.maximum(count - first, 0)
    extras['staleness'] = jax.tree.map(
      lambda d: version - jnp.maximum(count - d - first, 0), delays
    )
    stale_params = None
    if keep_params:
      read = _protocol.worker_params(params, state.inner_state)
      stale_params, extras['stale_params'] = through_rings(
        state.stale_params, read, delays, count
      )

    def apply(carry):
      arrived, inner_state = carry
      return inner.update(arrived, inner_state, params, **extras)

    carry = (arrived, state.inner_state)
    new_updates, inner_state = (
      apply(carry)
      if first == 0
      else _ring.applied_when(count >= first, apply, carry)
    )
    new_updates = mute_filling(new_updates, delays, count)
    return _ring.cast_like(new_updates, updates), DelayedState(
      count=optax.safe_increment(count),
      in_flight=in_flight,
      stale_params=stale_params,
      inner_state=inner_state,
    )

  def mute_filling(updates, delays, count):
    return jax.tree.map(
      lambda u, d: u if d == 0 else jnp.where(count >= d, u, 0),
      updates,
      delays,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RoundSums(NamedTuple):
  """What a round of `synchronous` has collected so far, for its mean."""

  updates: optax.Updates  # At least float32.
  value: jax.Array  # shape=(), float.
  batch: Any  # A leading axis of workers; None without `batch_like`.


class SynchronousState(NamedTuple):
  """State of `synchronous`."""

  count: jax.Array  # shape=(), dtype=int32: gradients so far in this round.
  round_start: _protocol.ReadPoint | None  # 'sequential': what workers read.
  sums: RoundSums | None  # 'mean': what was collected.
  inner_state: optax.OptState


def synchronous(
  inner: optax.GradientTransformation,
  workers: int,
  *,
  combine: str = 'sequential',
  batch_like: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Rounds of N gradients at shared parameters.

  All N workers compute at the parameters :math:`w_r` of the round's start; a
  call of ``update`` brings one of their gradients
  :math:`g_i = \nabla f(w_r; \text{batch}_i)`.

  ``'sequential'`` (the paper's SSGD): each is applied at once,

  .. math::

    w \leftarrow w + \mathrm{inner}(g_i), \quad i = 0, \dots, N-1

  with ``staleness`` i, ``worker`` i and ``stale_params`` :math:`w_r`. Take
  gradients at ``worker_params(params, state)``: until the round ends it
  returns what the workers read at its start, an absolute point.

  ``'mean'`` (the usual synchronous SGD): calls collect and return zero updates
  until the round ends; then ``inner`` is given the mean gradient, the mean
  ``value``, ``staleness`` 0 and, with ``batch_like``, the N batches as one:
  joined along their first axis, scalars stacked, of typed PRNG keys the first.

  Args:
    inner: Any optax transformation.
    workers: How many workers, N, at least 1. One is plain ``inner``.
    combine: ``'sequential'`` or ``'mean'``.
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s; ``'mean'`` forwards
      batches only if it is given, and then ``batch`` is required.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``SynchronousState``: one copy of the parameters (``'sequential'``), or of
    the gradient in at least float32 (``'mean'``).

  Raises:
    ValueError: ``workers`` is not an int of at least 1, ``combine`` is
      unknown, ``batch`` is missing or different, ``value`` is no scalar, or
      ``'sequential'`` without parameters.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.synchronous(optax.sgd(0.5), workers=2, combine='mean')
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for gradient in (1.0, 3.0):
    ...   updates, state = tx.update(jnp.array([gradient]), state, params)
    ...   print(updates)
    [0.]
    [-1.]

  References:
    Sharma, `Guided parallelized stochastic gradient descent for delay
    compensation`, arXiv:2101.07259, 2021.
  """
  workers = _protocol.positive_int('workers', workers)
  _protocol.one_of('combine', combine, ('sequential', 'mean'))
  inner = optax.with_extra_args_support(inner)
  if combine == 'sequential' or workers == 1:
    return _synchronous_sequential(inner, workers, batch_like)
  return _synchronous_mean(inner, workers, batch_like)


def _synchronous_sequential(inner, workers, batch_like):
  alone = workers == 1

  def init_fn(params):
    return SynchronousState(
      count=jnp.zeros([], jnp.int32),
      round_start=None
      if alone
      # A copy: the state and the parameters may both be donated.
      else _protocol.ReadPoint(
        jnp.zeros([], bool), jax.tree.map(jnp.copy, params)
      ),
      sums=None,
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if not alone:
      _protocol.required_params('synchronous', params)
    _protocol.scalar_value('synchronous', extra_args)
    if batch_like is not None:
      _protocol.checked_batch('synchronous', extra_args, batch_like)
    extras = dict(extra_args, staleness=state.count, worker=state.count)
    if params is not None:
      extras['stale_params'] = _protocol.worker_params(params, state)
    new_updates, inner_state = inner.update(
      updates, state.inner_state, params, **extras
    )
    count = (state.count + 1) % workers
    round_start = state.round_start
    if not alone:
      round_start = _protocol.ReadPoint(count > 0, extras['stale_params'])
    return new_updates, SynchronousState(count, round_start, None, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _synchronous_mean(inner, workers, batch_like):
  def init_fn(params):
    return SynchronousState(
      count=jnp.zeros([], jnp.int32),
      round_start=None,
      sums=RoundSums(
        updates=jax.tree.map(
          lambda p: jnp.zeros_like(
            p, jnp.float32 if p.dtype.itemsize < 4 else p.dtype
          ),
          params,
        ),
        value=jnp.zeros([], _protocol.score_dtype()),
        batch=_ring.empty(_protocol.abstract(batch_like), workers),
      ),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    value = _protocol.scalar_value('synchronous', extra_args)
    batch = None
    if batch_like is not None:
      batch = _protocol.checked_batch('synchronous', extra_args, batch_like)
    first, last = state.count == 0, state.count == workers - 1
    sums = RoundSums(
      updates=jax.tree.map(
        lambda s, g: jnp.where(first, 0, s) + jnp.asarray(g, s.dtype),
        state.sums.updates,
        updates,
      ),
      value=jnp.where(first, 0, state.sums.value)
      + (0 if value is None else value),
      batch=_ring.write(state.sums.batch, state.count, batch),
    )
    mean = _ring.cast_like(optax.tree.scale(1 / workers, sums.updates), updates)
    extras = _protocol.other_extras(extra_args, mean)
    extras['staleness'] = jnp.zeros([], jnp.int32)
    if params is not None:
      extras['stale_params'] = _protocol.worker_params(
        params, state.inner_state
      )
    if value is not None:
      extras['value'] = sums.value / workers
    if batch is not None:
      extras['batch'] = jax.tree.map(_join, sums.batch)

    def apply(carry):
      mean, inner_state = carry
      return inner.update(mean, inner_state, params, **extras)

    new_updates, inner_state = _ring.applied_when(
      last, apply, (mean, state.inner_state)
    )
    return new_updates, SynchronousState(
      count=(state.count + 1) % workers,
      round_start=None,
      sums=sums,
      inner_state=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _join(stacked):
  """N arrays of shape (B, ...), stacked, as one of shape (N * B, ...)."""
  if jnp.issubdtype(stacked.dtype, jax.dtypes.prng_key):
    return stacked[0]
  if stacked.ndim == 1:
    return stacked
  return stacked.reshape((-1, *stacked.shape[2:]))
