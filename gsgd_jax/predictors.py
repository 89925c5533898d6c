"""Momentum under delay: where the server will be, and what workers read.

Momentum goes on after a gradient was applied, so a server with momentum moves
further while a worker computes than its gradients say, and much of that is
known in advance. A *predictor* lets workers read ahead: its state announces an
offset, and `worker_params` adds it. `dana` and `smega2` predict from momenta,
`predict` from the last update of any optimizer. Offsets are kept as scalars
times trees that the state holds anyway.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _leaves, _protocol, _ring


class DanaState(NamedTuple):
  """State of `dana`."""

  count: jax.Array  # shape=(), dtype=int32: gradients so far.
  momenta: _protocol.PerWorker  # v_i: leaves with an axis of workers.
  offset: _protocol.ReadOffset  # -eta m, and the sum of all momenta.


def dana(
  learning_rate: optax.ScalarOrSchedule,
  workers: int,
  momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""DANA: a momentum for each worker, which reads ahead of all of them.

  .. math::

    v_i \leftarrow m v_i + g, \qquad w \leftarrow w - \eta v_i

  for the worker i that the gradient came from; workers read

  .. math::

    w - \eta m \sum_j v_j

  (:func:`worker_params`), where the server will be once each of the N workers
  has come once more, as far as its momenta know. With one worker what it reads
  is the trajectory of ``optax.sgd(eta, m, nesterov=True)``.

  DANA-Slim needs no momenta at the server: each worker sends
  :math:`m v_i + g` instead, which is ``worker_transform=optax.trace(m,
  nesterov=True)`` of :func:`asynchronous` around ``optax.sgd(eta)``. At a
  constant rate its workers read the same parameters, under any arrivals.
  DANA-DC is a chain of :func:`delay_compensation` and ``dana``.

  It needs the extra argument ``worker``. A replay of :func:`guided` through it
  enters the momentum of the worker that the batch came from; by
  ``guided(..., replay_with=optax.sgd(eta / (1 - m)))`` replays weigh the same
  and enter none.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule. A gradient weighs
      :math:`\eta / (1 - m)` in the end.
    workers: N, at least 1: ``worker`` is to be in ``[0, N)``. It decides
      shapes: with ``optax.inject_hyperparams`` name it in ``static_args``.
    momentum: :math:`m`, in [0, 1).

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``DanaState``: N + 1 copies of the parameters, the sum in at least float32.
    A step costs the same for any N.

  Raises:
    ValueError: ``workers`` or ``momentum`` is out of its range; in ``update``,
      ``worker`` is missing (one worker needs none).

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.dana(0.1, workers=2, momentum=0.5)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for worker in (0, 1, 0):
    ...   updates, state = tx.update(jnp.array([1.0]), state, params,
    ...                              worker=worker)
    ...   params = optax.apply_updates(params, updates)
    >>> read = gsgd_jax.worker_params(params, state)
    >>> print(f'{params[0]:.3f} {read[0]:.3f}')
    0.650 0.525

  References:
    Hakimi et al., `Taming Momentum in a Distributed Asynchronous Environment`,
    arXiv:1907.11612, 2019.
  """
  workers = _protocol.positive_int('workers', workers)
  momentum = _protocol.fraction('momentum', momentum)

  def init_fn(params):
    momenta = _ring.stack(optax.tree.zeros_like(params), workers)
    return DanaState(
      jnp.zeros([], jnp.int32),
      _protocol.PerWorker(momenta),
      _no_offset(_leaves.zero_sums(params)),
    )

  def update_fn(updates, state, params=None, *, worker=None, **extra_args):
    del params, extra_args
    if worker is None and workers > 1:
      raise _protocol.missing(
        'dana',
        'worker',
        'put it inside asynchronous, or synchronous one by one, or pass '
        'worker=... to update (delayed, a mean and a split batch have no '
        'single one)',
      )
    worker = jnp.asarray(0 if worker is None else worker, jnp.int32)
    momenta = state.momenta.tree

    def enter(carry):
      slot, total = carry
      new = _leaves.traced(momentum, slot, updates)
      # By what the slot will hold, so that the sum is that of the slots.
      more = lambda t, v, old: t + (v.astype(t.dtype) - old.astype(t.dtype))
      return new, jax.tree.map(more, total, new, slot)

    # Always one trip, but the compiler cannot know: so the slot alone is
    # copied, never the ring.
    slot, total = _ring.when(
      state.count >= 0, enter, (_ring.read(momenta, worker), state.offset.tree)
    )
    rate = _leaves.rate_at(learning_rate, state.count)
    return _step(rate, slot, updates), DanaState(
      _protocol.one_more(state.count),
      _protocol.PerWorker(_ring.write(momenta, worker, slot)),
      _offset(-rate * momentum, total),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Smega2State(NamedTuple):
  """State of `smega2`."""

  count: jax.Array  # shape=(), dtype=int32: gradients so far.
  collected: jax.Array  # shape=(), dtype=int32: k, in [0, N).
  velocity: _protocol.ReadOffset  # Of V.
  gradients: _protocol.ReadOffset  # Of G, the sum of what was collected.


def smega2(
  learning_rate: optax.ScalarOrSchedule,
  workers: int,
  momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""SMEGA2: one momentum for all workers, which read a round ahead.

  .. math::

    w \leftarrow w - \eta (g + m V), \qquad G \leftarrow G + g, \quad
    k \leftarrow k + 1

  with the old :math:`V`; when k reaches N, :math:`V \leftarrow m V + G / N`,
  :math:`G \leftarrow 0` and :math:`k \leftarrow 0`. Then workers read

  .. math::

    w - \eta m \left( (N + k (m - 1)) V + \frac{k}{N} G \right)

  (:func:`worker_params`): exactly where N more updates with zero gradients
  would lead. With one worker it is :func:`dana` with one; with more it is
  close to it, in two copies of the parameters instead of N + 1.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule. A gradient weighs
      :math:`\eta / (1 - m)` in the end.
    workers: N, at least 1.
    momentum: :math:`m`, in [0, 1).

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``Smega2State``: two copies of the parameters, G in at least float32.

  Raises:
    ValueError: ``workers`` or ``momentum`` is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.smega2(0.1, workers=2, momentum=0.5)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...   updates, state = tx.update(jnp.array([1.0]), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> read = gsgd_jax.worker_params(params, state)
    >>> print(f'{params[0]:.3f} {read[0]:.3f}')
    0.650 0.550

  References:
    Cohen, Hakimi, Schuster, `SMEGA2: Distributed Asynchronous Deep Neural
    Network Training With a Single Momentum Buffer`, ICPP 2022.
  """
  workers = _protocol.count_or_traced('workers', workers)
  momentum = _protocol.fraction('momentum', momentum)

  def init_fn(params):
    return Smega2State(
      jnp.zeros([], jnp.int32),
      jnp.zeros([], jnp.int32),
      _no_offset(optax.tree.zeros_like(params)),
      _no_offset(_leaves.zero_sums(params)),
    )

  def update_fn(updates, state, params=None):
    del params
    rate = _leaves.rate_at(learning_rate, state.count)
    velocity, total = state.velocity.tree, state.gradients.tree
    step = _step(
      rate,
      jax.tree.map(
        lambda g, v: g + _leaves.like(momentum, g) * v.astype(g.dtype),
        updates,
        velocity,
      ),
      updates,
    )
    total = _leaves.traced(1.0, total, updates)
    velocity, total, collected = _leaves.collected(
      workers, state.collected, momentum, velocity, total
    )
    ahead = workers + collected.astype(_protocol.score_dtype()) * (momentum - 1)
    share = collected.astype(_protocol.score_dtype()) / workers
    return step, Smega2State(
      _protocol.one_more(state.count),
      collected,
      _offset(-rate * momentum * ahead, velocity),
      _offset(-rate * momentum * share, total),
    )

  return optax.with_extra_args_support(
    optax.GradientTransformation(init_fn, update_fn)
  )


class PredictState(NamedTuple):
  """State of `predict`."""

  offset: _protocol.ReadOffset  # T, and the last update.
  inner_state: optax.OptState


def predict(
  inner: optax.GradientTransformation, horizon: float
) -> optax.GradientTransformationExtraArgs:
  r"""Linear weight prediction: workers read ahead along the last update.

  .. math::

    w_{read} = w_t + T (w_t - w_{t-1})

  around any optimizer (:func:`worker_params`). Give it momentum: a last update
  that is one noisy gradient predicts little.

  The update is the one that ``inner`` returns: put ``predict`` last in a chain,
  and inside :func:`guided`, whose replays through it are updates like others.

  Args:
    inner: The optimizer, any optax transformation.
    horizon: :math:`T`, at least 0, in updates; with N round-robin workers N-1.
      0 is plain ``inner``.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``PredictState``: one copy of the parameters more than ``inner``'s
    (``inner``'s own state where ``horizon`` is 0).

  Raises:
    ValueError: ``horizon`` is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.predict(optax.sgd(0.5), horizon=3)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array([0.2]), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> read = gsgd_jax.worker_params(params, state)
    >>> print(f'{params[0]:.1f} {read[0]:.1f}')
    0.9 0.6

  References:
    Kosson et al., `Pipelined Backpropagation at Scale`, arXiv:2003.11666, 2021.
    Chen et al., `Efficient and Robust Parallel DNN Training through Model
    Parallelism on Multi-GPU Platform`, arXiv:1809.02839, 2018.
  """
  inner = optax.with_extra_args_support(inner)
  # An injected one may change: only what Python knows may be left out.
  known = isinstance(horizon, int | float)
  horizon = _protocol.real_or_traced('horizon', horizon)
  if known and horizon == 0:
    return inner

  def init_fn(params):
    last = _no_offset(optax.tree.zeros_like(params))
    return PredictState(last, inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    last = _ring.cast_like(updates, state.offset.tree)
    return updates, PredictState(_offset(horizon, last), inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(rate, direction, updates):
  """`-rate * direction`, in the dtypes of the updates."""
  return jax.tree.map(
    lambda d, g: (-_leaves.like(rate, d) * d).astype(g.dtype),
    direction,
    updates,
  )


def _no_offset(tree):
  return _protocol.ReadOffset(jnp.zeros([], _protocol.score_dtype()), tree)


def _offset(scale, tree):
  return _protocol.ReadOffset(jnp.asarray(scale, _protocol.score_dtype()), tree)
