"""Corrections of an arriving gradient, by how stale it is.

A stale gradient was right where its worker read. Two things may be done about
it before it is applied: estimate what it would have been at the server's
parameters (`delay_compensation`, `exact_delay_compensation`), or weigh it by
its age (`scale_by_staleness`).

They read their extra arguments alone, so they stand in front of any optimizer,
under any emulation, and on a real server that supplies the same extras.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _leaves, _protocol, _ring

_EPSILON = 1e-7  # Of the adaptive rule, inside its root.
_LAMBDA = {False: 0.04, True: 2.0}  # Of the constant and the adaptive rule.
_RULES = ('inverse', 'adaptive', 'polynomial')


class DelayCompensationState(NamedTuple):
  """State of `delay_compensation`."""

  mean_square: optax.Updates | None  # s, like the parameters; 'adaptive' only.


def delay_compensation(
  lam: float | None = None,
  *,
  adaptive: bool = False,
  decay: float = 0.95,
  batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Delay-compensated ASGD: a first-order estimate of the gradient here.

  With :math:`d = w_t - w_{read}`, what the server has moved since the worker
  read, and element-wise products,

  .. math::

    g' = g + \lambda\, g\, g\, d

  (DC-ASGD-c): :math:`g g^\top`'s diagonal stands for the Hessian's. With
  ``adaptive`` (DC-ASGD-a)

  .. math::

    s \leftarrow r s + (1 - r)\, g\, g, \qquad
    \lambda_t = \lambda / \sqrt{s + 10^{-7}}

  from :math:`s = 0`, with no bias correction. With ``batch_size`` B (the
  batch-scaled form) :math:`\lambda` is multiplied by B: the square of a mean
  over B examples is about B times smaller than the mean of their squares,
  which is what the estimate is about.

  It needs the extra arguments ``stale_params`` and the parameters: put it
  inside ``asynchronous(..., keep_params=True)``, in front of the optimizer.
  ``optax.masked`` and ``optax.multi_transform`` may stand around it.

  Args:
    lam: :math:`\lambda`, at least 0; 0 changes nothing. None is 0.04, with
      ``adaptive`` 2, with ``batch_size`` 1.
    adaptive: Whether to scale by the gradient's running size. With
      ``optax.inject_hyperparams`` name it in ``static_args``.
    decay: :math:`r`, in [0, 1).
    batch_size: B, at least 1, for the batch-scaled form; not with
      ``adaptive``.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``DelayCompensationState``: one copy of the parameters, in at least
    float32, if ``adaptive``, else nothing.

  Raises:
    ValueError: A number is out of its range, ``batch_size`` with ``adaptive``;
      in ``update``, ``stale_params`` or the parameters are missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = optax.chain(gsgd_jax.delay_compensation(0.5), optax.sgd(1.0))
    >>> params = jnp.array([3.0])
    >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(params), params,
    ...                        stale_params=jnp.array([2.0]))
    >>> print(updates)
    [-4.]

  References:
    Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay
    Compensation`, arXiv:1609.08326, 2017.
  """
  if not isinstance(adaptive, bool):
    raise ValueError(f'adaptive must be True or False, got {adaptive!r}')
  if adaptive and batch_size is not None:
    raise ValueError(
      'delay_compensation is batch-scaled or adaptive, not both: leave out '
      f'batch_size={batch_size!r} or adaptive=True'
    )
  if lam is None:
    lam = _LAMBDA[bool(adaptive)] if batch_size is None else 1.0
  lam = _protocol.real_or_traced('lam', lam)
  decay = _protocol.fraction('decay', decay)
  if batch_size is not None:
    lam = lam * _protocol.count_or_traced('batch_size', batch_size)

  def init_fn(params) -> _protocol.State:
    # Squares of small gradients vanish in half precision.
    zeros = _leaves.zero_sums(params) if adaptive else None
    return DelayCompensationState(zeros)

  def update_fn(
    updates, state, params=None, *, stale_params=None, **extra
  ) -> tuple[optax.Updates, _protocol.State]:
    del extra
    _required('delay_compensation', params, stale_params)
    if not adaptive:
      constant = lambda g, w, read: (
        g + _leaves.like(lam, g) * g * g * _leaves.less(w, read)
      )
      updates = _leaves.where_there(constant, updates, params, stale_params)
      return updates, state
    mean_square = _leaves.where_there(
      lambda g, s: (
        _leaves.like(decay, s) * s
        + _leaves.like(1 - decay, s) * g.astype(s.dtype) ** 2
      ),
      updates,
      state.mean_square,
    )

    def scaled(g, s, w, read):
      strength = _leaves.like(lam, s) / jnp.sqrt(s + _EPSILON)
      wide = g.astype(s.dtype)
      more = strength * wide * wide * _leaves.less(w, read).astype(s.dtype)
      return g + more.astype(g.dtype)

    updates = _leaves.where_there(
      scaled, updates, mean_square, params, stale_params
    )
    return updates, DelayCompensationState(mean_square)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ExactDelayCompensationState(NamedTuple):
  """State of `exact_delay_compensation`."""

  # What its products cost; see `simulated_time`.
  server_gradients: _protocol.ServerGradients


