"""Prepares scikit-learn's digits as an image set of tensorflow-datasets.

  python examples/prepare_digits.py --data_dir=prepared
  python train.py --config.dataset=tfds:digits --config.data_dir=prepared \
    --config.model=cnn_small

A builder of your own images looks like this one. The features are plain tensors
and the files array_record, so TensorFlow is not needed.

Exit codes: 0 done, 2 bad input (one sentence).
"""

import contextlib
import io
import pathlib
import sys
import warnings

import numpy as np
from absl import app, flags, logging

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
      import sklearn.datasets

      del dl_manager  # Nothing is downloaded.
      images, labels = sklearn.datasets.load_digits(return_X_y=True)
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


def _prepare(folder):
  """Prepares the set, unless that is done; returns its folder."""
  folder.mkdir(parents=True, exist_ok=True)
  import tensorflow_datasets as tfds

  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  with (
    contextlib.redirect_stdout(io.StringIO()),
    warnings.catch_warnings(action='ignore'),
  ):
    try:
      builder = _builder(tfds)(data_dir=str(folder), file_format='array_record')
    except Exception as e:  # Of any kind: files may hold anything.
      raise ValueError(f'{folder / "digits"} is damaged; delete it') from e
    builder.download_and_prepare()
  return builder.data_path


def main(argv):
  """Prepares the set, or says in a sentence why not."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    if not _DATA_DIR.value:
      raise ValueError('data_dir must name a folder, got an empty name')
    print(_prepare(pathlib.Path(_DATA_DIR.value).expanduser()))
  except ImportError as e:
    _fail(f"the package {e.name} is needed: pip install 'gsgd_jax[train]'")
  except OSError as e:
    _fail(f'{e.filename}: {e.strerror}' if e.filename else str(e))
  except ValueError as e:
    _fail(str(e))


def _fail(sentence):
  print(f'prepare_digits.py: {sentence.splitlines()[0]}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  app.run(main)
