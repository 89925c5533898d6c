"""Data sets in memory, and batches that are a function of (seed, step).

Nothing but the step is needed to go on: `batch_rows` and `verification_rows`
depend on the seed and the step alone.
"""

import functools
from typing import NamedTuple

import numpy as np

from gsgd_jax import settings, sources


class Examples(NamedTuple):
  """Examples of one split."""

  inputs: np.ndarray  # shape=(n, features), float32.
  labels: np.ndarray  # shape=(n,), int32: positions in the classes.


class Dataset(NamedTuple):
  """A classification data set, split into three."""

  name: str
  classes: tuple[str, ...]
  train: Examples
  validation: Examples | None  # None where its share is 0.
  test: Examples


# What a generator is seeded with beside the user's seed.
_SPLIT, _BATCH, _VERIFICATION, _NOISE, _KEYS = range(5)
MOST_VERIFICATION = 100  # Examples in a sample.
_BLOCK = 64  # Steps whose samples, or keys, are drawn by one generator.


def load(
  name: str,
  seed: int,
  *,
  target: str | None = None,
  preprocessing: str = 'standard',
  train_share: float = 0.6,
  validation_share: float = 0.2,
  label_noise: float = 0.0,
) -> Dataset:
  r"""A data set, split at random, scaled, and noisy where that is asked for.

  With ``'standard'`` preprocessing every feature x becomes
  :math:`(x - \mu) / \sigma` by the mean and the standard deviation of the
  training rows alone; a feature that is constant there is only centred. With
  ``'author'``, for the reproduction of the paper, every feature is so
  standardised, then scaled to [0, 1], both by the statistics of the whole set
  (which the test rows leak into), and a constant 1 is prepended; its split is
  ``train_share=0.6, validation_share=0``.

  Args:
    name: What :func:`gsgd_jax.sources.read` knows: ``'digits'``,
      ``'breast_cancer'``, ``'iris'``, ``'wine'``, a file, ``'openml:NAME'``.
    seed: Decides the split and the noise, an int of at least 0.
    target: The column of the classes, for CSV files and OpenML.
    preprocessing: ``'standard'`` or ``'author'``.
    train_share: Share of the examples to train on, in (0, 1).
    validation_share: Share to validate on, in [0, 1); 0 leaves no such split.
      The rest is for testing.
    label_noise: Share of the training labels, in [0, 1], that are flipped to
      another class, drawn at random.

  Returns:
    A ``Dataset``.

  Raises:
    ValueError: The data are unknown or malformed; a split is empty; the
      training rows hold one class only.
    OSError: The file cannot be read.

  Examples:
    >>> from gsgd_jax import data
    >>> digits = data.load('digits', seed=0)
    >>> print(*(len(s.labels) for s in digits[2:]), len(digits.classes))
    1078 359 360 10
  """
  settings.one_of('preprocessing', preprocessing, _PREPROCESSING)
  if not 0 <= label_noise <= 1:
    raise ValueError(f'label_noise must be from 0 to 1, got {label_noise}')
  source = sources.read(name, target)
  order = np.random.default_rng([seed, _SPLIT]).permutation(len(source.labels))
  rows = _split(name, order, train_share, validation_share)
  scale = _PREPROCESSING[preprocessing]
  with np.errstate(all='ignore'):
    inputs = scale(source.inputs, rows[0]).astype(np.float32)
  if not np.isfinite(inputs).all():
    raise ValueError(
      f'{name} holds numbers too large to be scaled, up to '
      f'{np.abs(source.inputs).max():g}'
    )
  splits = [
    Examples(inputs[r], source.labels[r]) if len(r) else None for r in rows
  ]
  train = _noisy(splits[0], len(source.classes), label_noise, seed)
  if len(np.unique(splits[0].labels)) < 2:
    raise ValueError(
      f'the {len(rows[0])} training examples of {name}, seed {seed}, are all '
      'of one class; give more data or a larger train_share'
    )
  return Dataset(name, source.classes, train, *splits[1:])


def _split(name, order, train_share, validation_share):
  # A share such as 0.29 of 100 is 28.999999999999996 in floating point.
  count = lambda share: int(share * len(order) + 1e-9)
  ends = np.cumsum([count(train_share), count(validation_share)])
  rows = np.split(order, ends)
  names = ('training', 'validation', 'testing')
  wanted = (True, validation_share > 0, True)
  for split, part, want in zip(rows, names, wanted, strict=True):
    if want and not len(split):
      raise ValueError(
        f'the {len(order)} examples of {name} leave none for {part} '
        f'(train_share={train_share:g}, validation_share={validation_share:g})'
      )
  return rows


