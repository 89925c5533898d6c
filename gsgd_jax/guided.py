"""Guided SGD: the consistent batches of every window are replayed afresh.

A stale gradient pushes the parameters in a direction that was right some
updates ago. A batch is *consistent* when its own error moves together with the
average error. At the end of every window of updates the most consistent
batches of the window are replayed: their gradients are taken at the current
parameters, with no delay, and applied. They steer the parameters back.

The rule has three parts, and one function below for each: what the average
error is (`_average_error`), what a batch scores (`_scored`), which batches are
replayed (`_selected`). Replaying itself is `_replay`.

Source: A. Sharma, `Guided parallelized stochastic gradient descent for delay
compensation`, Applied Soft Computing 102:107084, arXiv:2101.07259, 2021.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gsgd_jax import _protocol, _ring

_DECAY = 0.9  # Of the running mean of the workers' losses.
_REPLAY_MODELS = ('serial', 'parallel', 'shared')
_SELECT = ('consistent', 'random', 'hardest', 'inconsistent', 'surprise')


class Window(NamedTuple):
  r"""What is known of the batches of the current window, by position.

  Positions that this window has not reached hold the window before.

  Attributes:
    scores: Shape ``(window,)``: :math:`S_j`.
    collected: Shape ``(window,)``: how many gains a score is the mean of;
      ``None`` without ``average_scores``.
    losses: Shape ``(window,)``: the latest known loss.
    surprises: Shape ``(window,)``: :math:`|V_{t-1} - \text{value}_t|` on
      arrival.
    workers: Shape ``(window,)``: whose gradient it was, from 0; 0 where
      workers are not known.
    staleness: Shape ``(window,)``: of the gradient on arrival, 0 where it is
      not known; ``None`` unless gradients are stored or ``select`` is a
      function.
    updates: The gradients, leaves with a leading axis of the window; ``None``
      unless they are stored.
    batches: The batches, likewise; ``None`` without ``batch_like``. On several
      devices they are a device's share, on which no choice may depend.

  Examples:
    A rule for ``guided(..., select=lowest)``, the batches of lowest loss:

    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> def lowest(window, **known):
    ...   return jnp.where(window.scores > 0, -window.losses, -jnp.inf)
    >>> tx = gsgd_jax.guided(optax.sgd(0.1), window=4, select=lowest)
    >>> state = tx.init(jnp.zeros(()))
    >>> for value in [4.0, 1.0, 2.0, 5.0]:  # Stored gradients.
    ...   _, state = tx.update(jnp.ones(()), state, jnp.zeros(()), value=value)
    >>> print(state.window.scores.round(2), state.replayed)
    [ 0.17  0.17 -1.53  0.  ] [1 0]
  """

  scores: jax.Array
  collected: jax.Array | None
  losses: jax.Array
  surprises: jax.Array
  workers: jax.Array
  staleness: jax.Array | None
  updates: optax.Updates | None
  batches: Any


# `select(window, key=key, params=params)`: how much every batch is preferred.
Select = Callable[..., jax.Array]


class GuidedState(NamedTuple):
  """State of `guided`, and its diagnostics."""

  count: jax.Array  # shape=(), dtype=int32: arrivals so far.
  average_error: jax.Array  # shape=(), float: V of the last update.
  window: Window
  replayed: jax.Array  # shape=(replays,), int32: positions, in order; else -1.
  gradient_evaluations: jax.Array  # shape=(), int32: arrivals and replays.
  replays: _protocol.Replays  # By what they cost; see `simulated_time`.
  key: jax.Array | None  # shape=(2,), uint32; random or own selection only.
  inner_state: optax.OptState
  replay_state: _protocol.Unread  # Of `replay_with`.


def guided(
  inner: optax.GradientTransformation,
  loss_fn: Callable[[Any, Any], jax.Array] | None = None,
  *,
  window: int = 10,
  replays: int | None = None,
  revisit: int | None = 0,
  select: str | Select = 'consistent',
  average_scores: bool = False,
  replay_with: optax.GradientTransformation | None = None,
  replay_model: str = 'serial',
  batch_like: Any = None,
  seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Guided SGD around any optimizer.

  Every update applies the arriving gradient through ``inner``,
  :math:`w_t = w_{t-1} + \mathrm{inner}(g_t)`, and measures the average error
  :math:`V_t`. The earlier batches j of the window then score

  .. math::

    S_j \leftarrow S_j + s_t (V_{t-1} - L_j), \qquad
    s_t = \begin{cases} +1 & V_t < V_{t-1} \\ -1 & \text{else} \end{cases}

  with :math:`L_j` the batch's loss: when the update helped, a batch already
  below the average error scores; when it hurt, a batch above it. The arriving
  batch enters with :math:`S = 0`. After :math:`\rho` updates (``window``) the
  ``replays`` highest scores, those above zero, are replayed in descending
  order: each batch's gradient is taken at the parameters that the replay
  before it left, and applied through ``inner`` (its momentum and step count
  advance). In a window of 1 no batch is an earlier one, and none is replayed.
  Of equal scores the earlier batch comes first. No score is given
  before the first :math:`V`; replays do not change :math:`V`.

  The dial between exact and free:

  * *exact* (the paper): ``revisit=None`` and a ``verification`` batch in every
    update. :math:`L_j` is taken anew at :math:`w_t` for every earlier batch,
    :math:`V_t` is the loss of the verification batch at :math:`w_t`. The paper
    draws ``min(100, n // 10)`` training examples with replacement, at least
    one, anew every update.
  * *revisit R*: only the last R earlier batches are scored, each anew.
  * *free scoring* (the default): ``revisit=0``, no ``verification``.
    :math:`L_j` is the ``value`` that its worker computed, :math:`V_t` the
    running mean :math:`0.9 V_{t-1} + 0.1\,\text{value}_t` of those values
    (:math:`V_1 = \text{value}_1`). Only the replays cost.
  * *stored gradients*: no ``loss_fn``. Free scoring, and a replay applies the
    stored gradient once more. Nothing is computed; the window's gradients are
    kept in memory.

  ``revisit`` and ``verification`` are independent. The convolutional variant
  is ``revisit=2, average_scores=True, replays=window // 2`` with
  ``verification``: the arriving batch enters with its own score
  :math:`V_{t-1} - V_t`, a score is the mean of what a batch collected, and
  :math:`V` is measured again after the replays.

  A replay is a packet like any other: ``inner`` is given the fresh ``value``,
  ``batch``, ``staleness`` 0, ``stale_params`` (where the gradient was taken)
  and the ``worker`` that the batch came from, if workers are known. Through
  ``inner`` its gradient is taken at ``worker_params(w, inner_state)``, through
  ``replay_with`` at :math:`w`. A stored gradient is replayed with its own
  ``value``, its staleness plus its age (the updates since it arrived, its own
  included) and no ``stale_params``. With ``replay_model='parallel'`` the
  gradients of a window's replays are all taken at the parameters at its end,
  and the i-th one that is applied has ``staleness`` i.

  Place ``guided`` last in a chain: members before it see arriving gradients
  only; and inside :func:`asynchronous`, not around it, so that replays are
  applied at once. Under ``optax.masked`` the ``loss_fn`` would be given masked
  parameters: mask ``inner`` instead.

  It reads the extra arguments ``value`` (required), ``batch`` (required with
  ``batch_like``), ``verification`` (optional), ``worker`` and ``staleness``,
  and forwards all of them. A learning-rate schedule inside ``inner`` counts
  replays too; drive it by the arrival count where it should not.

  Args:
    inner: The optimizer, any optax transformation.
    loss_fn: ``loss_fn(params, batch) -> scalar``, the loss of a batch, or
      ``None`` to replay stored gradients. Randomness reaches it as a key
      inside the batch. A NumPy array that it closes over becomes a constant of
      the compiled program; large data belong in the batch.
    window: Updates in a window, :math:`\rho` (the paper's delay tolerance), at
      least 1. With ``optax.inject_hyperparams`` name ``window``, ``replays``,
      ``revisit``, ``average_scores``, ``seed``, ``loss_fn``, ``batch_like``
      and a function ``select`` in ``static_args``.
    replays: The most batches replayed a window, from 0 to ``window``. ``None``
      is ``min(4, window // 2)``; 0 is plain ``inner``.
    revisit: How many of the last batches to score anew: ``None`` for all, or
      an int of at least 0; 0 scores all by the loss their worker computed.
    select: Which batches are replayed; by name, always as many as
      ``'consistent'`` would: ``'consistent'`` (highest scores),
      ``'random'``, ``'hardest'`` (highest latest known loss),
      ``'inconsistent'`` (lowest scores), ``'surprise'`` (highest
      :math:`|V_{t-1} - \text{value}_t|` on arrival). Or a rule of your own,
      ``select(window, *, key, params, **_)``, called at a window's end: given
      a :class:`Window`, a PRNG key of that window and the parameters
      (``None`` where they are not known) it returns how much each batch is
      preferred, floats of shape ``(window,)``. The ``replays`` highest are
      replayed, whatever their scores, but for those at ``-inf`` or NaN:
      ``jnp.where(window.scores > 0, ..., -jnp.inf)`` replays as many as the
      names do. More may be passed by keyword in later versions.
    average_scores: Whether a score is the mean of what a batch collected, as
      in the convolutional variant.
    replay_with: A transformation that applies replays instead of ``inner``,
      with a state of its own.
    replay_model: Who takes the replays' gradients, and what they cost on the
      clock (:func:`simulated_time`): ``'serial'``, the server itself, one
      unit each; ``'parallel'``, as many workers at once, all at the parameters
      at the window's end, one unit for all of a window (or for each N of
      them, of N workers); ``'shared'``, all
      workers, each a share of the batch, ``1 / min(workers, batch size)`` and
      a synchronisation each. Stored gradients cost nothing.
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s; required with
      ``loss_fn``. A window of batches is kept.
    seed: Seed of ``select='random'`` and of a rule's key, an int (may be
      traced).

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``GuidedState`` (``inner``'s own state if ``replays`` is 0). Its
    diagnostics: ``window.scores``, ``replayed``, ``gradient_evaluations``,
    ``average_error``.

  Raises:
    ValueError: An argument is out of its range, ``loss_fn`` without
      ``batch_like``, ``revisit`` without ``loss_fn``, :func:`drop_stale` or
      :func:`rennala` inside; in ``update``, ``value``
      or ``batch`` are missing or misshapen, or ``params`` are missing; in
      ``init``, ``select`` cannot be called or returns something else.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> batches = jax.random.normal(jax.random.key(0), (20, 8))
    >>> tx = gsgd_jax.guided(optax.sgd(0.1), loss_fn, window=4,
    ...                      batch_like=batches[0])
    >>> params = jnp.array(2.0)
    >>> state = tx.init(params)
    >>> for batch in batches:
    ...   value, grads = jax.value_and_grad(loss_fn)(params, batch)
    ...   updates, state = tx.update(grads, state, params, value=value,
    ...                              batch=batch)
    ...   params = optax.apply_updates(params, updates)
    >>> print(state.count, 'arrivals', state.gradient_evaluations, 'gradients')
    20 arrivals 30 gradients

  References:
    Sharma, `Guided Stochastic Gradient Descent Algorithm for inconsistent
    datasets`, Applied Soft Computing 73, 2018.
    Sharma, `Guided parallelized stochastic gradient descent for delay
    compensation`, arXiv:2101.07259, 2021.
    Sharma et al., `A Strategic Weight Refinement Maneuver for Convolutional
    Neural Networks`, IJCNN 2021.
  """
  inner = optax.with_extra_args_support(inner)
  rule = _checked_rule(
    loss_fn, window, replays, revisit, select, average_scores, replay_model
  )
  if rule.replays == 0:
    return inner
  if loss_fn is not None and batch_like is None:
    raise ValueError(
      'guided with a loss_fn keeps a window of batches and needs batch_like, '
      'got None; pass a batch, or its jax.ShapeDtypeStruct'
    )
  through_inner = replay_with is None
  replayer = optax.with_extra_args_support(
    optax.identity() if through_inner else replay_with
  )

  def init_fn(params) -> _protocol.State:
    inner_state = inner.init(params)
    if _protocol.announced(inner_state, _protocol.Acceptance):
      raise ValueError(
        'guided keeps every batch that reaches it, so what refuses gradients '
        'belongs around it: drop_stale(guided(...), ...), not '
        'guided(drop_stale(...)); likewise rennala'
      )
    window = _empty_window(rule, params, batch_like)
    key = jax.random.PRNGKey(seed) if rule.draws else None
    if callable(select):
      _check_select(rule, window, key, params)
    return GuidedState(
      count=jnp.zeros([], jnp.int32),
      average_error=jnp.full([], jnp.inf, _protocol.score_dtype()),
      window=window,
      replayed=jnp.full([rule.replays], -1, jnp.int32),
      gradient_evaluations=jnp.zeros([], jnp.int32),
      replays=_no_replays(rule, batch_like),
      key=key,
      inner_state=inner_state,
      replay_state=_protocol.Unread(replayer.init(params)),
    )

  def update_fn(
    updates, state, params=None, **extra_args
  ) -> tuple[optax.Updates, _protocol.State]:
    value, batch = _checked_extras(rule, params, extra_args, batch_like)
    new_updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    new_updates = _ring.cast_like(new_updates, updates)
    position = state.count % rule.window
    entered = _entered(
      state.window,
      position,
      losses=value,
      workers=extra_args.get('worker', 0),
      staleness=extra_args.get('staleness', 0),
      updates=updates,
      batches=batch,
    )
    at = _apply(params, new_updates)
    average = _average_error(rule, state, at, value, extra_args)
    scored = _scored(rule, state, entered, at, average, value)
    ends = position == rule.window - 1
    order, number = _selected(rule, state, scored, at, ends)
    replaying = jnp.arange(rule.replays, dtype=jnp.int32) < number
    new_updates, inner_state, replay_state = _replay(
      rule,
      inner if through_inner else replayer,
      through_inner,
      scored,
      order,
      number,
      params,
      (new_updates, inner_state, state.replay_state.state),
      extra_args,
    )
    if average_scores:
      average = _measured_again(
        rule, number, _apply(params, new_updates), average, extra_args
      )
    spent = 1 if loss_fn is None else 1 + number
    return new_updates, GuidedState(
      count=_protocol.one_more(state.count),
      average_error=average,
      window=scored,
      replayed=jnp.where(ends, jnp.where(replaying, order, -1), state.replayed),
      gradient_evaluations=state.gradient_evaluations + spent,
      replays=_more_replays(rule, state.replays, number),
      key=state.key,
      inner_state=inner_state,
      replay_state=_protocol.Unread(replay_state),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Rule(NamedTuple):
  """The settings of `guided` that its parts share."""

  loss_fn: Callable[[Any, Any], jax.Array] | None
  window: int
  replays: int
  revisit: int | None
  select: str | Select
  average_scores: bool
  replay_model: str

  @property
  def draws(self):
    return self.select == 'random' or callable(self.select)

  def loss(self, params, batch):
    assert self.loss_fn is not None  # Stored gradients are not scored again.
    return jnp.asarray(self.loss_fn(params, batch), _protocol.score_dtype())


def _checked_rule(
  loss_fn, window, replays, revisit, select, average_scores, replay_model
):
  """The settings, or an error that says which one cannot be."""
  window = _protocol.positive_int('window', window)
  if replays is None:
    replays = min(4, window // 2)
  replays = _protocol.positive_int('replays', replays, minimum=0)
  if replays > window:
    raise ValueError(
      f'replays must be at most window, got replays={replays} and '
      f'window={window}'
    )
  if revisit is not None:
    revisit = _protocol.positive_int('revisit', revisit, minimum=0)
  if not callable(select):
    _protocol.one_of('select', select, _SELECT, 'or a function')
  _protocol.one_of('replay_model', replay_model, _REPLAY_MODELS)
  if loss_fn is not None and not callable(loss_fn):
    raise ValueError(
      f'loss_fn must be a function of (params, batch) or None, got {loss_fn!r}'
    )
  if loss_fn is None and revisit != 0:
    raise ValueError(
      f'revisit={revisit} takes losses anew and needs a loss_fn, got none; '
      'pass loss_fn, or revisit=0'
    )
  return _Rule(
    loss_fn, window, replays, revisit, select, average_scores, replay_model
  )


def _checked_extras(rule, params, extra_args, batch_like):
  """The arriving `value` and `batch` (None without `batch_like`)."""
  value = _protocol.scalar_value('guided', extra_args)
  if value is None:
    raise _protocol.missing(
      'guided',
      'value',
      'pass value=loss to update (delayed with a tree of delays has no '
      'single one to forward)',
    )
  batch = None
  if batch_like is not None:
    batch = _protocol.checked_batch('guided', extra_args, batch_like)
  if rule.loss_fn is not None:
    _protocol.required_params('guided', params)
  return value, batch


def _empty_window(rule, params, batch_like):
  # Every leaf is an array of its own: the state may be donated.
  scores = lambda: jnp.zeros([rule.window], _protocol.score_dtype())
  counts = lambda: jnp.zeros([rule.window], jnp.int32)
  stored = rule.loss_fn is None
  updates = None
  if stored:
    updates = _ring.stack(optax.tree.zeros_like(params), rule.window)
  return Window(
    scores=scores(),
    collected=counts() if rule.average_scores else None,
    losses=scores(),
    surprises=scores(),
    workers=counts(),
    staleness=counts() if stored or callable(rule.select) else None,
    updates=updates,
    batches=_ring.empty(_protocol.abstract(batch_like), rule.window),
  )


def _entered(window, position, **entry):
  """The window with the arriving batch in its place, not yet scored."""
  entry = {k: v for k, v in entry.items() if getattr(window, k) is not None}
  rings = {k: getattr(window, k) for k in entry}
  return window._replace(**_ring.write(rings, position, entry))


def _apply(params, updates):
  return None if params is None else optax.apply_updates(params, updates)


def _average_error(rule, state, params, value, extra_args):
  """V after this update."""
  verification = extra_args.get('verification')
  if verification is not None and rule.loss_fn is not None:
    return rule.loss(params, verification)
  running = _DECAY * state.average_error + (1 - _DECAY) * value
  return jnp.where(state.count == 0, value, running)


def _scored(rule, state, window, params, average, value):
  """The window after the earlier batches and the arriving one have scored."""
  previous = state.average_error
  known = jnp.isfinite(previous)
  position = state.count % rule.window
  positions = jnp.arange(rule.window, dtype=jnp.int32)
  first = jnp.zeros([], jnp.int32)
  losses = window.losses
  if rule.revisit != 0:
    if rule.revisit is not None:
      first = jnp.maximum(position - rule.revisit, 0)

    def take_anew(j, losses):
      loss = rule.loss(params, _ring.read(window.batches, j))
      return _ring.write(losses, j, loss)

    losses = lax.fori_loop(first, position, take_anew, losses)
  scoring = known & (first <= positions) & (positions < position)
  sign = jnp.where(average < previous, 1, -1)
  gains = sign * (previous - losses)
  # The arriving batch starts anew, with its own score in the averaged variant.
  arriving = positions == position
  scores = jnp.where(arriving, 0, window.scores)
  collected = window.collected
  if rule.average_scores:
    scoring |= known & arriving
    gains = jnp.where(arriving, previous - average, gains)
    collected = jnp.where(arriving, 0, collected) + jnp.where(scoring, 1, 0)
    gains = (gains - scores) / jnp.maximum(collected, 1).astype(gains.dtype)
  surprise = jnp.where(known, jnp.abs(previous - value), 0)
  return window._replace(
    scores=jnp.where(scoring, scores + gains, scores),
    collected=collected,
    losses=losses,
    surprises=_ring.write(window.surprises, position, surprise),
  )


def _check_select(rule, window, key, params):
  """A rule of one's own has to say a float for every batch."""
  call = lambda w, k, p: rule.select(w, key=k, params=p)
  try:
    said = jax.eval_shape(call, window, key, params)
  except TypeError as e:
    raise ValueError(
      f'select must be a function of (window, *, key, params), but: {e}'
    ) from e
  if not (
    isinstance(said, jax.ShapeDtypeStruct)
    and said.shape == (rule.window,)
    and jnp.issubdtype(said.dtype, jnp.floating)
  ):
    raise ValueError(
      'select must return floats, a preference for each batch of the window, '
      f'shape {(rule.window,)}, got {said}; a mask is '
      'jnp.where(mask, 0.0, -jnp.inf)'
    )


def _selected(rule, state, window, params, ends):
  """Positions to replay, in order, and how many: none but at a window's end."""
  eligible = window.scores > 0
  key_of = lambda: jax.random.fold_in(state.key, state.count // rule.window)
  if callable(rule.select):
    preference = _ring.when(
      ends,
      lambda _: rule.select(window, key=key_of(), params=params),
      jnp.full([rule.window], -jnp.inf, _protocol.score_dtype()),
    )
    eligible = preference > -jnp.inf
  elif rule.select == 'random':
    preference = jax.random.uniform(key_of(), [rule.window])
  else:
    preference = {
      'consistent': window.scores,
      'inconsistent': -window.scores,
      'hardest': window.losses,
      'surprise': window.surprises,
    }[rule.select]
  number = jnp.where(ends, jnp.minimum(jnp.sum(eligible), rule.replays), 0)
  order = jnp.argsort(-preference, stable=True)[: rule.replays]
  return order.astype(jnp.int32), number.astype(jnp.int32)


def _replay(
  rule, tx, through_inner, window, order, number, params, carry, extra_args
):
  """Replays `number` batches; `carry` is (updates, inner's and tx's state)."""

  def read(params, inner_state):
    if through_inner:
      return _protocol.worker_params(params, inner_state)
    return params

  def fresh(position, at, staleness):
    batch = _ring.read(window.batches, position)
    value, grads = jax.value_and_grad(rule.loss_fn)(at, batch)
    packet = dict(
      value=value, batch=batch, staleness=staleness, stale_params=at
    )
    return grads, packet

  def stored(position):
    packet = dict(
      value=window.losses[position],
      staleness=window.staleness[position] + rule.window - position,
    )
    if window.batches is not None:
      packet['batch'] = _ring.read(window.batches, position)
    return _ring.read(window.updates, position), packet

  def replay_one(i, carry):
    updates, inner_state, replay_state = carry
    position = order[i]
    at = _apply(params, updates)
    if rule.loss_fn is None:
      grads, packet = stored(position)
    else:
      here, staleness = read(at, inner_state), 0
      if rule.replay_model == 'parallel':
        here, staleness = window_end, i
      grads, packet = fresh(position, here, staleness)
    packet['staleness'] = jnp.asarray(packet['staleness'], jnp.int32)
    if 'worker' in extra_args:
      packet['worker'] = window.workers[position]
    step, tx_state = tx.update(
      _ring.cast_like(grads, updates),
      inner_state if through_inner else replay_state,
      at,
      **_protocol.other_extras(extra_args, grads),
      **packet,
    )
    updates = jax.tree.map(lambda u, s: u + s.astype(u.dtype), updates, step)
    if through_inner:
      return updates, _ring.cast_like(tx_state, inner_state), replay_state
    return updates, inner_state, _ring.cast_like(tx_state, replay_state)

  carry = jax.tree.map(jnp.asarray, carry)
  window_end = None
  if rule.loss_fn is not None and rule.replay_model == 'parallel':
    window_end = read(_apply(params, carry[0]), carry[1])
  return lax.fori_loop(0, number, replay_one, carry)


def _no_replays(rule, batch_like):
  zero = lambda: jnp.zeros([], jnp.int32)
  sizes = [x.shape[0] for x in jax.tree.leaves(batch_like) if x.shape]
  size = min(sizes[0], 2**31 - 1) if sizes else 1
  size = jnp.asarray(size, jnp.int32)
  windows = jnp.zeros([rule.replays], jnp.int32)
  one = jnp.ones([], jnp.int32)
  return _protocol.Replays(zero(), windows, zero(), size, one)


def _more_replays(rule, replays, number):
  """Counted under what they cost."""
  if rule.loss_fn is None:  # Nothing is computed.
    return replays
  model = rule.replay_model
  if model == 'parallel':
    sizes = jnp.arange(1, rule.replays + 1, dtype=jnp.int32)
    number = (sizes == number).astype(jnp.int32)
  return replays._replace(**{model: getattr(replays, model) + number})


def _measured_again(rule, number, params, average, extra_args):
  """V after replays, in the averaged variant."""
  verification = extra_args.get('verification')
  if verification is None or rule.loss_fn is None:
    return average
  return _ring.when(
    number > 0, lambda _: rule.loss(params, verification), average
  )
