"""64 uneven machines: the fast ones deliver most of the gradients.

  python train.py --config=configs/heterogeneous_cluster.py

Digits, an MLP 64-64-10, batches of 16, 64 asynchronous workers with gamma task
times (variation 0.1) on machines whose means vary by 0.6, at a learning rate at
which the delay shows. Replays are taken by the server itself: on the clock they
cost a unit each. One rate for all methods and tuned for none: this shows what a
cluster does and ranks nothing.

Time: 26 seconds on 2 CPU cores. Test accuracy, %, with 95 % intervals:
sequential and data-parallel 97.00 ± 0.77, asynchronous 91.33 ± 6.02, guided
96.58 ± 0.90, random replays 96.58 ± 0.98. Simulated time: 1,664, 368.4, 16.6,
672.3, 673.8.
"""

import ml_collections

from gsgd_jax import settings


def get_config() -> ml_collections.ConfigDict:
  config = settings.default_config()
  config.methods = (
    'sequential',
    'data_parallel',
    'asynchronous',
    'asynchronous+consistent',
    'asynchronous+random',
  )
  config.workers = 64
  config.arrivals = 'gamma'
  config.machine_cv = 0.6
  config.learning_rate = 0.12
  config.updates = 1664  # 26 rounds of all workers.
  config.evaluate_every = 104
  return config