def _standard(inputs, train_rows):
  rows = inputs[train_rows]
  # Of equal numbers the mean may be another, and the deviation not 0.
  constant = rows.min(axis=0) == rows.max(axis=0)
  centre = np.where(constant, rows[0], rows.mean(axis=0))
  return (inputs - centre) / np.where(constant, 1, rows.std(axis=0))


def _author(inputs, train_rows):
  del train_rows
  inputs = _standard(inputs, slice(None))
  low, high = inputs.min(axis=0), inputs.max(axis=0)
  inputs = (inputs - low) / np.where(high > low, high - low, 1)
  return np.column_stack([np.ones(len(inputs)), inputs])


_PREPROCESSING = {'standard': _standard, 'author': _author}


def _noisy(train, classes, share, seed):
  generator = np.random.default_rng([seed, _NOISE])
  flipped = generator.permutation(len(train.labels))
  flipped = flipped[: round(share * len(train.labels))]
  labels = train.labels.copy()
  shift = generator.integers(1, classes, size=len(flipped), dtype=np.int32)
  labels[flipped] = (labels[flipped] + shift) % classes
  return train._replace(labels=labels)


def batch_rows(
  examples: int, batch_size: int, seed: int, step: int
) -> np.ndarray:
  """The rows of the batch of a step: epochs without replacement.

  Every epoch has an order of its own; what is left over at its end is dropped.

  Args:
    examples: Number of training examples.
    batch_size: At most ``examples``.
    seed: An int of at least 0.
    step: From 0.

  Returns:
    Row numbers, int32, shape ``(batch_size,)``.

  Examples:
    >>> from gsgd_jax import data
    >>> rows = [data.batch_rows(6, 2, seed=0, step=s) for s in range(3)]
    >>> print(sorted(int(i) for row in rows for i in row))
    [0, 1, 2, 3, 4, 5]
  """
  epoch, position = divmod(step, examples // batch_size)
  order = _epoch_order(examples, seed, epoch)
  return order[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=4096)
def _epoch_order(examples, seed, epoch):
  order = np.random.default_rng([seed, _BATCH, epoch]).permutation(examples)
  return order.astype(np.int32)


def verification_size(examples: int) -> int:
  """``min(100, examples // 10)``, at least 1 (guided SGD's sample).

  Examples:
    >>> from gsgd_jax import data
    >>> print(data.verification_size(341), data.verification_size(10**6))
    34 100
  """
  return max(1, min(MOST_VERIFICATION, examples // 10))


def verification_rows(examples: int, seed: int, step: int) -> np.ndarray:
  """Guided SGD's verification sample of a step: drawn with replacement.

  Args:
    examples: Number of training examples.
    seed: An int of at least 0.
    step: From 0.

  Returns:
    Row numbers, int32, shape ``(verification_size(examples),)``.

  Examples:
    >>> from gsgd_jax import data
    >>> data.verification_rows(1078, seed=0, step=7).shape
    (100,)
  """
  block, position = divmod(step, _BLOCK)
  return _verification_block(examples, seed, block)[position]


@functools.lru_cache(maxsize=1024)
def _verification_block(examples, seed, block):
  # A generator costs more than a sample, so it draws many.
  generator = np.random.default_rng([seed, _VERIFICATION, block])
  size = (_BLOCK, verification_size(examples))
  return generator.integers(examples, size=size, dtype=np.int32)


def batch_keys(size: int, seed: int, step: int) -> np.ndarray:
  """Random keys for the examples of a step's batch, one each.

  Args:
    size: Number of keys, at least 1.
    seed: An int of at least 0.
    step: From 0.

  Returns:
    Raw key data for ``jax.random.wrap_key_data(keys, impl='threefry2x32')``,
    uint32, shape ``(size, 2)``.

  Examples:
    >>> from gsgd_jax import data
    >>> data.batch_keys(16, seed=0, step=7).shape
    (16, 2)
  """
  block, position = divmod(step, _BLOCK)
  return _key_block(size, seed, block)[position]


@functools.lru_cache(maxsize=256)
def _key_block(size, seed, block):
  generator = np.random.default_rng([seed, _KEYS, block])
  return generator.integers(2**32, size=(_BLOCK, size, 2), dtype=np.uint32)
