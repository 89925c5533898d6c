"""Data sets: tables, images and text, split into three.

Which examples a batch holds is said by `batches`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsgd_jax import batches, images, settings, sources


class Examples(NamedTuple):
  """Examples of one split, or of a batch."""

  # shape=(n, features), float32; images (n, height, width, channels), uint8;
  # of a batch of text (n, context), int32.
  inputs: np.ndarray
  labels: np.ndarray  # shape=(n,), int32: positions in the classes.
  # shape=(n, 2), uint32: a random key for each example of a batch, or None.
  keys: np.ndarray | None = None


class Text(NamedTuple):
  """A stretch of text; its examples are the windows of one context."""

  tokens: np.ndarray  # shape=(n,), int32: positions in the classes.


class Learned(NamedTuple):
  """What a model needs to know of a data set."""

  shape: tuple[int, ...]
  classes: tuple[str, ...]


class Dataset(NamedTuple):
  """A data set, split into three.

  Attributes:
    name: As given to :func:`load`.
    classes: What labels are the positions of; of text its characters.
    train: Of a streamed set a sample of it, for verification and measuring.
    validation: None where its share is 0.
    test: As ``train``.
    shape: Of an example's inputs: ``(features,)``, ``(height, width,
      channels)``, ``(context,)``.
    scale: Of images whose pixels are to be scaled, the mean and the standard
      deviation of each channel, of values in [0, 1].
    stream: Training images that are read as they are needed, or None.
  """

  name: str
  classes: tuple[str, ...]
  train: Examples | Text
  validation: Examples | Text | None
  test: Examples | Text
  shape: tuple[int, ...]
  scale: tuple[np.ndarray, np.ndarray] | None = None
  stream: images.Streamed | None = None

  @property
  def examples(self) -> int:
    """Training examples: an epoch is a pass over so many."""
    if self.stream is not None:
      return self.stream.examples
    return self.count(self.train)

  def count(self, split: Examples | Text) -> int:
    """Examples of a split; of text, windows that do not overlap."""
    if isinstance(split, Text):
      return (len(split.tokens) - 1) // self.shape[0]
    return len(split.labels)

  def take(self, split: Examples | Text, rows: jax.Array) -> Examples:
    """The examples of some rows, whose first axis they keep.

    Args:
      split: One of this set's, of JAX arrays.
      rows: Row numbers, int32, shape ``(n,)``; of text, where windows begin.

    Returns:
      ``Examples``; those of text predict, at every position, the next token.
    """
    if isinstance(split, Text):
      context = self.shape[0]
      window = rows[:, None] + np.arange(context + 1, dtype=np.int32)[None]
      tokens = split.tokens[window]
      return Examples(tokens[:, :-1], tokens[:, 1:])
    return Examples(split.inputs[rows], split.labels[rows])

  def rows_in_order(self, split: Examples | Text, numbers: Any) -> Any:
    """The rows of a split's examples number 0, 1, ..."""
    return numbers * self.shape[0] if isinstance(split, Text) else numbers

  def batch_rows(self, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of a step's batch; see :func:`gsgd_jax.batches.batch_rows`.

    Text is cut into windows at another place in every epoch.
    """
    rows = batches.batch_rows(self.examples, batch_size, seed, step)
    if not isinstance(self.train, Text):
      return rows
    context = self.shape[0]
    epoch = step // (self.examples // batch_size)
    begin = np.random.default_rng([seed, _CUT, epoch]).integers(context)
    last = len(self.train.tokens) - context - 1
    return np.minimum(rows * context + begin, last).astype(np.int32)

  def all_batch_rows(
    self, batch_size: int, seed: int, steps: int
  ) -> np.ndarray:
    """Those of steps 0, 1, ..., shape ``(steps, batch_size)``."""
    if isinstance(self.train, Text):
      rows = (self.batch_rows(batch_size, seed, s) for s in range(steps))
      return np.stack(list(rows))
    return batches.all_batch_rows(self.examples, batch_size, seed, steps)

  def all_verification_rows(self, seed: int, steps: int) -> np.ndarray:
    """Those of steps 0, 1, ..., shape ``(steps, size)``."""
    if isinstance(self.train, Text):
      rows = (self.verification_rows(seed, s) for s in range(steps))
      return np.stack(list(rows))
    return batches.all_verification_rows(self.examples, seed, steps)

  def verification_rows(self, seed: int, step: int) -> np.ndarray:
    """The rows of a step's sample; see :func:`verification_rows`."""
    if not isinstance(self.train, Text):
      return batches.verification_rows(self.count(self.train), seed, step)
    rows = batches.verification_rows(self.examples, seed, step)
    return rows * self.shape[0]


def axes(datasets: list[Dataset]) -> Any:
  """For each array of the splits: 0 if seeds differ in it, else None."""
  splits = [(d.train, d.validation, d.test) for d in datasets]
  return jax.tree.map(_axis, *splits)


def stacked(datasets: list[Dataset]) -> tuple[Any, Any, Any]:
  """(train, validation or None, test) of all seeds.

  Arrays in which seeds differ have a leading axis of seeds, see `axes`.
  """

  def joined(*arrays):
    return (
      jnp.asarray(arrays[0]) if _axis(*arrays) is None else jnp.stack(arrays)
    )

  splits = [(d.train, d.validation, d.test) for d in datasets]
  return jax.tree.map(joined, *splits)


def _axis(array, *others):
  shared = others and all(other is array for other in others)
  return None if shared else 0


# What a generator is seeded with beside the user's seed.
_SPLIT, _NOISE, _CUT = 0, 3, 4  # Others are of `batches`.
_SAMPLE = 10_000  # Examples of a streamed split that are held in memory.


def load(
  name: str,
  seed: int,
  *,
  target: str | None = None,
  preprocessing: str = 'standard',
  train_share: float = 0.6,
  validation_share: float = 0.2,
  label_noise: float = 0.0,
  context: int | None = None,
  data_dir: str | None = None,
  image_size: int | None = None,
  stream: bool | None = None,
) -> Dataset:
  r"""A data set, split at random, scaled, and noisy where that is asked for.

  With ``'standard'`` preprocessing every feature x becomes
  :math:`(x - \mu) / \sigma` by the mean and the standard deviation of the
  training rows alone; a feature that is constant there is only centred. With
  ``'author'``, for the reproduction of the paper, every feature is so
  standardised, then scaled to [0, 1], both by the statistics of the whole set
  (which the test rows leak into), and a constant 1 is prepended; its split is
  ``train_share=0.6, validation_share=0``.

  Image sets by their tensorflow-datasets names have a test split of their own:
  ``validation_share`` is of their training split, and the split is the same for
  every seed. So it is for text, of which the first ``train_share`` is trained
  on, and the last part is for testing.

  Args:
    name: What :func:`gsgd_jax.sources.read` knows: ``'digits'``,
      ``'breast_cancer'``, ``'iris'``, ``'wine'``, a file, ``'openml:NAME'``;
      ``'tfds:NAME'``, see :func:`gsgd_jax.images.read`; with a ``context``, a
      text file.
    seed: Decides the split and the noise, an int of at least 0.
    target: The column of the classes, for CSV files and OpenML.
    preprocessing: ``'standard'`` or ``'author'``.
    train_share: Share of the examples to train on, in (0, 1).
    validation_share: Share to validate on, in [0, 1); 0 leaves no such split.
      The rest is for testing.
    label_noise: Share of the training labels, in [0, 1], that are flipped to
      another class, drawn at random; not of text, nor of what is streamed.
    context: Characters that a language model sees at once; the file is text.
    data_dir: Where tensorflow-datasets' sets are; None is its default.
    image_size: Side to which its images are resized, or None.
    stream: Whether its images are read as they are needed; None where they
      would take much of the memory.

  Returns:
    A ``Dataset``. Seeds share arrays that do not differ between them.

  Raises:
    ValueError: The data are unknown or malformed; a split is empty; the
      training rows hold one class only.
    OSError: The file, or a record, cannot be read.

  Examples:
    >>> from gsgd_jax import data
    >>> digits = data.load('digits', seed=0)
    >>> print(*(len(s.labels) for s in digits[2:5]), len(digits.classes))
    1078 359 360 10
  """
  settings.one_of('preprocessing', preprocessing, _PREPROCESSING)
  if not 0 <= label_noise <= 1:
    raise ValueError(f'label_noise must be from 0 to 1, got {label_noise}')
  by_name = name.startswith(images.PREFIX)
  for kind, is_one, given in (
    (
      'tables',
      context is None and not by_name,
      dict(target=target, preprocessing=preprocessing != 'standard' or None),
    ),
    (
      'image sets by name, tfds:NAME',
      by_name,
      dict(data_dir=data_dir, image_size=image_size, stream=stream),
    ),
  ):
    for setting, value in given.items():
      if value is not None and not is_one:
        raise ValueError(f'{setting} is of {kind}, and {name} is none')
  if context is not None:
    if label_noise:
      raise ValueError(f'label_noise is of labels, and {name} is read as text')
    return _text(name, context, train_share, validation_share)
  if by_name:
    dataset = _images(name, validation_share, data_dir, image_size, stream)
    if not label_noise:
      return dataset
    if dataset.stream is not None:
      raise ValueError(f'label_noise is not for streamed sets such as {name}')
    train = _noisy(dataset.train, len(dataset.classes), label_noise, seed)
    return dataset._replace(train=train)
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
  part = lambda rows: Examples(inputs[rows], source.labels[rows])
  train, test = part(rows[0]), part(rows[2])
  validation = part(rows[1]) if len(rows[1]) else None
  if len(np.unique(train.labels)) < 2:
    raise ValueError(
      f'the {len(rows[0])} training examples of {name}, seed {seed}, are all '
      'of one class; give more data or a larger train_share'
    )
  shape = sources.IMAGES.get(name, inputs.shape[1:])
  if preprocessing == 'author':  # A constant 1 is no pixel.
    shape = inputs.shape[1:]
  train = _noisy(train, len(source.classes), label_noise, seed)
  return Dataset(name, source.classes, train, validation, test, shape)


@functools.cache
def _text(name, context, train_share, validation_share):
  """Text in one piece, cut where the shares end."""
  tokens, classes = sources.read_text(name)
  # Views of the tokens, which stay in memory once.
  splits = _split(name, tokens, train_share, validation_share)
  for part, split in zip(_PARTS, splits, strict=True):
    if len(split) <= context and (part != 'validation' or len(split)):
      raise ValueError(
        f'{name} is too short: its {len(tokens):,} characters leave '
        f'{len(split):,} for {part}, and context={context} needs '
        f'{context + 1:,}; give a longer text or a smaller context'
      )
  train, validation, test = map(Text, splits)
  if not len(validation.tokens):
    validation = None
  return Dataset(name, classes, train, validation, test, (context,))


@functools.cache
def _images(name, validation_share, data_dir, image_size, stream):
  """An image set; of what is streamed, samples are held in memory.

  What is held is kept here, once: seeds and calls share it.
  """
  read = images.read(name, data_dir, image_size=image_size, stream=stream)
  order = np.random.default_rng(_SPLIT).permutation(read.train.examples)
  rows = _split(name, order, 1 - validation_share, validation_share, test=False)
  stream = None
  if isinstance(read.train, images.Streamed):
    stream = read.train.part(rows[0])
  test = _held(read.test)
  train = _held(read.train, rows[0])
  validation = _held(read.train, rows[1]) if len(rows[1]) else None
  return Dataset(
    name,
    read.classes,
    train,
    validation,
    test,
    read.shape,
    (read.mean, read.deviation),
    stream,
  )


def _held(split: images.Images | images.Streamed, rows=None):
  """Examples of a split, or of some rows; of what is streamed a sample."""
  if isinstance(split, images.Streamed):
    rows = range(split.examples) if rows is None else rows
    return Examples(*split.read(rows[:_SAMPLE]))
  return Examples(*(split if rows is None else split.gather(rows)))


_PARTS = ('training', 'validation', 'testing')


def _split(name, whole, train_share, validation_share, test=True):
  """Cuts an array, of rows or of tokens, where the shares end."""
  # A share such as 0.29 of 100 is 28.999999999999996 in floating point.
  count = lambda share: int(share * len(whole) + 1e-9)
  ends = np.cumsum([count(train_share), count(validation_share)])
  parts = np.split(whole, ends)
  wanted = (True, validation_share > 0, test)
  for split, part, want in zip(parts, _PARTS, wanted, strict=True):
    if want and not len(split):
      raise ValueError(
        f'the {len(whole)} examples of {name} leave none for {part} '
        f'(train_share={train_share:g}, validation_share={validation_share:g})'
      )
  return parts


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
