"""A small GPT on the characters of a text, its gradients late.

  python train.py --config=configs/gpt.py:adamw --config.dataset=FILE
  python train.py --config=configs/gpt.py:muon --config.dataset=FILE \
    --config.delay=16

Any text file in UTF-8: 60 % of it to train on, then 20 % for validation and
20 % for testing. 1.0 million parameters, 128 characters of context, batches of
8 windows, 5 blocks of width 128; AdamW or Muon (of matrices inside of blocks;
Adam for all else), a warm-up of 50 updates, then a cosine. Delays to compare
are 0, 1, 4 and 16 updates; 1 where none is given. Without a delay, with it,
guided by free scores, and with random replays. A run as short as this shows how
a delay holds training up; for what a model can learn give more updates.

Time of the first line: 3 minutes on 2 CPU cores. Test loss, nats a character,
on the text that examples/write_text.py writes (one seed, rates not tuned), at a
delay of 1: sequential 1.45, delayed 1.83, guided 1.70, random replays 1.71. At
delays of 4 and 16, and with Muon: not yet measured.
"""

import ml_collections

from gsgd_jax import settings

RATES = {'adamw': 1e-3, 'muon': 5e-3}


def get_config(optimizer: str = 'adamw') -> ml_collections.ConfigDict:
  settings.one_of('what follows the config', optimizer, RATES)
  config = settings.default_config()
  config.model = 'gpt'
  config.methods = (
    'sequential',
    'delayed',
    'delayed+consistent',
    'delayed+random',
  )
  config.delay = 1
  config.optimizer = optimizer
  config.learning_rate = RATES[optimizer]
  if optimizer == 'adamw':
    config.optimizer_kwargs.b2 = 0.95
  config.schedule = 'cosine_decay'
  config.warmup = 50
  config.batch_size = 8
  config.updates = 240
  config.evaluate_every = 60
  config.seeds = 1
  config.revisit = 0
  config.verification = False
  return config
