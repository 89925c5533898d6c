"""Prepares scikit-learn's digits as an image set of tensorflow-datasets.

  python examples/prepare_digits.py --data_dir=prepared
  python train.py --config.dataset=tfds:digits --config.data_dir=prepared \
    --config.model=cnn_small

A builder of your own images looks like this one. The features are plain tensors
and the files array_record, so TensorFlow is not needed.

Exit codes: 0 done, 2 bad input (one sentence).
"""

import pathlib
import sys
import warnings

import numpy as np
from absl import app, flags, logging
from sklearn import datasets

_DATA_DIR = flags.DEFINE_string('data_dir', 'prepared', 'Where sets are kept.')
_TRAIN = 1400  # Of 1,797; the others are for testing.


def _builder(tfds):
  class Digits(tfds.core.GeneratorBasedBuilder):
    """Images of 8 by 8 pixels, and which digit each is."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            'image': tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            'label': tfds.features.ClassLabel(num_classes=10),
          }
        ),
        supervised_keys=('image', 'label'),
      )

    def _split_generators(self, dl_manager):
      del dl_manager  # Nothing is downloaded.
      images, labels = datasets.load_digits(return_X_y=True)
      images = (images * 255 / 16).round().astype(np.uint8)
      images = images.reshape(-1, 8, 8, 1)
      return {
        'train': self._generate_examples(images[:_TRAIN], labels[:_TRAIN]),
        'test': self._generate_examples(images[_TRAIN:], labels[_TRAIN:]),
      }

    def _generate_examples(self, images, labels):
      for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield i, {'image': image, 'label': int(label)}

  return Digits


def main(argv):
  """Prepares the set, unless that is done."""
  import tensorflow_datasets as tfds

  if len(argv) > 1:
    print(
      f'prepare_digits.py: unexpected argument {argv[1]!r}', file=sys.stderr
    )
    sys.exit(2)
  folder = pathlib.Path(_DATA_DIR.value)
  if folder.exists() and not folder.is_dir():
    print(f'prepare_digits.py: {folder} is no folder', file=sys.stderr)
    sys.exit(2)
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  with warnings.catch_warnings(action='ignore'):
    builder = _builder(tfds)(data_dir=str(folder), file_format='array_record')
    builder.download_and_prepare()
  print(builder.data_path)


if __name__ == '__main__':
  app.run(main)
