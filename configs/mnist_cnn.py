"""MNIST by a small convolutional network, 16 asynchronous workers.

  tfds build mnist --file_format=array_record  # Once; needs TensorFlow.
  python train.py --config=configs/mnist_cnn.py

Two convolutions of 32 and 64 channels, batches of 64, 5 epochs; a tenth of the
training images is for validation. One rate for all methods and tuned for none.

Time and result: not yet measured.
"""

import ml_collections

from gsgd_jax import settings


def get_config() -> ml_collections.ConfigDict:
  config = settings.default_config()
  config.dataset = 'tfds:mnist'
  config.validation_share = 0.1
  config.model = 'cnn_small'
  config.batch_size = 64
  config.learning_rate = 0.05
  config.epochs = 5.0
  config.evaluate_epochs = 0.5
  config.seeds = 3
  return config
