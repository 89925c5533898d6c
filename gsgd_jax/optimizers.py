"""Any optax optimizer and schedule by name, driven by the arrival count.

An optimizer that guided SGD wraps is called for arrivals and for replays alike,
so its own step count is no count of arrivals. Here the rate of a schedule comes
from outside instead, as the extra argument `arrival`, which every wrapper
forwards: an arrival and the replays after it share one rate.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from gsgd_jax import settings

_LOOKED_AT = 10_000  # Arrivals, in a check.
_RATES = ('learning_rate', 'max_learning_rate')
_UNSCHEDULED = ('rprop',)
# Matrices at a network's ends, by the names of their layers: Muon's authors
# leave embeddings and the output to Adam.
_OUTER = re.compile(
  r'embed|^(wte|wpe|tokens|positions|logits|head)(_\d+)?$|_head(_\d+)?$'
)
_ALIASES = {
  'momentum': dict(momentum=0.9),
  'nesterov': dict(momentum=0.9, nesterov=True),
}


def names() -> list[str]:
  """Every optimizer that `make` knows.

  Examples:
    >>> from gsgd_jax import optimizers
    >>> known = optimizers.names()
    >>> 'adamw' in known, 'muon' in known, 'nesterov' in known
    (True, True, True)
  """
  return sorted({*_ALIASES, *_factories()})


def schedule_names() -> list[str]:
  """Every schedule that `make_schedule` knows, by its optax name.

  Examples:
    >>> from gsgd_jax import optimizers
    >>> 'cosine_decay_schedule' in optimizers.schedule_names()
    True
  """
  return sorted(
    name
    for name in dir(optax)
    if not name.startswith('scale_by_')
    and (name.endswith('_schedule') or name == 'exponential_decay')
  )


def _factories():
  """Functions of optax that take a learning rate and make an optimizer."""
  found = {}
  for module in (optax.contrib, optax):
    for name, fn in inspect.getmembers(module, inspect.isfunction):
      signature = inspect.signature(fn)
      makes = 'GradientTransformation' in str(signature.return_annotation)
      rated = any(rate in signature.parameters for rate in _RATES)
      if makes and rated and not name.startswith(('_', 'scale_by_')):
        found[name] = fn
  return found


def make(
  name: str,
  learning_rate: float | optax.Schedule | None,
  kwargs: Mapping[str, Any] | None = None,
  stages: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""An optax optimizer by its name.

  ``'muon'`` orthogonalises the matrices inside a network: parameters with two
  axes, and Flax's convolutions of images (four axes, named ``kernel``) as
  matrices (rows * columns * channels, outputs). Adam takes all else: the output
  layer, which is the last of ``stages``; what has a name such as ``embedding``,
  ``tokens``, ``positions``, ``logits``, ``head`` or ``lm_head`` in its path;
  and what is no matrix. ``muon_weight_dimension_numbers`` in ``kwargs`` is a
  rule of your own.

  Args:
    name: A function of ``optax`` or ``optax.contrib`` that takes a learning
      rate, such as ``'adamw'`` or ``'muon'``; or ``'momentum'`` or
      ``'nesterov'``, which are ``sgd`` with ``momentum=0.9``.
    learning_rate: A number; a schedule, a function of the number of arrivals
      before this one; or None for the optimizer's own default.
    kwargs: Its other arguments.
    stages: How deep the parameters are, as in ``models.Model``; ``None`` where
      no more than names is known of them.

  Returns:
    A transformation. With a schedule it wants the extra argument ``arrival``,
    an int32 scalar, and replays take the rate of the arrival before them.

  Raises:
    ValueError: The name or an argument is unknown, one is missing, or the
      optimizer refuses a value.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from gsgd_jax import optimizers
    >>> tx = optimizers.make('sgd', optax.linear_schedule(1.0, 0.0, 4))
    >>> params = jnp.ones(1)
    >>> state = tx.init(params)
    >>> for arrival in range(3):
    ...   updates, state = tx.update(params, state, params, arrival=arrival)
    ...   print(f'{updates[0]:.2f}')
    -1.00
    -0.75
    -0.50
  """
  settings.one_of('optimizer', name, names())
  factory = _factories()['sgd' if name in _ALIASES else name]
  own = _ALIASES.get(name, {})
  if name == 'muon':
    own = dict(muon_weight_dimension_numbers=_matrices_inside(stages))
  kwargs = {**own, **(kwargs or {})}
  parameters = inspect.signature(factory).parameters
  rate = next(r for r in _RATES if r in parameters)
  _check_arguments(f'optimizer {name}', kwargs, parameters, rate, learning_rate)

  def at(value):
    rated = {} if value is None else {rate: value}
    try:
      return factory(**rated, **kwargs)
    except Exception as e:  # Whatever it raises, it is the arguments.
      raise _refusal(f'optimizer {name}', e) from e

  if callable(learning_rate) and name in _UNSCHEDULED:
    raise ValueError(
      f'optimizer {name} looks at its rate once, in the beginning: it takes '
      'no schedule and no warm-up'
    )
  return driven(at, learning_rate, f'optimizer {name}')


