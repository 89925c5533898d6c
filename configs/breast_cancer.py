"""The paper's data set, where a delay costs next to nothing.

  python train.py --config=configs/breast_cancer.py

Breast Cancer Wisconsin (Diagnostic), softmax regression, 10 asynchronous
workers, batches of 4, 50 epochs, as in Sharma (2021). The split is 60 % for
training, 20 % for validation, 20 % for testing.

Time: 20 seconds on 2 CPU cores. Test accuracy, %, with 95 % intervals:
sequential 96.17 ± 1.18, asynchronous 96.17 ± 1.35, guided 96.09 ± 1.22, random
replays 96.26 ± 1.17.
"""

import ml_collections

from gsgd_jax import settings


def get_config() -> ml_collections.ConfigDict:
  config = settings.default_config()
  config.dataset = 'breast_cancer'
  config.model = 'softmax_regression'
  config.batch_size = 4
  config.workers = 10
  config.learning_rate = 0.1
  config.updates = 4250  # 50 epochs.
  config.evaluate_every = 85  # One epoch.
  return config
