"""Image sets of tensorflow-datasets: in memory, or streamed where too large.

The records are read as tensorflow-datasets prepared them, in its array_record
format, by `tfds.data_source`; TensorFlow is only needed to prepare them. In
memory or streamed, a step has the same batch: `batches.batch_rows` says which
of the training records it holds.
"""

import math
import os
from typing import NamedTuple

import numpy as np

from gsgd_jax import _machine, _prepared
from gsgd_jax._prepared import PREFIX, DamagedData
from gsgd_jax._streams import Images, Stream, Streamed

__all__ = [
  'PREFIX',
  'DamagedData',
  'ImageSet',
  'Images',
  'Stream',
  'Streamed',
  'memory_limit',
  'read',
]

MOST_SAMPLED = 2_000  # Images of a streamed set that give its mean.
_SAMPLE = 5  # What the generator of the sample is seeded with.


class ImageSet(NamedTuple):
  """An image classification set, in its official splits."""

  name: str
  shape: tuple[int, int, int]  # Height, width, channels.
  classes: tuple[str, ...]
  train: Images | Streamed
  test: Images | Streamed
  # Of x / 255 over the training images, a channel each, float32; where an image
  # set is streamed, over a fixed sample of `MOST_SAMPLED` of them. A deviation
  # that would be 0 is 1.
  mean: np.ndarray
  deviation: np.ndarray


def read(
  name: str,
  data_dir: str | os.PathLike | None = None,
  *,
  image_size: int | None = None,
  stream: bool | None = None,
) -> ImageSet:
  """Opens an image set, and reads it into memory where it fits.

  Args:
    name: ``'tfds:mnist'``, ``'tfds:cifar10'``, or any other image set with
      classes, as tensorflow-datasets names them: ``'tfds:NAME'``,
      ``'tfds:NAME/CONFIG'``, ``'tfds:NAME/CONFIG:VERSION'``. Without a version
      the newest that is prepared.
    data_dir: The folder that holds prepared sets. None: ``TFDS_DATA_DIR``, else
      ``~/tensorflow_datasets``.
    image_size: Side in pixels, at least 1, to which all images are resized;
      None: as they are stored.
    stream: Whether to read images when they are needed, rather than all of them
      now. None: where they take more bytes than :func:`memory_limit`.

  Returns:
    An ``ImageSet``; its test split is ``'test'``, or ``'validation'`` where
    there is none or its labels are withheld.

  Raises:
    ValueError: The set is unknown, not prepared, half prepared, not in the
      array_record format, without classes, or not of uint8 images; its images
      differ in size and ``image_size`` is None; a package is missing.
    OSError: ``data_dir`` is no folder, or cannot be read; a record is damaged
      (``DamagedData``).

  Examples:
    Images that are made up, as nothing is prepared here:

    >>> import tensorflow_datasets as tfds
    >>> from gsgd_jax import images
    >>> with tfds.testing.mock_data(num_examples=20):
    ...   clothes = images.read('tfds:fashion_mnist')
    >>> print(clothes.train.inputs.shape, clothes.classes[:2])
    (20, 28, 28, 1) ('T-shirt/top', 'Trouser')
  """
  if image_size is not None and image_size < 1:
    raise ValueError(f'image_size must be at least 1, got {image_size}')
  prepared = _prepared.open_set(name, data_dir)
  shape = _shape(prepared, image_size)
  classes = _classes(prepared, shape)
  positions = {c: i for i, c in enumerate(classes)}
  train, *tests = (
    Streamed(prepared, records, shape, positions)
    for records in (prepared.train, *prepared.tests)
  )
  # Labels that are withheld are -1.
  test = next((t for t in tests if t.labels_of([0])[0] >= 0), tests[0])
  if stream is None:
    examples = train.examples + test.examples
    stream = examples * math.prod(shape) > memory_limit()
  if stream:
    sample = np.random.default_rng(_SAMPLE).permutation(train.examples)
    statistics = _statistics(train.read(np.sort(sample[:MOST_SAMPLED])).inputs)
  else:
    train, test = (s.read(range(s.examples)) for s in (train, test))
    statistics = _statistics(train.inputs)
  names = _names(prepared, classes)
  return ImageSet(name, shape, names, train, test, *statistics)


