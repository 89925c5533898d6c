"""CIFAR-10 by ResNet-20, as the literature on delay trains it.

  tfds build cifar10 --file_format=array_record  # Once; needs TensorFlow.
  python train.py --config=configs/cifar10_resnet20.py:16
  python train.py --config=configs/cifar10_resnet20.py:16,dana

The number is that of the workers (1, 8, 16, 32, 64 in the literature; 16 where
it is left out), what follows it a compensation, to be compared with the run
without one. Batches of 128, momentum 0.9,
weight decay 1e-4, 160 epochs, the rate of 0.1 multiplied by 0.1 at epochs 80
and 120; images padded by 4, cropped and mirrored (He et al. 2016). Workers that
are several begin at a rate of 0.1 / N, which rises over 5 epochs (Hakimi et al.
2019, arXiv:1907.11612). Norms are over groups of channels, not over batches.

Time and result: not yet measured.
"""

import ml_collections

from gsgd_jax import compensations, settings


def get_config(arguments: str = '16') -> ml_collections.ConfigDict:
  number, _, compensation = arguments.partition(',')
  if not number.isdecimal() or not int(number):
    raise ValueError(f'a number of workers should stand here, got {number!r}')
  if compensation:
    settings.one_of(
      'what follows the number', compensation, settings.COMPENSATIONS
    )
    if int(number) == 1:
      raise ValueError(
        f'one worker has no delay that {compensation} could mend'
      )
  workers = int(number)
  config = settings.default_config()
  config.dataset = 'tfds:cifar10'
  config.validation_share = 0.1
  config.augmentation = 'crop_and_flip'
  config.model = 'resnet20'
  config.workers = workers
  config.batch_size = 128
  config.weight_decay = 1e-4
  config.learning_rate = 0.1
  config.epochs = 160.0
  config.evaluate_epochs = 1.0
  config.drop_epochs = (80.0, 120.0)
  config.seeds = 1
  # Free scoring: re-scoring every window would cost as much as training.
  config.revisit = 0
  config.verification = False
  if workers == 1:
    config.methods = ('sequential',)
  else:
    what = f'asynchronous+{compensation}' if compensation else 'asynchronous'
    config.methods = (what, f'{what}+consistent', f'{what}+random')
    config.warmup_epochs = 5.0
    config.warmup_start = 1 / workers
  # Those that are optimizers have their own momentum.
  if compensation not in compensations.OPTIMIZERS:
    config.optimizer = 'momentum'
  return config
