"""What delay costs, and what each method wins back: the delay study.

  python train.py --config=configs/delay.py --workdir=runs/delay

Digits (scikit-learn's 1,797 images), an MLP 64-64-10, batches of 16, as many
gradients as 1,680 updates of plain SGD take, on 8 to 64 asynchronous workers,
even ones and uneven ones. Every compensation, alone, guided, and with the
controls of guidance; synchronous and data-parallel SGD beside them. Learning
rates are tuned for each method, cluster and budget on the validation data of 8
splits; test accuracy is of 32 other splits and seeds. One test example is 0.22
points, so every seed has a split of its own: 60 % for training, 15 % for
validation, 25 % for testing.

What was chosen here is confirmed by ``delay.py:fresh`` with other seeds, by
``delay.py:tables`` on other data (and on files, by ``--config.datasets``), by
``delay.py:cnn`` with a CNN, and by ``delay.py:gpt`` with a small GPT:

  python examples/write_text.py > text.txt
  python train.py --config=configs/delay.py:gpt --config.dataset=text.txt \\
    --workdir=runs/gpt

Time: an hour on 2 CPU cores, with ``--config.only=workers=64`` 25 minutes;
fresh seeds 6, tables 5, the CNN 7, the GPT 30. Test accuracy at equal gradient
evaluations, 64 even workers, %: sequential 97.21 ± 0.29, ASGD 96.44 ± 0.36,
adaptive braking 96.83 ± 0.31, guided ASGD 97.00 ± 0.39, with random replays
97.03 ± 0.30. docs/evidence.md has all of it.
"""

import re

import ml_collections

from gsgd_jax import settings, study

WORKERS = (8, 16, 32, 64)
RATE = 0.05  # Where tuning begins, by what a gradient weighs in the end.
MOMENTUM = 0.9
# Those whose nominal rate is less: with momentum m a gradient weighs
# eta / (1 - m) in the end.
WITH_MOMENTUM = (
  'dana',
  'dana_slim',
  'dana_dc',
  'smega2',
  'spike_compensation',
  'adaptive_braking',
)
GUIDANCE = {
  'guided': 'consistent',
  'random replays': 'random',
  'inconsistent replays': 'inconsistent',
}
# Free scoring; one replay every fourth update, of which every worker takes a
# share, and whose step is as much larger as it is fresher.
GUIDED = {
  'window': 4,
  'replays': 1,
  'revisit': 0,
  'verification': False,
  'replay_step': 'workers / 8',
}
# The rule of the paper: all batches of the window are scored anew.
EXACT = {'window': 10, 'replays': 4}
PARALLEL = {  # As many workers take a window's replays at once.
  'window': 64,
  'replays': 8,
  'replay_step': 'workers / 32',
  'replay_model': 'parallel',
}
STORED = {
  'stored_gradients': True,
  'window': 16,
  'replays': 4,
  'replay_step': None,
}


def asynchronous() -> dict[str, dict]:
  """Every compensation, alone and with guidance and its controls."""
  values = {}
  for name in (None, *settings.COMPENSATIONS):
    label = 'ASGD' if name is None else settings.COMPENSATIONS[name]
    label = label[0].upper() + label[1:]
    method = 'asynchronous' if name is None else f'asynchronous+{name}'
    own = {'method': method, 'learning_rate': RATE}
    if name in WITH_MOMENTUM:
      own['learning_rate'] = RATE * (1 - MOMENTUM)
    values[label] = own
    values |= guided(label, own, GUIDED)
  return values


def guided(label: str, own: dict, how: dict) -> dict[str, dict]:
  """A method with guidance, and with the controls of guidance."""
  return {
    f'{label}, {words}': own | how | {'method': f'{own["method"]}+{select}'}
    for words, select in GUIDANCE.items()
  }


def other_guidance() -> dict[str, dict]:
  """The paper's rule, and replays that cost no time: of stored gradients."""
  sgd = {'method': 'asynchronous', 'learning_rate': RATE}
  braking = {
    'method': 'asynchronous+adaptive_braking',
    'learning_rate': RATE * (1 - MOMENTUM),
  }
  dana = braking | {'method': 'asynchronous+dana'}
  return {
    **guided('ASGD, exact', sgd, EXACT),
    **guided('DANA, exact', dana, EXACT),
    **guided('ASGD, parallel', sgd, GUIDED | PARALLEL),
    **guided('Adaptive braking, stored', braking, GUIDED | STORED),
  }


