"""How the preset was chosen: how often replays are taken, at which step.

  python train.py --config=configs/preset.py --workdir=runs/preset

The delay study's task on 16 and 64 workers, even and uneven ones. ASGD, guided
by free scores: one batch of every window is replayed, by plain SGD, at a step
that is so many times the learning rate. Learning rates are tuned on the
validation data of 16 splits that no other study looks at; `gsgd_jax.guided_sgd`
is what is best on these data at equal gradient evaluations, in the mean of the
four clusters. The report's validation accuracies are what was chosen by; test
accuracy is measured as everywhere, and nothing was chosen by it.
"""

import ml_collections

from configs import delay

WINDOWS = (1, 2, 4, 8, 16)
SHARES = (4, 8, 16)  # Steps of workers / share.


def methods() -> dict[str, dict]:
  """Sequential SGD, ASGD, and ASGD guided in every way."""
  known = delay.asynchronous()
  values = {
    'sequential': {'method': 'sequential', 'learning_rate': delay.RATE},
    'ASGD': known['ASGD'],
  }
  for window in WINDOWS:
    for share in SHARES:
      how = {'window': window, 'replay_step': f'workers / {share}'}
      label = f'ASGD, guided, 1 in {window}, step N/{share}'
      values[label] = known['ASGD, guided'] | how
  return values


def get_config() -> ml_collections.ConfigDict:
  config = delay.get_config()
  config.title = 'How often replays are taken, and at which step'
  config.description = ' '.join(__doc__.split('\n\n')[2].split())
  config.budgets = ('gradients',)
  config.first_seed = 500
  config.tuning_seeds, config.seeds = 16, 8
  config.axes.workers = {str(n): {'workers': n} for n in (16, 64)}
  config.axes.method = methods()
  return config
