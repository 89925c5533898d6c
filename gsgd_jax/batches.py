"""Which examples are in a batch: functions of (seed, step) alone.

Nothing but the step is needed to go on.
"""

import functools

import numpy as np

# What a generator is seeded with beside the user's seed; see `data`.
_BATCH, _VERIFICATION, _KEYS = 1, 2, 5
MOST_VERIFICATION = 100  # Examples in a sample.
_BLOCK = 64  # Steps whose samples, or keys, are drawn by one generator.


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
    >>> from gsgd_jax import batches
    >>> rows = [batches.batch_rows(6, 2, seed=0, step=s) for s in range(3)]
    >>> print(sorted(int(i) for row in rows for i in row))
    [0, 1, 2, 3, 4, 5]
  """
  epoch, position = divmod(step, examples // batch_size)
  order = _epoch_order(examples, seed, epoch)
  return order[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=256)
def _epoch_order(examples, seed, epoch):
  order = np.random.default_rng([seed, _BATCH, epoch]).permutation(examples)
  return order.astype(np.int32)


def all_batch_rows(
  examples: int, batch_size: int, seed: int, steps: int
) -> np.ndarray:
  """The rows of the batches of steps 0, 1, ...: :func:`batch_rows` of each.

  Args:
    examples: Number of training examples.
    batch_size: At most ``examples``.
    seed: An int of at least 0.
    steps: How many, at least 1.

  Returns:
    Row numbers, int32, shape ``(steps, batch_size)``.

  Examples:
    >>> from gsgd_jax import batches
    >>> rows = batches.all_batch_rows(6, 2, seed=0, steps=5)
    >>> print(rows[3] == batches.batch_rows(6, 2, seed=0, step=3))
    [ True  True]
  """
  number = examples // batch_size
  epochs = range(-(-steps // number))
  orders = [
    _epoch_order(examples, seed, e)[: number * batch_size] for e in epochs
  ]
  return np.concatenate(orders).reshape(-1, batch_size)[:steps]


def all_verification_rows(examples: int, seed: int, steps: int) -> np.ndarray:
  """The samples of steps 0, 1, ...: :func:`verification_rows` of each.

  Args:
    examples: Number of training examples.
    seed: An int of at least 0.
    steps: How many, at least 1.

  Returns:
    Row numbers, int32, shape ``(steps, verification_size(examples))``.

  Examples:
    >>> from gsgd_jax import batches
    >>> batches.all_verification_rows(1078, seed=0, steps=70).shape
    (70, 100)
  """
  blocks = range(-(-steps // _BLOCK))
  drawn = [_verification_block(examples, seed, b) for b in blocks]
  return np.concatenate(drawn)[:steps]


def verification_size(examples: int) -> int:
  """``min(100, examples // 10)``, at least 1 (guided SGD's sample).

  Examples:
    >>> from gsgd_jax import batches
    >>> print(batches.verification_size(341), batches.verification_size(10**6))
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
    >>> from gsgd_jax import batches
    >>> batches.verification_rows(1078, seed=0, step=7).shape
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
    >>> from gsgd_jax import batches
    >>> batches.batch_keys(16, seed=0, step=7).shape
    (16, 2)
  """
  block, position = divmod(step, _BLOCK)
  return _key_block(size, seed, block)[position]


@functools.lru_cache(maxsize=256)
def _key_block(size, seed, block):
  generator = np.random.default_rng([seed, _KEYS, block])
  return generator.integers(2**32, size=(_BLOCK, size, 2), dtype=np.uint32)
