"""A training run: config -> data, model, optimizer -> step -> loop -> history.

All seeds of a method train at once under one `vmap`. The compiled program
takes a chunk of steps; between chunks the host draws the next batches' rows
and the progress bar moves.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import custom_batching

from gsgd_jax import asynchronous, data, guided, models, worker_params


class Method(NamedTuple):
  """A row of the comparison."""

  label: str
  asynchronous: bool
  select: str | None  # Guided SGD's selection; None is no guidance.


METHODS = {
  'sequential': Method('sequential SGD', False, None),
  'asynchronous': Method('ASGD', True, None),
  'guided': Method('guided ASGD', True, 'consistent'),
  'random': Method('ASGD + random replays', True, 'random'),
}


class History(NamedTuple):
  """What was measured, for every evaluation and seed."""

  updates: np.ndarray  # shape=(evaluations,), int: applied so far.
  gradient_evaluations: np.ndarray  # shape=(evaluations, seeds), int.
  train_loss: np.ndarray  # shape=(evaluations, seeds), over the whole split.
  validation_loss: np.ndarray
  validation_accuracy: np.ndarray  # In [0, 1].
  test_accuracy: np.ndarray


_POSITIVE = (
  'batch_size',
  'workers',
  'seeds',
  'updates',
  'evaluate_every',
  'window',
)
_SETTINGS = (
  'dataset',
  'model',
  'hidden',
  'methods',
  'learning_rate',
  'momentum',
  'replays',
  'revisit',
  'verification',
  'average_scores',
)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError that says what is wrong with a config, if anything."""
  for name in (*_SETTINGS, *_POSITIVE):
    if name not in config:
      raise ValueError(f'the config lacks the setting {name}')
  _one_of('dataset', config.dataset, data.DATASETS)
  _one_of('model', config.model, ('mlp', 'softmax_regression'))
  if not config.methods:
    raise ValueError(f'methods must name at least one of {", ".join(METHODS)}')
  for method in config.methods:
    _one_of('methods', method, METHODS)
  if len(set(config.methods)) < len(config.methods):
    raise ValueError(f'methods must differ, got {list(config.methods)}')
  for name in _POSITIVE:
    if config[name] < 1:
      raise ValueError(f'{name} must be at least 1, got {config[name]}')
  if any(not isinstance(n, int) or n < 1 for n in config.hidden):
    raise ValueError(
      f'hidden must hold positive integers, got {list(config.hidden)}'
    )
  if not (0 <= config.learning_rate < math.inf):
    raise ValueError(
      f'learning_rate must be finite and not negative, got '
      f'{config.learning_rate}'
    )
  if not (0 <= config.momentum < 1):
    raise ValueError(f'momentum must be in [0, 1), got {config.momentum}')
  if config.revisit is not None and config.revisit < 0:
    raise ValueError(f'revisit must be at least 0, got {config.revisit}')
  if config.replays is not None and not 0 <= config.replays <= config.window:
    raise ValueError(
      f'replays must be from 0 to window={config.window}, got {config.replays}'
    )
  examples = len(data.load(config.dataset, 0).train.labels)
  if config.batch_size > examples:
    raise ValueError(
      f'batch_size must be at most the {examples} training examples of '
      f'{config.dataset}, got {config.batch_size}'
    )


def _one_of(name, given, known):
  if given not in known:
    raise ValueError(
      f'{name} must be one of {", ".join(sorted(known))}, got {given!r}'
    )


def run(
  config: ml_collections.ConfigDict,
  progress: Callable[[str, int], None] = lambda label, updates: None,
) -> dict[str, History]:
  """Trains every method of a config.

  Args:
    config: Like that of ``configs/default.py``.
    progress: Called with a method's label and the updates that it has just
      finished, about once a second or more.

  Returns:
    A ``History`` for each name in ``config.methods``.

  Raises:
    ValueError: The config is bad; raised before anything is computed.
  """
  check(config)
  datasets = [data.load(config.dataset, seed) for seed in range(config.seeds)]
  return {
    name: _run_method(config, METHODS[name], datasets, progress)
    for name in config.methods
  }


def make_model(config, dataset: data.Dataset) -> models.Model:
  """The model of a config."""
  features = dataset.train.inputs.shape[1]
  if config.model == 'mlp':
    return models.mlp(features, config.hidden, dataset.classes)
  return models.softmax_regression(features, dataset.classes)


