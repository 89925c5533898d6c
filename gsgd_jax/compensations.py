"""Compensations by name, for the application.

A compensation acts at up to four places around the server's optimizer: it
stands in for it, corrects the gradients that it is given, accepts them or not,
or is the workers' own. `parts_of` says what a name puts where, with the
arguments that follow from the cluster: N workers, D = N - 1 updates of delay.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import optax

import gsgd_jax
from gsgd_jax import _protocol, events, optimizers, settings

NAMES: tuple[str, ...] = tuple(settings.COMPENSATIONS)
CORRECTIONS = (
  'delay_compensation',
  'exact_delay_compensation',
  'scale_by_staleness',
)
ACCEPTANCE = ('drop_stale', 'rennala')
# They keep a momentum for each worker.
PER_WORKER = ('dana', 'dana_slim', 'dana_dc')
# They are optimizers, with a momentum of their own.
OPTIMIZERS = (
  *PER_WORKER,
  'smega2',
  'adaptive_braking',
  'spike_compensation',
  'asynchronous_nesterov',
  'delayed_nesterov',
)
# They can be had where every layer has its own delay.
BY_LAYER = (
  'delay_compensation',
  'scale_by_staleness',
  'spike_compensation',
  'adaptive_braking',
  'asynchronous_nesterov',
)
NEED_STALE_PARAMS = (
  'delay_compensation',
  'exact_delay_compensation',
  'dana_dc',
)


# Arguments that are not a user's to give.
_OURS = ('inner', 'learning_rate', 'loss_fn', 'batch_like')


class Cluster(NamedTuple):
  """What a compensation's arguments follow from."""

  workers: int  # N; 1 where nothing is stale.
  loss_fn: Callable
  batch_like: Any  # Of a gradient that arrives.
  # Whether a worker's own transformation has a place.
  own_transform: bool = True
  delay: Any = None  # None is N - 1; or a tree of delays.


class Parts(NamedTuple):
  """What a compensation puts where; None where it puts nothing."""

  # Stands in for the optimizer: a function of the learning rate.
  optimizer: Callable | None = None
  correction: optax.GradientTransformation | None = None
  # Around everything at the server: a function of what is inside.
  acceptance: Callable | None = None
  prediction: Callable | None = None  # Around the optimizer, likewise.
  worker_transform: optax.GradientTransformation | None = None
  weight: float | None = (
    None  # A gradient's in the end, over the learning rate.
  )
  # Replays are not to enter its momenta, which belong to workers.
  per_worker: bool = False
  joined: int = 1  # Batches that arrive as one.
  needs_stale_params: bool = False


def dana_slim(
  learning_rate: Any, momentum: float = 0.9
) -> optax.GradientTransformation:
  """The server of DANA-Slim; `momentum` is the workers'."""
  _protocol.fraction('momentum', momentum)
  return optax.sgd(learning_rate)


def dana_dc(
  learning_rate: Any,
  workers: int,
  momentum: float = 0.9,
  lam: float = 2.0,
) -> optax.GradientTransformation:
  """DANA after DC-ASGD-c."""
  return optax.chain(
    gsgd_jax.delay_compensation(lam),
    gsgd_jax.dana(learning_rate, workers, momentum),
  )


def _factory(name):
  own = {'dana_slim': dana_slim, 'dana_dc': dana_dc}
  return own.get(name) or getattr(gsgd_jax, name)


def arguments_of(
  config: ml_collections.ConfigDict, name: str
) -> dict[str, Any]:
  """The arguments that a config gives to a compensation.

  ``compensation_kwargs`` holds arguments, of the only compensation of
  the run; or a dict of arguments for each name. One of them may be
  ``learning_rate``, its own where it is not that of the other methods.
  """
  given = ml_collections.ConfigDict(config.compensation_kwargs).to_dict()
  used = {m.compensation for m in events.methods(config) if m.compensation}
  flat = {k: v for k, v in given.items() if k not in NAMES}
  if flat and len(used) > 1:
    argument = next(iter(flat))
    raise ValueError(
      f'compensation_kwargs.{argument} may belong to any of '
      f'{", ".join(sorted(used))}: write compensation_kwargs.{name}.{argument}'
    )
  own = given.get(name, {})
  if not isinstance(own, dict):
    raise ValueError(
      f'compensation_kwargs.{name} must be a dict of arguments, got {own!r}'
    )
  arguments = flat | own
  rate = arguments.get('learning_rate', 0.0)
  if not settings.is_real(rate) or not 0 <= rate < math.inf:
    raise ValueError(
      f'the learning_rate of compensation {name} must be finite and not '
      f'negative, got {rate!r}'
    )
  return arguments


