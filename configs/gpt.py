"""A small GPT on the characters of a text, its gradients late.

  python train.py --config=configs/gpt.py:adamw --config.dataset=FILE
  python train.py --config=configs/gpt.py:muon --config.dataset=FILE \
    --config.delay=16

Any text file in UTF-8: 60 % of it to train on, then 20 % for validation and
20 % for testing. 1.0 million parameters, 128 characters of context, batches of
8 windows, 5 blocks of width 128; AdamW or Muon (of matrices inside of blocks;
Adam for all else), a warm-up of 50 updates, then a cosine. Delays of 0, 1, 4
and 16 updates are those of the literature on pipelines; 4 where none is given.
Without guidance, guided by free scores, and with random replays.

Time and result: TO BE MEASURED.
"""

import ml_collections

from gsgd_jax import settings

RATES = {'adamw': 5e-4, 'muon': 5e-3}


def get_config(optimizer: str = 'adamw') -> ml_collections.ConfigDict:
  settings.one_of('what follows the config', optimizer, RATES)
  config = settings.default_config()
  config.model = 'gpt'
  config.methods = ('delayed', 'delayed+consistent', 'delayed+random')
  config.delay = 4
  config.optimizer = optimizer
  config.learning_rate = RATES[optimizer]
  config.schedule = 'cosine_decay'
  config.warmup = 50
  config.batch_size = 8
  config.updates = 300
  config.evaluate_every = 100
  config.seeds = 1
  config.revisit = 0
  config.verification = False
  return config
