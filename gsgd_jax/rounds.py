"""Rounds at shared parameters: synchronous workers.

All workers read the same parameters and compute; `synchronous` applies their
gradients one after another, or their mean, or only those of the fastest.
`data_parallel` splits one batch over all workers: the control that every
asynchronous method has to face. On the clock a round takes as long as the
slowest worker that it waits for, and a synchronisation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _cluster, _mean, _protocol, _ring, clock
from gsgd_jax.arrivals import ArrivalProcess, checked, round_robin


class Round(NamedTuple):
  """A round of `synchronous`, and what decides how long it takes."""

  number: jax.Array  # shape=(), dtype=int32: from 0.
  order: jax.Array  # shape=(wait_for,), int32: the fastest workers, in order.
  end: clock.Time  # When it ends, synchronisation included.
  applied: _protocol.Applied  # Gradients so far; see `worker_shares`.
  machines: Any  # What the arrival process knows.


class SynchronousState(NamedTuple):
  """State of `synchronous`."""

  count: jax.Array  # shape=(), dtype=int32: gradients so far in this round.
  updated: jax.Array  # shape=(), dtype=int32: updates so far in this round.
  clock: _protocol.Clock  # When the last round ended; see `simulated_time`.
  round: Round
  round_start: _protocol.ReadPoint | None  # 'sequential': what workers read.
  sums: _mean.Sums | None  # 'mean': what was collected.
  inner_state: optax.OptState


def synchronous(
  inner: optax.GradientTransformation,
  workers: int,
  *,
  combine: str = 'sequential',
  wait_for: int | None = None,
  arrivals: ArrivalProcess = round_robin(),
  batch_like: Any = None,
  sync_cost: float = 0.1,
  seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Rounds of N gradients at shared parameters, or of the m fastest.

  All N workers compute at the parameters :math:`w_r` of the round's start; a
  call of ``update`` brings one of the m = ``wait_for`` gradients
  :math:`g_i = \nabla f(w_r; \text{batch}_i)` that the round waits for, in the
  order in which they are ready.

  ``'sequential'`` (the paper's SSGD): each is applied at once,

  .. math::

    w \leftarrow w + \mathrm{inner}(g_i), \quad i = 0, \dots, m-1

  with ``staleness`` i, its ``worker`` and ``stale_params`` :math:`w_r`. Take
  gradients at ``worker_params(params, state)``: until the round ends it
  returns what the workers read at its start, an absolute point.

  ``'mean'`` (the usual synchronous SGD): calls collect and return zero updates
  until the round ends; then ``inner`` is given the mean gradient, the mean
  ``value``, ``staleness`` 0 and, with ``batch_like``, the m batches as one:
  joined along their first axis, scalars stacked, of typed PRNG keys the first.

  On the clock (:func:`simulated_time`) a round takes the m-th smallest of the
  N task times, plus ``sync_cost``. The N - m others are thrown away, and need
  not be computed here.

  Args:
    inner: Any optax transformation.
    workers: How many workers, N, at least 1. One is plain ``inner``.
    combine: ``'sequential'`` or ``'mean'``.
    wait_for: How many gradients a round waits for, m, from 1 to N; None is N.
    arrivals: How long tasks take, an :class:`ArrivalProcess`; not a trace. (Of
      workers that stop for good only those of :func:`failing` are known as
      such.)
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s; ``'mean'`` forwards
      batches only if it is given, and then ``batch`` is required.
    sync_cost: What a synchronisation costs on the clock, in mean gradient
      computations: every round, and every shared replay of :func:`guided`. One
      worker has nobody to synchronise with.
    seed: Seed of the arrival process.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``SynchronousState``: one copy of the parameters (``'sequential'``), or of
    the gradient in at least float32 (``'mean'``).

  Raises:
    ValueError: ``workers``, ``wait_for`` or ``sync_cost`` is out of its range,
      ``combine`` is unknown, so many workers stop for good that a round would
      wait for ever, ``arrivals`` are a trace, ``batch`` is missing or
      different, ``value`` is no scalar, or ``'sequential'`` without parameters.

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
  settings = synchronous_rounds(
    inner,
    workers,
    combine=combine,
    wait_for=wait_for,
    arrivals=arrivals,
    batch_like=batch_like,
    sync_cost=sync_cost,
    seed=seed,
  )
  return transformation(settings)


def transformation(
  settings: 'Rounds',
) -> optax.GradientTransformationExtraArgs:
  """`synchronous` with these settings."""
  if settings.collects:
    return _synchronous_mean(settings)
  return _synchronous_sequential(settings)


def synchronous_rounds(
  inner: optax.GradientTransformation,
  workers: int,
  *,
  combine: str = 'sequential',
  wait_for: int | None = None,
  arrivals: ArrivalProcess = round_robin(),
  batch_like: Any = None,
  sync_cost: float = 0.1,
  seed: int | jax.Array = 0,
) -> 'Rounds':
  """The checked settings of `synchronous`."""
  workers = _protocol.positive_int('workers', workers)
  _protocol.one_of('combine', combine, ('sequential', 'mean'))
  waited = workers
  if wait_for is not None:
    waited = _protocol.positive_int('wait_for', wait_for)
    if waited > workers:
      raise ValueError(
        f'wait_for must be at most workers={workers}, got {waited}'
      )
  _check_rounds('synchronous', checked(arrivals), workers, waited)
  return Rounds(
    inner=optax.with_extra_args_support(inner),
    workers=workers,
    collects=combine == 'mean' and workers > 1,
    wait_for=waited,
    arrivals=arrivals,
    batch_like=batch_like,
    sync_cost=_protocol.real_or_traced('sync_cost', sync_cost),
    seed=seed,
  )


class Rounds(NamedTuple):
  """The settings of `synchronous`."""

  inner: optax.GradientTransformationExtraArgs
  workers: int
  collects: bool  # Gradients, for their mean.
  wait_for: int
  arrivals: ArrivalProcess
  batch_like: Any
  sync_cost: float
  seed: int | jax.Array

  def begin(self) -> tuple[_protocol.Clock, Round]:
    """The clock and the first round, which is not decided yet."""
    return _cluster.clock_of(self.workers, self.sync_cost), Round(
      number=jnp.zeros([], jnp.int32),
      order=jnp.arange(self.wait_for, dtype=jnp.int32),
      end=clock.zero(),
      applied=_protocol.Applied(jnp.zeros([self.workers], jnp.int32)),
      machines=self.arrivals.init(self.workers, jax.random.PRNGKey(self.seed)),
    )

  def decided(self, state: SynchronousState) -> Round:
    """The round of a call: its first call decides how fast everybody is."""
    this, began = state.round, state.clock.time

    def decide(_):
      ends = _cluster.round_ends(
        self.arrivals, this.machines, self.workers, this.number, began
      )
      order = clock.order(ends)[: self.wait_for]
      end = clock.at(ends, order[-1])
      end = clock.add(end, clock.of(state.clock.sync_cost))
      return order, end

    order, end = _ring.when(state.count == 0, decide, (this.order, this.end))
    return this._replace(order=order, end=end)

  def ended(
    self,
    state: SynchronousState,
    this: Round,
    last: jax.Array,
    applied: jax.Array,
  ) -> tuple[_protocol.Clock, Round]:
    """The clock and the round after a call."""
    now = clock.where(last, this.end, state.clock.time)
    return state.clock._replace(time=now), this._replace(
      number=this.number + last.astype(jnp.int32),
      applied=_protocol.Applied(applied),
    )


def _check_rounds(who, arrivals, workers, wait_for):
  if arrivals.length is not None:
    raise ValueError(
      f'{who} needs to know how long tasks take, but a trace says when '
      'asynchronous workers arrive'
    )
  stopping = len(arrivals.stopping)
  if stopping > workers - wait_for:
    remedy = ''
    if who == 'synchronous' and stopping < workers:
      remedy = f'; wait_for={workers - stopping} would not'
    elif who == 'data_parallel':
      remedy = '; let them come back'
    raise ValueError(
      f'{who} would wait for ever: every round needs {wait_for} of {workers} '
      f'workers, and {stopping} of them may stop for good{remedy}'
    )


def _synchronous_sequential(settings):
  inner, alone = settings.inner, settings.wait_for == 1

  def init_fn(params) -> _protocol.State:
    now, first = settings.begin()
    inner_state = inner.init(params)
    _protocol.check_per_worker('synchronous', settings.workers, inner_state)
    return SynchronousState(
      count=jnp.zeros([], jnp.int32),
      updated=jnp.zeros([], jnp.int32),
      clock=now,
      round=first,
      round_start=None
      if alone
      # A copy: the state and the parameters may both be donated.
      else _protocol.ReadPoint(
        jnp.zeros([], bool), jax.tree.map(jnp.copy, params)
      ),
      sums=None,
      inner_state=inner_state,
    )

  def update_fn(
    updates, state, params=None, **extra_args
  ) -> tuple[optax.Updates, _protocol.State]:
    if not alone:
      _protocol.required_params('synchronous', params)
    _protocol.scalar_value('synchronous', extra_args)
    if settings.batch_like is not None:
      _protocol.checked_batch('synchronous', extra_args, settings.batch_like)
    this = settings.decided(state)
    extras = dict(
      extra_args, staleness=state.updated, worker=this.order[state.count]
    )
    if params is not None:
      extras['stale_params'] = _protocol.worker_params(params, state)
    new_updates, inner_state = inner.update(
      updates, state.inner_state, params, **extras
    )
    one, refused = _protocol.accepted(state.inner_state, inner_state)
    count = (state.count + 1) % settings.wait_for
    updated = jnp.where(count == 0, 0, state.updated + one)
    round_start = state.round_start
    if not alone:
      round_start = _protocol.ReadPoint(count > 0, extras['stale_params'])
    worker = extras['worker']
    counts = this.applied.by_worker
    applied = _ring.write(
      counts, worker, _ring.read(counts, worker) + 1 - refused
    )
    now, this = settings.ended(state, this, count == 0, applied)
    return new_updates, SynchronousState(
      count, updated, now, this, round_start, None, inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _synchronous_mean(settings):
  inner, batch_like = settings.inner, settings.batch_like
  gradients = settings.wait_for

  def init_fn(params) -> _protocol.State:
    now, first = settings.begin()
    return SynchronousState(
      count=jnp.zeros([], jnp.int32),
      updated=jnp.zeros([], jnp.int32),
      # The unit of what is inside: a gradient of all batches as one.
      clock=now._replace(unit=clock.fixed(gradients)),
      round=first,
      round_start=None,
      sums=_mean.nothing(params, batch_like, gradients),
      inner_state=inner.init(params),
    )

  def update_fn(
    updates, state, params=None, **extra_args
  ) -> tuple[optax.Updates, _protocol.State]:
    sums = _mean.added(
      'synchronous', state.sums, state.count, updates, batch_like, extra_args
    )
    return collected(settings, state, sums, 1, updates, params, extra_args)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def collected(
  settings: Rounds,
  state: SynchronousState,
  sums: _mean.Sums,
  more: int | jax.Array,
  updates: optax.Updates,
  params: optax.Params | None,
  extra_args: dict[str, Any],
) -> tuple[optax.Updates, SynchronousState]:
  """What a call does once gradients are collected: the last applies their mean.

  Args:
    settings: The settings; `collects` is true.
    state: The state before.
    sums: What has been collected in this round by now.
    more: How many gradients entered it.
    updates: A tree of the dtypes of gradients.
    params: The parameters.
    extra_args: Those of the call.

  Returns:
    Updates, and the state.
  """
  gradients = settings.wait_for
  last = state.count + more == gradients
  mean, extras = _mean.packet(sums, gradients, updates, extra_args)
  if params is not None:
    extras['stale_params'] = _protocol.worker_params(params, state.inner_state)

  def apply(carry):
    mean, inner_state = carry
    return settings.inner.update(mean, inner_state, params, **extras)

  new_updates, inner_state = _ring.applied_when(
    last, apply, (mean, state.inner_state)
  )
  this = settings.decided(state)
  applied = _ring.when(
    last, lambda counts: counts.at[this.order].add(1), this.applied.by_worker
  )
  now, this = settings.ended(state, this, last, applied)
  return new_updates, SynchronousState(
    count=(state.count + more) % gradients,
    updated=state.updated,
    clock=now,
    round=this,
    round_start=None,
    sums=sums,
    inner_state=inner_state,
  )


class DataParallelState(NamedTuple):
  """State of `data_parallel`."""

  count: jax.Array  # shape=(), dtype=int32: steps so far.
  clock: _protocol.Clock  # See `simulated_time`.
  machines: Any  # What the arrival process knows.
  inner_state: optax.OptState


def data_parallel(
  inner: optax.GradientTransformation,
  workers: int,
  batch_size: int,
  *,
  worker_batch_size: int | None = None,
  arrivals: ArrivalProcess = round_robin(),
  sync_cost: float = 0.1,
  seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Data-parallel SGD: every batch is split over all workers.

  The gradients are those of one worker, and so is the trajectory; what N
  workers change is the time that a step takes on the clock
  (:func:`simulated_time`),

  .. math::

    \max_i t_i \, \frac{\max(B / N, 1)}{B_{worker}} + c

  over the min(N, B) workers that have a share, with B = ``batch_size`` the
  batch that is split, :math:`B_{worker}` = ``worker_batch_size`` the batch
  whose gradient takes :math:`t_i` on worker i (one unit on average), and c =
  ``sync_cost``. The control that every asynchronous method has to face.

  ``inner`` is given ``staleness`` 0 and ``stale_params``; all other extra
  arguments are forwarded as they come.

  Args:
    inner: Any optax transformation.
    workers: How many workers, N, at least 1.
    batch_size: Examples in the batch that is split, B, at least 1.
    worker_batch_size: Examples in a batch whose gradient takes one worker a
      unit, at least 1; None is ``batch_size``. Where methods are compared it
      is the batch of one asynchronous worker.
    arrivals: How long tasks take, an :class:`ArrivalProcess`; not a trace. One
      of random times draws min(N, B) of them every step.
    sync_cost: What the synchronisation of a step costs, in mean gradient
      computations. One worker has nobody to synchronise with.
    seed: Seed of the arrival process.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``DataParallelState``.

  Raises:
    ValueError: A number is out of its range, a worker that has a share stops
      for good, or ``arrivals`` are a trace.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.data_parallel(optax.sgd(0.5), workers=4, batch_size=16)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array([1.0]), state, params)
    >>> print(updates, gsgd_jax.simulated_time(state).round(6))
    [-0.5] 0.35
  """
  workers = _protocol.positive_int('workers', workers)
  size = _protocol.positive_int('batch_size', batch_size)
  unit_size = size
  if worker_batch_size is not None:
    unit_size = _protocol.positive_int('worker_batch_size', worker_batch_size)
  checked(arrivals)
  sharing = min(workers, size)
  _check_rounds(
    'data_parallel',
    arrivals._replace(
      outages=tuple(o for o in arrivals.outages if o.worker < sharing)
    ),
    sharing,
    sharing,
  )
  sync_cost = _protocol.real_or_traced('sync_cost', sync_cost)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return DataParallelState(
      count=jnp.zeros([], jnp.int32),
      clock=_cluster.clock_of(workers, sync_cost, unit=size / unit_size),
      machines=arrivals.init(workers, jax.random.PRNGKey(seed)),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    _protocol.scalar_value('data_parallel', extra_args)
    extras: dict[str, Any] = dict(
      extra_args, staleness=jnp.zeros([], jnp.int32)
    )
    if params is not None:
      extras['stale_params'] = _protocol.worker_params(
        params, state.inner_state
      )
    new_updates, inner_state = inner.update(
      updates, state.inner_state, params, **extras
    )
    began = state.clock.time
    ends = _cluster.round_ends(
      arrivals,
      state.machines,
      sharing,
      state.count,
      began,
      share=max(size / workers, 1) / unit_size,
    )
    end = clock.add(clock.latest(ends), clock.of(state.clock.sync_cost))
    return new_updates, DataParallelState(
      count=_protocol.one_more(state.count),
      clock=state.clock._replace(time=end),
      machines=state.machines,
      inner_state=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
