"""When is asynchrony worth it, and when is guidance? The map.

  python train.py --config=configs/map.py --workdir=runs/map

The best method at equal simulated time, by what a synchronisation costs, how
uneven the machines are, and how many. Digits, an MLP 64-64-10, batches of 16,
as much time as mean workers take for 1,680 gradients. Each method's learning
rate is tuned for every square on the validation data of 8 splits, each family's
best method is chosen on them as well; test accuracy is of 10 other splits and
seeds.

Time: half an hour on 2 CPU cores. Asynchronous methods, guided or not, are
ahead in 75 of 96 squares, shown in 15; guided ones in 20, shown in none.
"""

import ml_collections

from configs import delay
from gsgd_jax import study

SYNC_COSTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
MACHINES = (0.0, 0.3, 0.6, 1.0)
WORKERS = (8, 16, 64)
SPLIT = (16, 64, 256, 512)  # Batches of data-parallel SGD.
FASTEST = {'a quarter': 4, 'half': 2, 'all': 1}
PUBLISHED = ('ASGD', 'Adaptive braking', 'Ringmaster', 'DANA')


def methods() -> dict[str, dict]:
  """Those that stand for their families."""
  known = delay.asynchronous()
  values = {name: known[name] for name in PUBLISHED}
  for name in ('ASGD', 'Adaptive braking'):
    for words in ('guided', 'random replays'):
      label = f'{name}, {words}'
      values[label] = known[label]
      values[f'{label}, seldom'] = known[label] | {'window': 32}
  for words, share in FASTEST.items():
    values[f'rounds of {words}'] = {
      'method': 'synchronous',
      'combine': 'mean',
      'wait_for': f'workers / {share}',
      'learning_rate': 0.4,
    }
  for size in SPLIT:
    values[f'batches of {size}, split'] = {
      'method': 'data_parallel',
      'split_batch_size': size,
      'learning_rate': 0.4,
    }
  return values


def get_config() -> ml_collections.ConfigDict:
  config = study.default_config()
  config.title = 'When is asynchrony worth it, and when is guidance?'
  config.description = ' '.join(__doc__.split('\n\n')[2].split())
  config.validation_share = 0.15
  config.updates = 1680
  config.evaluate_every = 420
  config.arrivals = 'gamma'
  config.budgets = ('time',)
  config.sync_costs = SYNC_COSTS
  config.seeds = 10
  config.axes['machines vary by'] = {
    f'{cv:g}': {'machine_cv': cv} for cv in MACHINES
  }
  config.axes.workers = {str(n): {'workers': n} for n in WORKERS}
  config.axes.method = methods()
  return config
