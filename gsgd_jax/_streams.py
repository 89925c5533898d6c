"""Images of one split: in memory, or read when they are needed."""

import concurrent.futures
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gsgd_jax import _prepared, batches

_CHUNK = 64  # Images that a thread decodes in turn.
_BUFFER = 2**27  # Bytes of images that a stream reads ahead.


Numbers = Sequence[int] | np.ndarray


class Images(NamedTuple):
  """Images in memory."""

  inputs: np.ndarray  # shape=(n, height, width, channels), uint8, read-only.
  labels: np.ndarray  # shape=(n,), int32: positions in the classes.

  @property
  def examples(self) -> int:
    """How many there are."""
    return len(self.labels)

  def gather(self, rows: Numbers) -> 'Images':
    """Those of these numbers."""
    return Images(self.inputs[rows], self.labels[rows])


class Streamed:
  """Images that are read, decoded and resized when they are needed."""

  def __init__(
    self,
    prepared: _prepared.Prepared,
    records: Sequence[dict],
    shape: tuple[int, int, int],
    positions: dict[int, int],
    rows: Numbers | None = None,
  ) -> None:
    """See :func:`read`, which makes them."""
    self.name: str = prepared.name
    self.shape: tuple[int, int, int] = shape
    self._prepared = prepared
    self._records = records
    self._positions = positions  # Of labels, among the classes.
    self._rows = range(len(records)) if rows is None else rows

  @property
  def examples(self) -> int:
    """How many there are."""
    return len(self._rows)

  def part(self, rows: Numbers) -> 'Streamed':
    """Those of these numbers, which are numbered anew."""
    rows = np.asarray(self._rows)[np.asarray(rows)]
    return Streamed(
      self._prepared, self._records, self.shape, self._positions, rows
    )

  def gather(self, rows: Numbers) -> Images:
    """Reads those of these numbers."""
    images = _empty((len(rows),), self.shape)
    for i, row in enumerate(rows):
      self._decode(int(self._rows[row]), images, i)
    return images

  def read(self, rows: Numbers) -> Images:
    """As `gather`, in several threads and with a progress bar: for many."""
    images = _empty((len(rows),), self.shape)
    self._in_threads(rows, lambda i, row: self._decode(row, images, i))
    for array in images:
      array.flags.writeable = False
    return images

  def labels_of(self, rows: Numbers) -> np.ndarray:
    """The labels of some as they are stored, int64."""
    labels = np.empty(len(rows), np.int64)

    def put(i, row):
      labels[i] = self._record(row)[1]

    self._in_threads(rows, put)
    return labels

  def _in_threads(self, rows, do):
    """`do(i, record)` for all i, the number of the record of `rows[i]`."""
    import tqdm

    def do_some(start):
      stop = min(start + _CHUNK, len(rows))
      for i in range(start, stop):
        do(i, int(self._rows[rows[i]]))
      return stop - start

    bar = tqdm.tqdm(
      total=len(rows),
      desc=self.name,
      unit=' images',
      disable=None,
      delay=3,
      leave=False,
    )
    with bar, concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
      for done in pool.map(do_some, range(0, len(rows), _CHUNK)):
        bar.update(done)

  def batches(self, batch_size: int, seed: int) -> 'Stream':
    """Batches that are read ahead in threads.

    Args:
      batch_size: From 1 to `examples`.
      seed: An int of at least 0.

    Returns:
      A ``Stream``, whose batch of a step holds those of the numbers
      ``batches.batch_rows(examples, batch_size, seed, step)``.

    Raises:
      ValueError: `batch_size` is out of range.
    """
    return Stream(self, batch_size, seed)

  def _record(self, row):
    try:
      example = self._records[row]
    except Exception as e:  # Of any kind: files may hold anything.
      what = self._prepared.broken(e, f'record {row}: ')
      raise _prepared.DamagedData(what) from e
    assert self._prepared.keys is not None  # It has labels; see `images`.
    return tuple(example[key] for key in self._prepared.keys)

  def _decode(self, row, images, i):
    """Puts a record in its place."""
    image, label = self._record(row)
    height, width, channels = self.shape
    image = np.atleast_3d(image)
    if image.shape[-1] == 4 and channels == 3:
      image = image[..., :3]  # Without the transparency.
    if image.shape[-1] not in (1, channels):
      raise _prepared.DamagedData(
        f'record {row} of {self.name} has an image of {image.shape[-1]} '
        f'channels rather than {channels}'
      )
    if image.shape[:2] != (height, width):
      image = _resized(image, height, width)
    if int(label) not in self._positions:
      raise _prepared.DamagedData(
        f'record {row} of {self.name} is of class {int(label)}, which is none '
        f'of the {len(self._positions)} classes to train on'
      )
    images.inputs[i] = image
    images.labels[i] = self._positions[int(label)]


class Stream:
  """Batches as a function of the seed and the step, read ahead in threads."""

  def __init__(self, images: Streamed, batch_size: int, seed: int) -> None:
    """See :meth:`Streamed.batches`, which makes them."""
    import grain

    n = images.examples
    if not 1 <= batch_size <= n:
      raise ValueError(
        f'batch_size must be from 1 to {n}, the number of training examples, '
        f'got {batch_size}'
      )
    self._shape = (batch_size,), images.shape
    size = batch_size * math.prod(images.shape)
    options = grain.ReadOptions(
      num_threads=_threads(),
      prefetch_buffer_size=max(1, min(2 * _threads(), _BUFFER // size)),
    )
    source = _Batches(images, batch_size, seed)
    batches = grain.MapDataset.source(source).to_iter_dataset(options)
    self._iterator: Any = iter(batches)  # It takes the source for a tuple.

  def take(self, first_step: int, length: int) -> Images:
    """The batches of some steps, the fastest where they follow on.

    Args:
      first_step: From 0.
      length: How many steps, at least 1.

    Returns:
      ``Images`` whose inputs are of shape ``(length, batch_size, height,
      width, channels)`` and whose labels are ``(length, batch_size)``.

    Raises:
      DamagedData: A record cannot be read.
    """
    if first_step != self.position()['next_index']:
      self.restore({'next_index': first_step})
    (batch_size,), shape = self._shape
    taken = _empty((length, batch_size), shape)
    try:
      for i in range(length):
        taken.inputs[i], taken.labels[i] = next(self._iterator)
    except BaseException:  # It has lost a batch without counting it.
      self.restore({'next_index': first_step})
      raise
    return taken

  def position(self) -> dict[str, int]:
    """Where the stream is: what JSON can say, and `restore` takes."""
    return self._iterator.get_state()

  def restore(self, position: dict[str, int]) -> None:
    """Goes on where another stream was, of the same rows, size and seed."""
    self._iterator.set_state(position)

  def close(self) -> None:
    """Stops reading ahead."""
    self._iterator.close()


class _Batches(NamedTuple):
  """What grain reads: a batch for each step."""

  images: Streamed
  batch_size: int
  seed: int

  def __len__(self):
    return 2**31

  def __getitem__(self, step):
    n = self.images.examples
    rows = batches.batch_rows(n, self.batch_size, self.seed, step)
    return tuple(self.images.gather(rows))


def _empty(leading, shape):
  return Images(
    np.empty((*leading, *shape), np.uint8), np.empty(leading, np.int32)
  )


def _threads():
  return min(8, os.cpu_count() or 1)


def _resized(image, height, width):
  from PIL import Image

  def resize(pixels):
    bilinear = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((width, height), bilinear))

  if image.shape[-1] == 3:
    return resize(image)
  return np.stack(
    [resize(channel) for channel in np.moveaxis(image, -1, 0)], -1
  )
