"""Every compensation beside plain ASGD, on 64 even machines.

  python train.py --config=configs/compensations.py

Digits, an MLP 64-64-10, batches of 16, 64 asynchronous workers with gamma task
times (variation 0.1), at a rate that is too hot for plain ASGD. Those with
momentum have the nominal rate at which a gradient weighs in the end what it
does in plain SGD; nothing is tuned for any of them, so this shows what each
does at one hot rate and ranks nothing.

Time: 35 seconds on 2 CPU cores. Test accuracy, %, with 95 % intervals:
sequential 96.69 ± 0.92; asynchronous 50.83 ± 6.23; DC-ASGD 82.22 ± 6.01, exact
96.61 ± 0.96 (in 3,352 units of simulated time, all others in 26); by staleness
77.53 ± 2.91; Ringmaster 63.94 ± 11.00, Rennala 50.06 ± 4.81 (13 updates); DANA
95.31 ± 0.85, DANA-Slim 95.39 ± 0.84, DANA-DC 95.33 ± 0.87, SMEGA2 95.36 ± 0.84;
weight prediction (of plain SGD) 13.31 ± 4.41, spike compensation 48.72 ± 6.46,
adaptive braking 96.33 ± 0.78, asynchronous Nesterov 47.08 ± 6.35, delayed
Nesterov 95.14 ± 0.85.
"""

import ml_collections

from configs import delay
from gsgd_jax import settings

RATE = 0.06  # What a gradient weighs in the end, momentum or not.
WORKERS = 64
# Nominal rates of those that are optimizers: with momentum m a gradient weighs
# eta / (1 - m) in the end, with delayed Nesterov eta / (N (1 - m)).
MOMENTUM = 0.9
OWN_RATES = {
  **dict.fromkeys(delay.WITH_MOMENTUM, RATE * (1 - MOMENTUM)),
  'delayed_nesterov': RATE * WORKERS * (1 - MOMENTUM),
}


def get_config() -> ml_collections.ConfigDict:
  config = settings.default_config()
  config.methods = (
    'sequential',
    'asynchronous',
    *(f'asynchronous+{name}' for name in settings.COMPENSATIONS),
  )
  config.workers = WORKERS
  config.arrivals = 'gamma'
  config.learning_rate = RATE
  for name, rate in OWN_RATES.items():
    config.compensation_kwargs[name].learning_rate = rate
  config.updates = 1664  # 26 rounds of all workers.
  config.evaluate_every = 104
  return config