def make_transformation(
  config, method: Method, loss_fn: Callable, batch_like: Any, seed: Any
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a method: SGD, guided or not, delayed or not."""
  tx = optax.sgd(config.learning_rate, momentum=config.momentum or None)
  if method.select is not None:
    tx = guided(
      tx,
      loss_fn,
      window=config.window,
      replays=config.replays,
      revisit=config.revisit,
      select=method.select,
      average_scores=config.average_scores,
      batch_like=batch_like,
      seed=seed,
    )
  if method.asynchronous:
    tx = asynchronous(tx, config.workers, batch_like=batch_like)
  return optax.with_extra_args_support(tx)


class Rows(NamedTuple):
  """The rows that a chunk of calls reads; leading axes (seeds, calls)."""

  batch: np.ndarray
  verification: np.ndarray | None


class _Carry(NamedTuple):
  params: Any
  opt_state: optax.OptState
  replays: jax.Array  # shape=(), int32: replays so far.


def _run_method(config, method, datasets, progress):
  model = make_model(config, datasets[0])
  filling = config.workers - 1 if method.asynchronous else 0
  init, advance = _programs(config, method, model, datasets, filling)
  arrays = jax.tree.map(
    lambda *splits: jnp.stack(splits),
    *((d.train, d.validation, d.test) for d in datasets),
  )
  carry = init(jnp.arange(config.seeds), arrays)
  measured, calls, updates = [], 0, [0]
  for length in _chunks(config):
    # The first chunk of updates also fills the workers' slots.
    length += filling if len(measured) == 1 else 0
    rows = _rows(config, method, datasets, calls, length, filling)
    carry, metrics = advance(carry, arrays, rows, length)
    metrics = jax.device_get(metrics)
    calls += length
    updates.append(max(calls - filling, 0))
    metrics['gradient_evaluations'] = calls + metrics.pop('replays')
    measured.append(metrics)
    progress(method.label, updates[-1] - updates[-2])
  stacked = jax.tree.map(lambda *values: np.stack(values), *measured)
  return History(updates=np.array(updates[1:]), **stacked)


def _chunks(config) -> Iterator[int]:
  """Updates between evaluations; the first evaluation is before any update."""
  yield 0
  done = 0
  while done < config.updates:
    length = min(config.evaluate_every, config.updates - done)
    done += length
    yield length


def _rows(config, method, datasets, first_call, length, filling):
  """Batches by call, verification samples by update; padded to one length."""
  examples = len(datasets[0].train.labels)
  padded = min(config.evaluate_every, config.updates) + filling

  def stack(rows_of, size, offset):
    rows = np.zeros([config.seeds, padded, size], np.int32)
    for seed in range(config.seeds):
      for i in range(length):
        step = first_call + i - offset
        if step >= 0:
          rows[seed, i] = rows_of(seed, step)
    return rows

  size = config.batch_size
  batch = stack(
    lambda seed, step: data.batch_rows(examples, size, seed, step), size, 0
  )
  verification = None
  if method.select is not None and config.verification:
    verification = stack(
      lambda seed, step: data.verification_rows(examples, seed, step),
      data.verification_size(examples),
      filling,
    )
  return Rows(batch, verification)


def _programs(config, method, model, datasets, filling):
  """Compiled `init` and `advance`, over all seeds."""
  loss_fn = models.cross_entropy(model)
  batch_like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype),
    datasets[0].train,
  )

  def transformation(seed):
    return make_transformation(config, method, loss_fn, batch_like, seed)

  def init_one(seed, arrays):
    del arrays
    params = model.init(jax.random.key(seed))
    opt_state = transformation(seed).init(params)
    return _Carry(params, opt_state, jnp.zeros([], jnp.int32))

  def step(carry, arrays, rows):
    params, opt_state, _ = carry
    train = arrays[0]
    batch = jax.tree.map(lambda x: x[rows.batch], train)
    value, grads = jax.value_and_grad(loss_fn)(
      worker_params(params, opt_state), batch
    )
    extra = {}
    if rows.verification is not None:
      extra['verification'] = jax.tree.map(
        lambda x: x[rows.verification], train
      )
    # A selection's seed is in the state, so here any seed will do.
    updates, opt_state = transformation(0).update(
      grads, opt_state, params, value=value, batch=batch, **extra
    )
    params = optax.apply_updates(params, updates)
    return _Carry(params, opt_state, _replays(opt_state))

  def advance_one(carry, arrays, rows, length):
    def body(i, carry):
      return step(carry, arrays, jax.tree.map(lambda r: r[i], rows))

    carry = jax.lax.fori_loop(0, length, body, carry)
    return carry, measure(carry, arrays)

  def measure(carry, arrays):
    train, validation, test = arrays
    accuracy_fn = models.accuracy(model)
    return dict(
      train_loss=loss_fn(carry.params, train),
      validation_loss=loss_fn(carry.params, validation),
      validation_accuracy=accuracy_fn(carry.params, validation),
      test_accuracy=accuracy_fn(carry.params, test),
      replays=carry.replays,
    )

  def both(seed, arrays, rows):
    return advance_one(init_one(seed, arrays), arrays, rows, 1)[0]

  arrays = (datasets[0].train, datasets[0].validation, datasets[0].test)
  rows = _rows(config, method, datasets, 0, 1, filling)
  rows = jax.tree.map(lambda r: r[0], rows)
  axes = _batched_axes(both, np.int32(0), arrays, rows)
  init = jax.jit(jax.vmap(init_one, out_axes=axes))
  advance = jax.jit(
    jax.vmap(advance_one, in_axes=(axes, 0, 0, None), out_axes=(axes, 0)),
    donate_argnums=0,
  )
  return init, advance


def _replays(opt_state):
  """Gradients that guided SGD took for replays."""
  spent = optax.tree.get(opt_state, 'gradient_evaluations')
  if spent is None:
    return jnp.zeros([], jnp.int32)
  arrivals = optax.tree.get(
    opt_state,
    'count',
    filtering=lambda path, _: 'GuidedState' in str(path[-1]),
  )
  return spent - arrivals


def _batched_axes(fn, *args):
  """For each leaf of `fn(*args)`: 0 if it differs between seeds, else None.

  Under `vmap` counters that are the same for every seed must stay unbatched:
  a loop or a ring indexed by a batched counter masks all that it carries.
  """
  batched = []

  @custom_batching.custom_vmap
  def probe(tree):
    return tree

  @probe.def_vmap
  def rule(axis_size, in_batched, tree):
    del axis_size
    batched.append(in_batched[0])
    return tree, in_batched[0]

  one = jax.tree.map(lambda x: np.asarray(x)[None], args)
  jax.eval_shape(jax.vmap(lambda *args: probe(fn(*args))), *one)
  return jax.tree.map(lambda b: 0 if b else None, batched[0])