def synchronous() -> dict[str, dict]:
  """Rounds of the fastest workers, and batches that all workers split."""
  values = {}
  for label, optimizer in {'SGD': 'sgd', 'Nesterov': 'nesterov'}.items():
    own = {'optimizer': optimizer, 'learning_rate': 0.4}
    for words, share in {'a quarter': 4, 'all': 1}.items():
      values[f'Rounds of {words}, {label}'] = own | {
        'method': 'synchronous',
        'combine': 'mean',
        'wait_for': f'workers / {share}',
      }
    for size in (16, 64, 256):
      values[f'Batches of {size} split, {label}'] = own | {
        'method': 'data_parallel',
        'split_batch_size': size,
      }
  return values


# A part of the study that is like the whole, for `benchmarks/study.py`.
PART = (
  'cluster=homogeneous,workers=16|64,method=sequential|ASGD|ASGD, guided|DANA|'
  'DANA, guided|Rounds of all, SGD'
)
# Methods that are confirmed on other data, and from where they are chosen.
CONFIRMED = ('sequential', 'ASGD', 'Adaptive braking', 'DANA-DC')
ALSO_FRESH = ('Rounds of a quarter, SGD', 'Batches of 64 split, SGD')
DATA = ('digits', 'fresh', 'tables', 'cnn', 'gpt')


def get_config(data: str = 'digits') -> ml_collections.ConfigDict:
  config = study.default_config()
  config.title = 'What delay costs, and what each method wins back'
  config.description = ' '.join(__doc__.split('\n\n')[2].split())
  config.validation_share = 0.15
  config.updates = 1680
  config.evaluate_every = 84
  config.arrivals = 'gamma'
  config.axes.cluster = {
    'homogeneous': {'machine_cv': 0.0},
    'heterogeneous': {'machine_cv': 0.6},
  }
  config.axes.workers = {str(n): {'workers': n} for n in WORKERS}
  config.axes.method = {
    'sequential': {'method': 'sequential', 'learning_rate': RATE},
    **asynchronous(),
    **other_guidance(),
    **synchronous(),
  }
  settings.one_of('what follows the config', data, DATA)
  return config if data == 'digits' else _confirming(config, data)


def _confirming(config, data):
  """The methods that matter, where nothing was chosen but learning rates."""
  config.title += ': confirmed'
  config.description = (
    'What was chosen on digits with an MLP, confirmed with other seeds, data '
    'or models: nothing but learning rates is chosen here.'
  )
  config.axes.workers = {'64': {'workers': 64}}
  config.axes.method = {
    label: own
    for label, own in config.axes.method.items()
    if _confirmed(label, data)
  }
  if data == 'fresh':
    config.first_seed = 1000
    return config
  if data == 'tables':
    config.datasets = 'breast_cancer,wine,iris'
    config.batch_size = 4
    return config
  del config.axes['cluster']
  if data == 'cnn':
    config.model, config.updates, config.seeds = 'cnn_small', 560, 16
    config.lanes, config.tuning_seeds = 8, 4
    config.budgets = ('gradients',)
    return config
  config.model, config.updates, config.seeds = 'gpt', 480, 12
  config.layers, config.width, config.context = 2, 64, 64
  config.batch_size, config.clip_norm = 8, 1.0
  config.evaluate_every = 240
  config.lanes, config.tuning_seeds = 6, 2
  config.axes.workers = {'16': {'workers': 16}}
  config.axes.method = _by_adamw(config.axes.method)
  return config


def _confirmed(label, data):
  """Whether a method is among those that matter."""
  if data == 'fresh' and label in ALSO_FRESH:
    return True
  if data != 'fresh' and re.search(', (exact|stored|parallel)', label):
    return False
  return label.partition(',')[0] in CONFIRMED


def _by_adamw(methods):
  """Those that do not bring an optimizer of their own, and replay by it."""
  adamw = {'optimizer': 'adamw', 'learning_rate': 0.003, 'replay_step': None}
  return {
    label: own | adamw
    for label, own in methods.items()
    if label.partition(',')[0] in ('sequential', 'ASGD')
  }
