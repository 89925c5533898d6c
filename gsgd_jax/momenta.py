"""Optimizers whose momentum is made for delay, without reading ahead.

Heavy-ball momentum is what a delay destabilises first. `spike_compensation`
hands out at once what momentum would have spread over the delay;
`adaptive_braking` shrinks gradients that agree with a momentum that has outrun
them; `delayed_nesterov` takes momentum from means, once a round;
`asynchronous_nesterov` makes momentum large and gradients small.

They need nothing but gradients: no extra arguments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _leaves, _protocol


def spike_compensation(
  learning_rate: optax.ScalarOrSchedule,
  delay: float | Any,
  momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum that gives a late gradient at once what it has missed.

  .. math::

    v \leftarrow m v + g, \qquad
    w \leftarrow w - \eta \left( m^D v + \frac{1 - m^D}{1 - m}\, g \right)

  A gradient that comes D updates late has missed D of the shares that momentum
  would have handed it; it receives them as one spike, and its total weight
  :math:`\eta / (1 - m)` is what it was. D = 0 is heavy-ball momentum, D = 1
  Nesterov's.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule.
    delay: :math:`D`, at least 0, a constant (with N round-robin workers N-1):
      one by each gradient's own staleness would change what it weighs in all.
      Or a tree of them, whose structure is that of the parameters or a prefix
      of it, for the stages of a pipeline.
    momentum: :math:`m`, in [0, 1).

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Its state holds the momentum,
    one copy of the parameters.

  Raises:
    ValueError: ``delay`` or ``momentum`` is out of its range, or the tree of
      delays does not fit the parameters.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax
    >>> tx = gsgd_jax.spike_compensation(1.0, delay=2, momentum=0.5)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for gradient in (1.0, 0.0, 0.0):
    ...   updates, state = tx.update(jnp.array([gradient]), state, params)
    ...   print(updates)
    [-1.75]
    [-0.125]
    [-0.0625]

  References:
    Kosson et al., `Pipelined Backpropagation at Scale`, arXiv:2003.11666, 2021.
  """
  momentum = _protocol.fraction('momentum', momentum)
  if not jax.tree.leaves(delay):
    raise ValueError(f'delay must be a number or a tree of them, got {delay!r}')
  delay = jax.tree.map(lambda d: _protocol.real_or_traced('delay', d), delay)

  def init_fn(params):
    return optax.TraceState(optax.tree.zeros_like(params))

  def update_fn(updates, state, params=None):
    del params
    trace = _leaves.traced(momentum, state.trace, updates)

    def spiked(g, v, delay):
      share = jnp.asarray(momentum) ** delay
      spike = (1 - share) / (1 - momentum)
      return (
        _leaves.like(share, g) * v.astype(g.dtype) + _leaves.like(spike, g) * g
      )

    delays = _protocol.broadcast('delay', delay, updates)
    return jax.tree.map(spiked, updates, trace, delays), optax.TraceState(trace)

  return optax.with_extra_args_support(
    optax.chain(
      optax.GradientTransformation(init_fn, update_fn),
      optax.scale_by_learning_rate(learning_rate),
    )
  )


