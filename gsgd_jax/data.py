"""Data sets in memory, and batches that are a function of (seed, step).

Nothing but the step is needed to go on: `batch_rows` and `verification_rows`
depend on the seed and the step alone.
"""

import functools
from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
  """Examples of one split."""

  inputs: np.ndarray  # shape=(n, features), float32.
  labels: np.ndarray  # shape=(n,), int32, from 0.


class Dataset(NamedTuple):
  """A classification data set, split into three."""

  name: str
  classes: int
  train: Examples
  validation: Examples
  test: Examples


def _scikit_learn(loader: str) -> Examples:
  import sklearn.datasets

  inputs, labels = getattr(sklearn.datasets, loader)(return_X_y=True)
  return Examples(inputs.astype(np.float64), labels.astype(np.int32))


DATASETS = {
  'digits': functools.partial(_scikit_learn, 'load_digits'),
  'breast_cancer': functools.partial(_scikit_learn, 'load_breast_cancer'),
}
_SHARES = (0.6, 0.2)  # Of training and validation; the rest is for testing.


def load(name: str, seed: int) -> Dataset:
  """A data set, split at random and standardised.

  60 % of the examples train, 20 % validate, 20 % test. Every feature is
  standardised by the mean and the standard deviation of the training rows
  alone; a feature that is constant there is only centred.

  Args:
    name: ``'digits'`` (1,797 images of 8 x 8 pixels, 10 classes) or
      ``'breast_cancer'`` (Wisconsin diagnostic: 569 examples, 30 features, 2
      classes), as scikit-learn bundles them.
    seed: Decides the split, an int of at least 0.

  Returns:
    A ``Dataset``.

  Raises:
    ValueError: The name is unknown.

  Examples:
    >>> from gsgd_jax import data
    >>> digits = data.load('digits', seed=0)
    >>> print(*(len(s.labels) for s in digits[2:]), digits.classes)
    1078 359 360 10
  """
  if name not in DATASETS:
    known = ', '.join(sorted(DATASETS))
    raise ValueError(f'dataset must be one of {known}, got {name!r}')
  inputs, labels = _raw(name)
  order = np.random.default_rng([seed, 0]).permutation(len(labels))
  ends = np.cumsum([int(share * len(labels)) for share in _SHARES])
  rows = np.split(order, ends)
  mean = inputs[rows[0]].mean(axis=0)
  deviation = inputs[rows[0]].std(axis=0)
  inputs = (inputs - mean) / np.where(deviation > 0, deviation, 1)
  splits = [Examples(inputs[r].astype(np.float32), labels[r]) for r in rows]
  return Dataset(name, int(labels.max()) + 1, *splits)


@functools.cache
def _raw(name):
  return DATASETS[name]()


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
  order = np.random.default_rng([seed, 1, epoch]).permutation(examples)
  return order.astype(np.int32)


def verification_size(examples: int) -> int:
  """``min(100, examples // 10)``, at least 1 (guided SGD's sample).

  Examples:
    >>> from gsgd_jax import data
    >>> print(data.verification_size(341), data.verification_size(10**6))
    34 100
  """
  return max(1, min(100, examples // 10))


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
  generator = np.random.default_rng([seed, 2, step])
  size = verification_size(examples)
  return generator.integers(examples, size=size, dtype=np.int32)