def check_used(config: ml_collections.ConfigDict) -> None:
  """Raises where a compensation, or arguments, are given to no method."""
  named = events.methods(config)
  used = {m.compensation for m in named} - {None}
  if config.compensation not in {None, *used}:
    raise ValueError(
      f'compensation={config.compensation} changes nothing, as nothing is '
      f'stale in {named[0].name}; name it yourself, '
      f'--config.methods={named[0].name}+{config.compensation}'
    )
  for argument, value in config.compensation_kwargs.items():
    if argument in NAMES:
      unused, wanted = bool(value) and argument not in used, argument
    else:
      unused, wanted = not used, 'a compensation'
    if unused:
      raise ValueError(
        f'compensation_kwargs.{argument} belongs to {wanted}, and no method '
        'has it; see --config.compensation and --config.methods'
      )


def parts_of(name: str, given: dict[str, Any], cluster: Cluster) -> Parts:
  """What a compensation puts where.

  Args:
    name: One of ``NAMES``.
    given: Arguments, beside those that follow from the cluster.
    cluster: The cluster.

  Returns:
    Its ``Parts``.

  Raises:
    ValueError: An argument is unknown or out of its range.
  """
  parameters = inspect.signature(_factory(name)).parameters
  arguments = _arguments(name, given, parameters, cluster)
  make = _maker(name, arguments)
  needs = dict(needs_stale_params=name in NEED_STALE_PARAMS)
  if name in CORRECTIONS:
    return Parts(correction=make(), **needs)
  make(0.1 if name in OPTIMIZERS else optax.identity())  # Looks at them now.
  if name in ACCEPTANCE:
    return Parts(acceptance=make, joined=arguments.get('size', 1))
  if name == 'predict':
    return Parts(prediction=make)
  momentum = arguments.get('momentum', parameters['momentum'].default)
  weight = 1 / (1 - momentum)
  if name == 'asynchronous_nesterov':
    weight = 1.0
  if name == 'delayed_nesterov':
    weight /= arguments['workers']
  parts = Parts(optimizer=make, weight=weight, **needs)
  if name not in PER_WORKER:
    return parts
  parts = parts._replace(per_worker=True)
  if name == 'dana_dc':  # What is between the two, weight decay, is seen so.
    lam = arguments.pop('lam', parameters['lam'].default)
    return parts._replace(
      correction=gsgd_jax.delay_compensation(lam),
      optimizer=_maker('dana', arguments),
    )
  if name != 'dana_slim':
    return parts
  transform = optax.trace(momentum, nesterov=True)
  if cluster.own_transform:
    return parts._replace(worker_transform=transform)
  return parts._replace(
    optimizer=lambda rate: optax.chain(transform, make(rate))
  )


def _arguments(name, given, parameters, cluster):
  """What is given, and what follows from the cluster."""
  given = {k: v for k, v in given.items() if k != 'learning_rate'}
  ours = {*_OURS, *(('workers',) if name in PER_WORKER else ())}
  known = [p for p in parameters if p not in ours]
  for argument in given:
    if argument not in known:
      raise ValueError(
        f'compensation {name} has no argument {argument}; it has '
        f'{", ".join(known)}' + settings.nearest(argument, known)
      )
  follow = dict(
    workers=cluster.workers,
    delay=cluster.workers - 1 if cluster.delay is None else cluster.delay,
    horizon=cluster.workers - 1,
    max_staleness=cluster.workers - 1,
    size=cluster.workers,
    loss_fn=cluster.loss_fn,
    batch_like=cluster.batch_like,
  )
  return {k: v for k, v in follow.items() if k in parameters} | given


def _maker(name, arguments):
  """Its factory, whose complaints name it."""

  def make(*args):
    try:
      return _factory(name)(*args, **arguments)
    except ValueError as e:
      raise ValueError(f'compensation {name}: {e}') from e
    except TypeError as e:
      raise ValueError(f'compensation {name} refuses its arguments: {e}') from e

  return make


def optimizer_of(
  parts: Parts, name: str, learning_rate: Any
) -> optax.GradientTransformationExtraArgs:
  """The optimizer that a compensation is, driven by the arrival count."""
  assert parts.optimizer is not None  # Its caller has looked.
  return optimizers.driven(
    parts.optimizer, learning_rate, f'compensation {name}'
  )