def _matrices_inside(stages):
  """What Muon orthogonalises, as its argument says it."""
  depths = jax.tree_util.tree_flatten_with_path(stages)[0]
  last = max((depth for _, depth in depths), default=None)
  output = {path for path, depth in depths if depth == last}

  def of(path, x):
    names = [str(getattr(k, 'key', getattr(k, 'name', ''))) for k in path]
    if path in output or any(_OUTER.search(name.lower()) for name in names):
      return None
    if x.ndim == 2:
      return optax.contrib.MuonDimensionNumbers()
    if x.ndim == 4 and 'kernel' in names:
      return optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    return None

  # By paths: Muon also asks for trees that have no more than its own leaves.
  return lambda params: jax.tree_util.tree_map_with_path(of, params)


def driven(
  at: Callable[[Any], optax.GradientTransformation],
  learning_rate: float | optax.Schedule | None,
  who: str,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer whose rate follows the arrival count.

  Args:
    at: The optimizer at a learning rate.
    learning_rate: As in `make`.
    who: What it is called in errors.

  Returns:
    A transformation; with a schedule it wants the extra argument ``arrival``.
  """
  scheduled = callable(learning_rate)
  fixed = optax.with_extra_args_support(
    at(learning_rate(0) if scheduled else learning_rate)
  )

  def update_fn(updates, state, params=None, *, arrival=None, **extra_args):
    tx = fixed
    if scheduled:
      if arrival is None:
        raise ValueError(f'{who} with a schedule needs arrival=...')
      rate = jnp.asarray(learning_rate(arrival), jnp.float32)
      tx = optax.with_extra_args_support(at(rate))
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(fixed.init, update_fn)


def _refusal(who, error):
  return ValueError(f'{who} refuses its arguments: {_first_line(error)}')


def _first_line(error):
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _check_arguments(who, kwargs, parameters, rate, learning_rate):
  if rate and any(r in kwargs for r in _RATES):
    raise ValueError(f'{who}: its rate is the setting learning_rate')
  anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  for given in kwargs:
    if given not in parameters and not anything:
      known = ', '.join(p for p in parameters if p != rate)
      raise ValueError(
        f'{who} has no argument {given}; it has {known}'
        + settings.nearest(given, parameters)
      )
  given = {*kwargs} | ({rate} if learning_rate is not None else set())
  for parameter in parameters.values():
    needed = parameter.default is parameter.empty
    needed &= parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    if needed and parameter.name not in given:
      raise ValueError(f'{who} needs the argument {parameter.name}')


def make_schedule(
  name: str,
  learning_rate: float,
  arrivals: int,
  kwargs: Mapping[str, Any] | None = None,
  warmup: int = 0,
  warmup_start: float | None = None,
  drops: Sequence[int] = (),
  drop_factor: float = 0.1,
) -> float | Callable[[Any], Any]:
  r"""An optax schedule by its name, with a linear warm-up and drops.

  .. math::

    \eta(t) = f^{|\{d \in D:\, d \le t\}|} \begin{cases}
    \eta \left( s + (1 - s) \frac{t}{W - 1} \right) & t < W \\
    \mathrm{schedule}(t - W) & \text{else} \end{cases}

  Arguments that are not given follow from the run: the schedule's initial (or
  constant, or peak) value is ``learning_rate``, its final value 0, its length
  the arrivals after the warm-up. A schedule with a warm-up of its own starts
  from 0.

  Args:
    name: A schedule of optax, such as ``'cosine_decay_schedule'``; the ending
      ``_schedule`` may be left out.
    learning_rate: :math:`\eta`, at least 0.
    arrivals: Arrivals in the run, at least 1.
    kwargs: The schedule's arguments. ``boundaries_and_scales`` may be a
      sequence of pairs.
    warmup: :math:`W`, arrivals over which the rate rises, less than
      ``arrivals``.
    warmup_start: :math:`s`, the share of the rate that the warm-up begins at,
      in [0, 1]; None is :math:`1 / W`, for a rate of
      :math:`\eta\, (t + 1) / W`.
    drops: :math:`D`, arrivals from which on the rate is smaller by
    drop_factor: :math:`f`, in [0, 1].

  Returns:
    ``learning_rate`` itself where it is constant, else a function of the
    number of arrivals so far.

  Raises:
    ValueError: The name or an argument is unknown, or one is missing.

  Examples:
    >>> from gsgd_jax import optimizers
    >>> rate = optimizers.make_schedule('cosine_decay', 0.4, 120, warmup=20)
    >>> print(*(f'{rate(t):.2f}' for t in (0, 10, 20, 70, 119)))
    0.02 0.22 0.40 0.20 0.00
  """
  known = schedule_names()
  full = name if name in known else f'{name}_schedule'
  if full not in known:
    settings.one_of('schedule', name, known)
  given = dict(kwargs or {})
  changed = warmup or len(drops) or given
  if full == 'constant_schedule' and not changed:
    return learning_rate
  factory = getattr(optax, full)
  parameters = inspect.signature(factory).parameters
  if isinstance(given.get('boundaries_and_scales'), (tuple, list)):
    try:
      given['boundaries_and_scales'] = dict(given['boundaries_and_scales'])
    except (TypeError, ValueError):
      raise ValueError(
        'boundaries_and_scales must hold pairs of an arrival and a factor, got '
        f'{given["boundaries_and_scales"]!r}'
      ) from None
  own_warmup = {'peak_value', 'warmup_steps'} <= set(parameters)
  defaults = dict(
    value=learning_rate,
    init_value=0.0 if own_warmup else learning_rate,
    peak_value=learning_rate,
    decay_steps=arrivals - warmup,
    transition_steps=arrivals - warmup,
    end_value=0.0,
  )
  needed = {
    p: defaults[p]
    for p in parameters
    if p in defaults and parameters[p].default is inspect.Parameter.empty
  }
  arguments = {**needed, **given}
  _check_arguments(f'schedule {full}', arguments, parameters, '', None)
  try:
    schedule = factory(**arguments)
    if warmup:
      # Not from 0: some optimizers never recover from a step of no length.
      start = 1 / warmup if warmup_start is None else warmup_start
      least = learning_rate * start
      rise = optax.linear_schedule(least, learning_rate, max(1, warmup - 1))
      schedule = optax.join_schedules([rise, schedule], [warmup])
  except Exception as e:  # Whatever it raises, it is the arguments.
    raise _refusal(f'schedule {full}', e) from e
  return _dropping(schedule, drops, drop_factor) if len(drops) else schedule


def _dropping(schedule, drops, factor):
  drops = np.asarray(drops, np.int32)
  return lambda t: schedule(t) * factor ** jnp.sum(jnp.asarray(t) >= drops)


def check_rates(name: str, rate: Any, arrivals: int) -> None:
  """Raises a ValueError unless the rates of a run are finite and at least 0.

  In a run of more than 10,000 arrivals as many of them are looked at.
  """
  if not callable(rate):
    return
  try:
    arrival = np.unique(np.linspace(0, arrivals - 1, _LOOKED_AT).astype(int))
    rates = np.asarray(jax.vmap(rate)(jnp.asarray(arrival)))
  except Exception as e:
    raise _refusal(f'schedule {name}', e) from e
  if rates.ndim != 1:
    raise ValueError(
      f'schedule {name} gives learning rates that are no numbers'
    )
  wrong = np.flatnonzero(~(np.isfinite(rates) & (rates >= 0)))
  if len(wrong):
    raise ValueError(
      f'schedule {name} gives the learning rate {rates[wrong[0]]:g} at arrival '
      f'{arrival[wrong[0]]}; it must be finite and not negative'
    )


def with_value_fn(
  inner: optax.GradientTransformation,
  loss_fn: Callable[[Any, Any], jax.Array],
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Hands `inner` the loss of the *arrived* batch as a function.

  For line searches (``value_fn`` of ``optax.lbfgs``) and curvature (``obj_fn``
  of ``optax.contrib.sophia``). They evaluate it at the server's parameters;
  ``value`` remains the loss where the gradient was taken.

  Where the gradients that arrive are of a loss with weight decay, so is what is
  handed on: :math:`\lambda \|w\|^2 / 2` is added, to ``value`` that of the
  server's parameters.

  Args:
    inner: Any optimizer.
    loss_fn: ``loss_fn(params, batch) -> scalar``.
    weight_decay: :math:`\lambda`, at least 0.

  Returns:
    A transformation that wants the extra arguments ``value`` and ``batch``, and
    hands on these and ``arrival`` alone. Without a ``value`` (``delayed`` with
    a tree of delays has none) it hands on ``arrival``, and an optimizer that
    wants more complains.
  """
  inner = optax.with_extra_args_support(inner)

  def penalty(params):
    return weight_decay / 2 * optax.tree.norm(params, squared=True)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    value=None,
    batch=None,
    arrival=None,
    **extra_args,
  ):
    # optax's line searches refuse extra arguments that they do not know.
    del extra_args
    if value is None:
      return inner.update(updates, state, params, arrival=arrival)
    fn = lambda params, obj_fn=None: loss_fn(params, batch)
    if weight_decay:
      fn = lambda params, obj_fn=None: loss_fn(params, batch) + penalty(params)
      value = value + penalty(params)
    extra = dict(value=value, grad=updates, value_fn=fn, obj_fn=fn)
    return inner.update(updates, state, params, arrival=arrival, **extra)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def evaluation_params(
  params: optax.Params, opt_state: optax.OptState
) -> optax.Params:
  """The parameters to evaluate: schedule-free methods train others."""
  kind = optax.contrib.ScheduleFreeState
  found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
  for state in found:
    if isinstance(state, kind):
      params = optax.contrib.schedule_free_eval_params(state, params)
  return params


def dry_run(
  tx: optax.GradientTransformation,
  params: optax.Params,
  name: str,
  **extra_args: Any,
) -> None:
  """Raises a ValueError if an optimizer cannot take a step here.

  Nothing is computed: shapes alone are followed.
  """

  def step(params, extra_args):
    state = tx.init(params)
    return tx.update(params, state, params, **extra_args)

  try:
    updates, _ = jax.eval_shape(step, params, extra_args)
  except Exception as e:  # Whatever optax raises, it is this combination.
    raise ValueError(
      f'optimizer {name} cannot be used here: {_first_line(e)}'
    ) from e
  same = jax.tree.map(lambda u, p: u.shape == p.shape, updates, params)
  if not all(jax.tree.leaves(same)):
    raise ValueError(
      f'optimizer {name} cannot be used here: it changes the shapes of updates'
    )