def adaptive_braking(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float = 0.9,
  strength: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum that brakes gradients that agree with it, and lets others grow.

  .. math::

    v \leftarrow m v + (1 - r \cos(g, v))\, g, \qquad w \leftarrow w - \eta v

  with the cosine between the gradient and the old momentum, over all
  parameters; 0 where either is 0. Under delay, momentum that oscillates is
  damped: what pushes it further is weighed by :math:`1 - r`, what turns it
  back by :math:`1 + r`.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule.
    momentum: :math:`m`, in [0, 1).
    strength: :math:`r`, at least 0; 0 is heavy-ball momentum.

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Its state holds the momentum,
    one copy of the parameters.

  Raises:
    ValueError: ``momentum`` or ``strength`` is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax
    >>> tx = gsgd_jax.adaptive_braking(1.0, momentum=0.5, strength=0.5)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for gradient in (1.0, 1.0, -1.0):
    ...   updates, state = tx.update(jnp.array([gradient]), state, params)
    ...   print(updates)
    [-1.]
    [-1.]
    [1.]

  References:
    Venigalla et al., `Adaptive Braking for Mitigating Gradient Delay`,
    arXiv:2007.01397, 2020.
  """
  momentum = _protocol.fraction('momentum', momentum)
  strength = _protocol.real_or_traced('strength', strength)

  def init_fn(params):
    return optax.TraceState(optax.tree.zeros_like(params))

  def update_fn(updates, state, params=None):
    del params
    size = _leaves.norm(updates) * _leaves.norm(state.trace)
    # Of nothing with nothing there is no angle.
    cosine = _leaves.dot(updates, state.trace) / jnp.where(size > 0, size, 1)
    weight = 1 - strength * cosine
    braked = jax.tree.map(lambda g: _leaves.like(weight, g) * g, updates)
    trace = _leaves.traced(momentum, state.trace, braked)
    return optax.tree.cast_like(trace, updates), optax.TraceState(trace)

  return optax.with_extra_args_support(
    optax.chain(
      optax.GradientTransformation(init_fn, update_fn),
      optax.scale_by_learning_rate(learning_rate),
    )
  )


class DelayedNesterovState(NamedTuple):
  """State of `delayed_nesterov`."""

  collected: jax.Array  # shape=(), dtype=int32: k, in [0, N).
  velocity: optax.Updates  # v.
  gradients: optax.Updates  # A, the sum of what was collected.


def delayed_nesterov(
  learning_rate: optax.ScalarOrSchedule,
  workers: int,
  momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""Delayed Nesterov: plain steps, and momentum once a round.

  .. math::

    A \leftarrow A + g, \qquad w \leftarrow w - \eta \frac{g}{N}

  but every N updates

  .. math::

    v \leftarrow b v + \frac{A}{N}, \qquad A \leftarrow 0, \qquad
    w \leftarrow w - \eta \left( b v + \frac{g}{N} \right)

  so that momentum, which multiplies the harm of staleness, takes means of N
  gradients. With one worker it is Nesterov's momentum.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule. A gradient weighs
      :math:`\eta / (N (1 - b))` in the end.
    workers: N, at least 1.
    momentum: :math:`b`, in [0, 1).

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Its state holds two copies of
    the parameters, A in at least float32.

  Raises:
    ValueError: ``workers`` or ``momentum`` is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax
    >>> tx = gsgd_jax.delayed_nesterov(1.0, workers=2, momentum=0.5)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for gradient in (1.0, 1.0, 1.0):
    ...   updates, state = tx.update(jnp.array([gradient]), state, params)
    ...   print(updates)
    [-0.5]
    [-1.]
    [-0.5]

  References:
    Liu et al., `Asynchronous Local-SGD Training for Language Modeling`,
    arXiv:2401.09135, 2024.
  """
  workers = _protocol.count_or_traced('workers', workers)
  momentum = _protocol.fraction('momentum', momentum)

  def init_fn(params):
    return DelayedNesterovState(
      jnp.zeros([], jnp.int32),
      optax.tree.zeros_like(params),
      _leaves.zero_sums(params),
    )

  def update_fn(updates, state, params=None):
    del params
    total = _leaves.traced(1.0, state.gradients, updates)
    velocity, total, collected = _leaves.collected(
      workers, state.collected, momentum, state.velocity, total
    )
    weight = jnp.where(collected == 0, momentum, 0.0)
    steps = jax.tree.map(
      lambda g, v: (
        g / _leaves.like(workers, g)
        + _leaves.like(weight, g) * v.astype(g.dtype)
      ),
      updates,
      velocity,
    )
    return steps, DelayedNesterovState(collected, velocity, total)

  return optax.with_extra_args_support(
    optax.chain(
      optax.GradientTransformation(init_fn, update_fn),
      optax.scale_by_learning_rate(learning_rate),
    )
  )


def asynchronous_nesterov(
  learning_rate: optax.ScalarOrSchedule, momentum: float = 0.99
) -> optax.GradientTransformationExtraArgs:
  r"""Asynchronous Nesterov: large momentum, and gradients weighed down by it.

  .. math::

    w_{t+1} = w_t + c (w_t - w_{t-1}) - \eta (1 - c)\, g

  and workers read :math:`w_t + c (w_t - w_{t-1})`. At a constant rate these
  reads are, under any arrivals, the parameters of Nesterov's momentum without
  any predictor. So that is what this is,
  ``optax.sgd(eta * (1 - c), momentum=c, nesterov=True)``: its parameters are
  the published method's reads.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule: what a gradient weighs
      in the end.
    momentum: :math:`c`, in [0, 1).

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Its state holds the momentum,
    one copy of the parameters.

  Raises:
    ValueError: ``momentum`` is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax
    >>> tx = gsgd_jax.asynchronous_nesterov(1.0, momentum=0.5)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for gradient in (1.0, 0.0):
    ...   updates, state = tx.update(jnp.array([gradient]), state, params)
    ...   print(updates)
    [-0.75]
    [-0.125]

  References:
    Ajanthan et al., `Nesterov Method for Asynchronous Pipeline Parallel
    Optimization`, arXiv:2505.01099, 2025.
  """
  momentum = _protocol.fraction('momentum', momentum)
  scaled = lambda count: _leaves.rate_at(learning_rate, count) * (1 - momentum)
  return optax.with_extra_args_support(
    optax.sgd(
      scaled if callable(learning_rate) else scaled(0),
      momentum=momentum,
      nesterov=True,
    )
  )
