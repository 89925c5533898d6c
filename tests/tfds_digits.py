"""scikit-learn's digits and other small sets, prepared as tfds prepares sets.

Without TensorFlow: features are plain tensors, or images given as PNG files.
"""

import functools
import io
import warnings

import numpy as np

TRAIN = 1400  # Of the 1,797 digits; the others are for testing.


@functools.cache
def digits():
  """(inputs, labels): uint8 of shape (1797, 8, 8, 1), and int32."""
  import sklearn.datasets

  bunch = sklearn.datasets.load_digits()
  inputs = (bunch.images * 255 / 16).round().astype(np.uint8)[..., None]
  return inputs, bunch.target.astype(np.int32)


def prepare_digits(folder, name='digits', **changes):
  """Prepares digits in this folder; what `changes` can say, see `prepare`."""
  inputs, labels = digits()
  splits = {
    'train': (inputs[:TRAIN], labels[:TRAIN]),
    'test': (inputs[TRAIN:], labels[TRAIN:]),
  }
  return prepare(folder, name, splits, **changes)


def prepare(
  folder,
  name,
  splits,
  *,
  image=None,
  label=None,
  keys=('image', 'label'),
  png=False,
  shards=3,
  config=None,
  version='1.0.0',
):
  """Prepares a set as array_record.

  Args:
    folder: The data_dir.
    name: The set's name.
    splits: From their names to (inputs, labels).
    image: The input's feature; None: a tensor shaped as the first input.
    label: The target's feature; None: a ClassLabel of ten classes.
    keys: The supervised keys, or None.
    png: Whether the inputs are written as PNG files.
    shards: Files a split, where it has as many examples.
    config: The configuration's name, or None.
    version: The version's.

  Returns:
    The folder of the version.
  """
  import tensorflow_datasets as tfds

  shape = splits['train'][0][0].shape if 'train' in splits else ()
  features = {
    'image': image or tfds.features.Tensor(shape=shape, dtype=np.uint8),
    'label': label or tfds.features.ClassLabel(num_classes=10),
  }

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=keys,
      )

    def _split_generators(self, dl_manager):
      return {s: self._generate_examples(*xs) for s, xs in splits.items()}

    def _generate_examples(self, inputs, labels):
      for i, (x, y) in enumerate(zip(inputs, labels, strict=True)):
        yield i, {'image': _png(x) if png else x, 'label': y}

  Builder.name = name
  shards = min(shards, *(len(labels) for _, labels in splits.values()))
  with warnings.catch_warnings(action='ignore'):
    builder = Builder(data_dir=str(folder), file_format='array_record')
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(num_shards=shards)
    )
  return builder.data_path


def _png(pixels):
  from PIL import Image

  file = io.BytesIO()
  pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
  Image.fromarray(pixels).save(file, 'png')
  file.seek(0)
  return file