def memory_limit() -> int:
  """Up to where a set of images is held in memory, and not streamed.

  Returns:
    Bytes: a quarter of the memory, or 2 GiB where nobody knows how much it is.
  """
  memory = _machine.memory()
  return 2**31 if memory is None else memory // 4


def _shape(prepared, image_size):
  import tensorflow_datasets as tfds

  name = prepared.name
  if prepared.keys is None:
    raise ValueError(
      f'{name} has no labels: it does not say which feature is the input and '
      'which the class, so it is no image classification set'
    )
  feature = prepared.features[prepared.keys[0]]
  array = isinstance(feature, tfds.features.Image | tfds.features.Tensor)
  if not array or len(feature.shape) not in (2, 3) or not _is_uint8(feature):
    raise ValueError(
      f'{name} is no set of images of 8 bits: its input {prepared.keys[0]} is '
      f'{_described(feature)}'
    )
  height, width, channels = (*feature.shape, 1)[:3]
  if image_size is not None:
    height = width = image_size
  elif height is None or width is None:
    raise ValueError(
      f'the images of {name} differ in size; give --config.image_size=SIDE'
    )
  return height, width, channels or 3


def _is_uint8(feature):
  return np.dtype(feature.np_dtype) == np.uint8


def _described(feature):
  shape, kind = getattr(feature, 'shape', None), type(feature).__name__
  if not isinstance(shape, tuple):
    return kind
  return f'{kind} of shape {shape} and type {np.dtype(feature.np_dtype).name}'


def _classes(prepared, shape):
  """The labels, in order: those of a ClassLabel, else of the training split."""
  import tensorflow_datasets as tfds

  name, feature = prepared.name, prepared.features[prepared.keys[1]]
  if not (
    isinstance(feature, tfds.features.Tensor)
    and feature.shape == ()
    # tfds says a tree of dtypes, a tensor has one.
    # pyrefly: ignore[no-matching-overload]
    and np.dtype(feature.np_dtype).kind in 'iub'
  ):
    raise ValueError(
      f'{name} has no labels that are classes: its target {prepared.keys[1]} '
      f'is {_described(feature)}'
    )
  if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes:
    if feature.num_classes < 2:
      raise ValueError(
        f'{name} holds one class only ({feature.int2str(0)}); classification '
        'needs two or more'
      )
    return range(feature.num_classes)
  train = Streamed(prepared, prepared.train, shape, {})
  classes = np.unique(train.labels_of(range(train.examples))).tolist()
  if not 2 <= len(classes) <= max(2, train.examples // 2):
    raise ValueError(
      f'{name} holds {len(classes)} different labels in {train.examples} '
      'training examples, which are no classes'
    )
  return classes


def _names(prepared, classes):
  feature = prepared.features[prepared.keys[1]]
  if getattr(feature, 'num_classes', None):
    return tuple(feature.int2str(c) for c in classes)
  return tuple(str(c) for c in classes)


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of x / 255 by channel, from counts of the 256 values."""
  values = np.arange(256) / 255
  mean, deviation = [], []
  for channel in range(images.shape[-1]):
    counts = sum(
      np.bincount(images[i : i + 1000, ..., channel].ravel(), minlength=256)
      for i in range(0, len(images), 1000)
    )
    mean.append(np.average(values, weights=counts))
    variance = np.average((values - mean[-1]) ** 2, weights=counts)
    deviation.append(np.sqrt(variance) if np.count_nonzero(counts) > 1 else 1)
  return np.array(mean, np.float32), np.array(deviation, np.float32)
