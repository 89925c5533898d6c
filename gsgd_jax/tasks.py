"""What is learned: a model, its loss on a batch, and how it is measured."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from gsgd_jax import accumulation, augmentation, data, losses, models

_DENSE = ('mlp', 'softmax_regression')
# Examples of a split that are measured, where a config does not say.
_MOST_IMAGES, _MOST_TEXT = 10_000, 400
_CALIBRATION = 500  # Examples whose statistics batch normalisation takes.
_BLOCK = 250  # Examples of large models that are measured at once.


class Task(NamedTuple):
  """What is learned.

  Attributes:
    model: The model.
    loss_fn: ``loss_fn(params, batch) -> scalar``; a batch is a
      ``data.Examples``, whose keys decide dropout and augmentation. Without
      keys nothing is dropped nor augmented: so it is of verification samples.
    measure: ``measure(params, splits)``: the losses and accuracies of a
      (train, validation or None, test), each of JAX arrays.
    keyed: Whether batches need keys.
    accuracy: ``accuracy(params, train, split, count=None)``: of a split alone,
      or of its first ``count`` examples, where a table is filled up.
  """

  model: models.Model
  loss_fn: Callable[[Any, data.Examples], jax.Array]
  measure: Callable[[Any, Any], dict[str, jax.Array]]
  keyed: bool
  accuracy: Callable[..., jax.Array]


def make(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Task:
  """The task of a config.

  Raises:
    ValueError: The model cannot learn these data.
  """
  _check_meaning(config)
  model = make_model(config, dataset)
  prepare = _preparation(config, dataset)
  measure, accuracy = _measure(config, dataset, model, prepare)
  return Task(
    model,
    accumulation.in_pieces(_loss(model, prepare), config.accumulate),
    measure,
    model.needs_keys or config.augmentation is not None,
    accuracy,
  )


def _check_meaning(config):
  """A setting of other models would do nothing."""
  cnn = config.model.startswith('cnn_')
  if config.dropout and not (cnn or config.model == 'gpt'):
    raise ValueError(
      f'dropout is of gpt and the CNNs, and model={config.model} has none'
    )
  if config.normalization != 'group' and config.model != 'resnet20':
    raise ValueError(
      f'normalization is of resnet20, and model={config.model} has none'
    )


def make_model(
  config: ml_collections.ConfigDict, dataset: data.Dataset | data.Learned
) -> models.Model:
  """The model of a config."""
  shape, classes = dataset.shape, len(dataset.classes)
  settings = dict(dtype=jnp.dtype(config.dtype))
  if config.model == 'gpt':
    return models.gpt(
      classes,
      config.context,
      layers=config.layers,
      heads=config.heads,
      width=config.width,
      dropout=config.dropout,
      **settings,
    )
  if config.model in _DENSE:
    hidden = config.hidden if config.model == 'mlp' else ()
    # Of float32, what parameters are, nothing need be said.
    dtype = None if config.dtype == 'float32' else settings['dtype']
    return models.mlp(math.prod(shape), hidden, classes, dtype=dtype)
  if len(shape) != 3:
    raise ValueError(
      f'{config.model} learns images, and {config.dataset} holds none; use '
      'model=mlp'
    )
  if config.model == 'resnet20':
    return models.resnet20(
      shape, classes, normalization=config.normalization, **settings
    )
  size = config.model.removeprefix('cnn_')
  return models.cnn(shape, classes, size, dropout=config.dropout, **settings)


def _loss(model, prepare):
  training = models.cross_entropy(model, prepare)
  if not model.needs_keys:
    return training
  evaluation = models.evaluation_loss(model, prepare)

  def loss_fn(params, batch):
    loss = evaluation if batch.keys is None else training
    return loss(params, batch)

  return loss_fn


def _preparation(config, dataset):
  """What is done with inputs before a model sees them."""
  if config.augmentation is not None and dataset.scale is None:
    raise ValueError(
      f'augmentation is of image sets, such as tfds:cifar10, and '
      f'{config.dataset} is none'
    )
  shape = dataset.shape

  def prepare(inputs, keys):
    if len(shape) == 3:
      inputs = inputs.reshape(inputs.shape[0], *shape)
    if keys is not None and config.augmentation is not None:
      inputs = augmentation.crop_and_flip(inputs, keys)
    if dataset.scale is None:
      return inputs
    return augmentation.normalize(inputs, *dataset.scale)

  return prepare


def _measure(config, dataset, model, prepare):
  """`measure` and `accuracy` of a task."""
  # Tables are small; images and text may not fit into memory as activations.
  small = config.model in _DENSE and dataset.scale is None
  most = config.measured
  if most is None:
    most = _MOST_TEXT if config.model == 'gpt' else _MOST_IMAGES
  loss_fn = models.evaluation_loss(model, prepare)
  accuracy_fn = models.accuracy(model, prepare)
  correct = losses.correctness(model, prepare)

  def of_split(params, split):
    """Loss and accuracy of examples from all over it, block by block."""
    there = dataset.count(split)
    count = there if small else min(there, most)

    def of_rows(first, size):
      numbers = first + jnp.arange(size, dtype=jnp.int32)
      numbers *= there // count
      rows = dataset.rows_in_order(split, numbers)
      examples = dataset.take(split, rows)
      return loss_fn(params, examples), accuracy_fn(params, examples)

    if small or count <= _BLOCK:
      return of_rows(0, count)
    blocks, rest = divmod(count, _BLOCK)
    firsts = _BLOCK * jnp.arange(blocks, dtype=jnp.int32)
    blockwise = jax.lax.map(lambda first: of_rows(first, _BLOCK), firsts)
    means = jax.tree.map(lambda x: x.mean(axis=0), blockwise)
    if not rest:
      return means
    return jax.tree.map(
      lambda mean, last: mean + (last - mean) * (rest / count),
      means,
      of_rows(_BLOCK * blocks, rest),
    )

  def calibrated(params, train):
    if model.calibrate is None:
      return params
    count = min(_CALIBRATION, dataset.count(train))
    rows = dataset.rows_in_order(train, jnp.arange(count, dtype=jnp.int32))
    inputs = prepare(dataset.take(train, rows).inputs, None)
    return model.calibrate(params, inputs)

  def accuracy(params, train, split, count=None):
    params = calibrated(params, train)
    if count is None:
      return of_split(params, split)[1]
    there = jnp.arange(dataset.count(split), dtype=jnp.int32) < count
    return jnp.sum(correct(params, split) & there) / count

  def measure(params, splits):
    params = calibrated(params, splits[0])
    measured = {}
    names = ('train', 'validation', 'test')
    for name, split in zip(names, splits, strict=True):
      if split is None:
        loss = share = jnp.asarray(jnp.nan)
      else:
        loss, share = of_split(params, split)
      measured[f'{name}_loss'] = loss
      measured[f'{name}_accuracy'] = share
    return measured

  return measure, accuracy