def exact_delay_compensation(
  loss_fn: Callable[[Any, Any], jax.Array],
  *,
  trust: float | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Delay compensation with the arriving batch's own Hessian.

  With :math:`d = w_t - w_{read}` and :math:`H_b` the Hessian of the arriving
  batch's loss where its worker read,

  .. math::

    g' = g + \min\!\left(1, \rho \frac{\|g\|}{\|H_b d\|}\right) H_b d

  (norms over all parameters): the first-order estimate of the gradient here
  that :func:`delay_compensation` approximates by :math:`g g^\top`'s diagonal.
  The correction is clipped to :math:`\rho` = ``trust`` times the gradient's
  norm, because far from where the worker read the linear estimate is erratic.
  On a quadratic, unclipped, it is the gradient at :math:`w_t`: the run is that
  of undelayed SGD.

  It tells how much a first-order correction can win at all. As a method it is
  dear: the Hessian-vector product costs the server the operations of two
  gradients for every stale gradient that arrives, and one gradient, taken
  afresh, would have no delay at all. :func:`simulated_time` counts these two,
  during which the workers wait.

  It needs the extra arguments ``stale_params`` and ``batch``: put it inside
  ``asynchronous(..., keep_params=True, batch_like=...)``, in front of the
  optimizer. Under ``optax.masked`` the ``loss_fn`` would be given masked
  parameters: mask the optimizer instead.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, twice differentiable.
      With ``optax.inject_hyperparams`` name it in ``static_args``.
    trust: :math:`\rho`, at least 0; None does not clip.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is an
    ``ExactDelayCompensationState``, a counter.

  Raises:
    ValueError: ``loss_fn`` is no function, ``trust`` is out of its range; in
      ``update``, ``stale_params``, ``batch`` or the parameters are missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2)
    >>> tx = gsgd_jax.exact_delay_compensation(loss_fn, trust=None)
    >>> params, read, batch = (jnp.array([x]) for x in (5.0, 1.0, 0.0))
    >>> gradient = 2 * (read - batch)
    >>> updates, _ = tx.update(gradient, tx.init(params), params,
    ...                        stale_params=read, batch=batch)
    >>> print(updates)  # The gradient at 5.
    [10.]

  References:
    Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay
    Compensation`, arXiv:1609.08326, 2017, of which it is the exact form.
  """
  if not callable(loss_fn):
    raise ValueError(
      f'loss_fn must be a function of (params, batch), got {loss_fn!r}'
    )
  if trust is not None:
    trust = _protocol.real_or_traced('trust', trust)
  who = 'exact_delay_compensation'

  def init_fn(params):
    del params
    return ExactDelayCompensationState(
      _protocol.ServerGradients(
        jnp.zeros([], jnp.int32), jnp.ones([], jnp.int32)
      )
    )

  def update_fn(
    updates,
    state,
    params: Any = None,
    *,
    stale_params=None,
    batch=None,
    **extra,
  ):
    del extra
    _required(who, params, stale_params)
    if batch is None:
      raise _protocol.missing(
        who,
        'batch',
        'pass batch=... to update, and batch_like=... to every transformation '
        'around this one that delays gradients (delayed with a tree of delays '
        'has no single one to forward)',
      )
    if _leaves.hides_any(updates):
      raise ValueError(
        f'{who} cannot see the loss of parameters that a mask hides: mask the '
        'optimizer after it instead'
      )
    stale_params = optax.tree.cast_like(stale_params, params)
    drift = jax.tree.map(_leaves.less, params, stale_params)
    moved = jnp.zeros([], bool)
    for d in jax.tree.leaves(drift):
      moved |= jnp.any(d != 0)

    def corrected(updates):
      gradient = lambda params: jax.grad(loss_fn)(params, batch)
      _, product = jax.jvp(gradient, (stale_params,), (drift,))
      scale = 1.0
      if trust is not None:
        scale = _clipping(trust * _leaves.norm(updates), _leaves.norm(product))
      return jax.tree.map(
        lambda g, c: g + (_leaves.like(scale, c) * c).astype(g.dtype),
        updates,
        product,
      )

    # Where nothing has moved, as for replays, there is nothing to compute.
    updates = _ring.when(moved, corrected, updates)
    taken = state.server_gradients
    count = taken.count + 2 * moved.astype(jnp.int32)
    return updates, ExactDelayCompensationState(taken._replace(count=count))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_staleness(
  rule: str = 'inverse',
  *,
  workers: int | None = None,
  exponent: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
  r"""Weighs a gradient by its staleness :math:`\tau`.

  .. math::

    g' = g \cdot \begin{cases}
      1 / \max(\tau, 1) & \text{'inverse' (staleness-aware)} \\
      N / \max(N, \tau) & \text{'adaptive' (delay-adaptive)} \\
      (1 + \tau)^{-a} & \text{'polynomial'}
    \end{cases}

  'adaptive' leaves what is at most N updates old alone, so under round-robin
  arrivals everything.

  It needs the extra argument ``staleness``; of :func:`delayed` with a tree of
  delays each leaf is weighed by its own.

  Args:
    rule: ``'inverse'``, ``'adaptive'`` or ``'polynomial'``.
    workers: N, at least 1; required by ``'adaptive'``.
    exponent: :math:`a`, at least 0, of ``'polynomial'``; 0 changes nothing.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with an ``optax.EmptyState``.

  Raises:
    ValueError: ``rule`` is unknown, a number is out of its range, ``workers``
      is missing; in ``update``, ``staleness`` is missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax
    >>> tx = gsgd_jax.scale_by_staleness('polynomial', exponent=1.0)
    >>> grads = jnp.array([8.0])
    >>> for staleness in (0, 1, 3):
    ...   updates, _ = tx.update(grads, tx.init(grads), staleness=staleness)
    ...   print(updates)
    [8.]
    [4.]
    [2.]

  References:
    Zhang et al., `Staleness-aware Async-SGD for Distributed Deep Learning`,
    arXiv:1511.05950, 2016.
    Mishchenko et al., `Asynchronous SGD Beats Minibatch SGD Under Arbitrary
    Delays`, arXiv:2206.07638, 2022.
    Xie et al., `Asynchronous Federated Optimization`, arXiv:1903.03934, 2019.
  """
  _protocol.one_of('rule', rule, _RULES)
  exponent = _protocol.real_or_traced('exponent', exponent)
  number: Any = None
  if workers is not None:
    number = _protocol.count_or_traced('workers', workers)
  elif rule == 'adaptive':
    raise ValueError("scale_by_staleness('adaptive') needs workers=N, got none")

  def weight(staleness):
    staleness = jnp.asarray(staleness, _protocol.score_dtype())
    if rule == 'inverse':
      return 1 / jnp.maximum(staleness, 1)
    if rule == 'adaptive':
      return number / jnp.maximum(_leaves.like(number, staleness), staleness)
    return (1 + staleness) ** -_leaves.like(exponent, staleness)

  def update_fn(updates, state, params=None, *, staleness=None, **extra):
    del params, extra
    if staleness is None:
      raise _protocol.missing(
        'scale_by_staleness',
        'staleness',
        'put it inside asynchronous, delayed or synchronous, or pass '
        'staleness=... to update',
      )
    if jax.tree.structure(staleness) == jax.tree.structure(0):
      by = weight(staleness)
      return jax.tree.map(lambda g: g * _leaves.like(by, g), updates), state
    scaled = lambda g, s: g * _leaves.like(weight(s), g)
    return _leaves.where_there(scaled, updates, staleness), state

  def init_fn(params):
    del params
    return optax.EmptyState()

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _required(who, params, stale_params):
  if stale_params is None:
    raise _protocol.missing(
      who,
      'stale_params',
      'put it inside asynchronous(..., keep_params=True), or pass '
      'stale_params=... to update (replays of stored gradients have none)',
    )
  _protocol.required_params(who, params)


def _clipping(bound, norm):
  """The factor that brings a norm down to a bound, if it is above it."""
  return jnp.where(norm > bound, bound / jnp.where(norm > 0, norm, 1), 1)
