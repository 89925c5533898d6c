"""64 equal machines whose task times vary a little.

  python train.py --config=configs/homogeneous_cluster.py

Digits, an MLP 64-64-10, batches of 16, 64 asynchronous workers with gamma task
times (variation 0.1), at a learning rate at which the delay shows. Replays are
taken by the server itself: on the clock they cost a unit each. One rate for all
methods and tuned for none, so this shows what a cluster does and ranks nothing.

Time: 26 seconds on 2 CPU cores. Test accuracy, %, with 95 % intervals:
sequential and data-parallel 96.53 ± 1.04, asynchronous 94.47 ± 1.41, guided
96.56 ± 0.81, random replays 96.64 ± 0.82. Simulated time: 1,664, 289.6, 26.4,
687.1, 684.9.
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
  config.learning_rate = 0.045
  config.updates = 1664  # 26 rounds of all workers.
  config.evaluate_every = 104
  return config
