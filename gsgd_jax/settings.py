"""The settings of an experiment: what they are, and what they may be."""

import difflib
import math
import numbers
from collections.abc import Iterable

import ml_collections
from ml_collections import config_dict

_LARGEST = 3.4e38  # Of float32.


def default_config() -> ml_collections.ConfigDict:
  """Every setting, with a default; the base of an experiment's own config.

  Returns:
    An unlocked ``ConfigDict``.

  Examples:
    >>> from gsgd_jax import settings
    >>> config = settings.default_config()
    >>> config.dataset = 'iris'
    >>> config.optimizer_kwargs.momentum = 0.9
    >>> print(config.dataset, config.workers)
    iris 16
  """
  config = ml_collections.ConfigDict()
  # Data. dataset: digits, breast_cancer, iris, wine, a file, or openml:NAME.
  config.dataset = 'digits'
  config.target = config_dict.placeholder(str)  # The column of the classes.
  config.preprocessing = 'standard'  # Or 'author'; see gsgd_jax.data.
  config.train_share = 0.6  # Of the examples;
  config.validation_share = 0.2  # the rest is for testing.
  config.label_noise = 0.0  # Share of training labels that are flipped.
  # Model.
  config.model = 'mlp'  # Or 'softmax_regression'.
  config.hidden = (64,)  # Units of each hidden layer.
  # Methods, side by side: each PARALLEL or PARALLEL+GUIDANCE, with PARALLEL
  # sequential, synchronous, asynchronous or delayed, and GUIDANCE consistent
  # (guided SGD), random, hardest, inconsistent or surprise (its controls).
  config.methods = (
    'sequential',
    'asynchronous',
    'asynchronous+consistent',
    'asynchronous+random',
  )
  config.parallel = config_dict.placeholder(str)  # One method alone, instead,
  config.guidance = config_dict.placeholder(str)  # and its guidance, if any.
  config.workers = 16
  config.delay = 15  # Of 'delayed', in updates.
  config.combine = 'sequential'  # Rounds of 'synchronous'; or 'mean'.
  # Optimizer: any of optax or optax.contrib by name, 'momentum', 'nesterov'.
  config.optimizer = 'sgd'
  config.optimizer_kwargs = ml_collections.ConfigDict()
  config.learning_rate = config_dict.placeholder(float)  # None: its default.
  config.learning_rate = 0.18
  config.schedule = 'constant'  # Any optax schedule, over the arrivals.
  config.schedule_kwargs = ml_collections.ConfigDict()
  config.warmup = 0  # Arrivals over which the rate rises, linearly.
  # The run.
  config.batch_size = 16
  config.seeds = 10  # Trained at once.
  config.updates = 1680  # Arriving gradients, replays aside.
  config.evaluate_every = 134  # Updates.
  config.patience = config_dict.placeholder(int)  # Evaluations; see README.
  # Guided SGD: window (the paper's delay tolerance), at most so many replays a
  # window (None is min(4, window // 2)), batches scored anew (None is all, the
  # paper's rule; 0 is free scoring), whether to draw a verification sample,
  # whether a replay applies the stored gradient once more.
  config.window = 10
  config.replays = config_dict.placeholder(int)
  config.revisit = config_dict.placeholder(int)
  config.verification = True
  config.average_scores = False
  config.stored_gradients = False
  # Watching.
  config.tensorboard = False  # Event files in the workdir.
  config.profile = False  # A jax.profiler trace of a few steps of each method.
  config.compilation_cache = config_dict.placeholder(str)  # A folder.
  return config


def nearest(given: object, known: Iterable[str]) -> str:
  """`'; did you mean X?'`, or nothing where no name is near.

  Examples:
    >>> from gsgd_jax import settings
    >>> settings.nearest('wokers', ['workers', 'window'])
    '; did you mean workers?'
  """
  given, known = str(given), list(known)
  close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
  if len(given) > 2:
    close += [name for name in known if name.startswith(given)]
  return f'; did you mean {close[0]}?' if close else ''


def one_of(name: str, given: object, known: Iterable[str]) -> None:
  """Raises a ValueError unless `given` is one of the known names."""
  known = sorted(known)
  if given not in known:
    raise ValueError(
      f'{name} must be one of {", ".join(known)}, got {given!r}'
      + nearest(given, known)
    )


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError that says which setting is wrong, if one is.

  Names, types and ranges; what depends on the data or on optax is checked
  where that is loaded.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      'get_config must return an ml_collections.ConfigDict, got '
      f'{type(config).__name__}'
    )
  _names(config)
  for name in ('dataset', 'preprocessing', 'model', 'combine', 'optimizer'):
    _text(config, name)
  _text(config, 'schedule')
  for name in ('target', 'parallel', 'guidance', 'compilation_cache'):
    _text(config, name, optional=True)
  for name in ('workers', 'batch_size', 'seeds', 'updates', 'evaluate_every'):
    _integer(config, name, 1)
  _integer(config, 'window', 1)
  _integer(config, 'delay', 0)
  _integer(config, 'warmup', 0)
  _integer(config, 'patience', 1, optional=True)
  _integer(config, 'replays', 0, optional=True)
  _integer(config, 'revisit', 0, optional=True)
  for name in ('verification', 'average_scores', 'stored_gradients'):
    _truth(config, name)
  _truth(config, 'tensorboard')
  _truth(config, 'profile')
  _number(config, 'train_share', 0, 1)
  _number(config, 'validation_share', 0, 1)
  _number(config, 'label_noise', 0, 1)
  _number(config, 'learning_rate', 0, _LARGEST, optional=True)
  one_of('model', config.model, ('mlp', 'softmax_regression'))
  one_of('preprocessing', config.preprocessing, ('standard', 'author'))
  one_of('combine', config.combine, ('sequential', 'mean'))
  _sequences(config)
  _between(config)


def _names(config):
  known = list(default_config())
  for name in config:
    if name not in known:
      raise ValueError(
        f'the config has no setting {name}{nearest(name, known)}'
      )
  for name in known:
    if name not in config:
      raise ValueError(f'the config lacks the setting {name}')


def _fail(config, name, wanted, optional):
  wanted += ' or None' if optional else ''
  raise ValueError(f'{name} must be {wanted}, got {_shown(config[name])}')


def _shown(value):
  """A value in one line."""
  shown = ' '.join(repr(value).split())
  return shown if len(shown) <= 60 else shown[:57] + '...'


def _text(config, name, optional=False):
  if optional and config[name] is None:
    return
  if not isinstance(config[name], str) or not config[name]:
    _fail(config, name, 'a name', optional)


def _truth(config, name):
  if not isinstance(config[name], bool):
    _fail(config, name, 'True or False', False)


def _integer(config, name, least, optional=False):
  if optional and config[name] is None:
    return
  given = config[name]
  if isinstance(given, bool) or not isinstance(given, numbers.Integral):
    _fail(config, name, 'an integer', optional)
  if given < least:
    _fail(config, name, f'at least {least}', optional)
  if given >= 2**31:
    _fail(config, name, 'below 2**31', optional)


def _number(config, name, least, most, optional=False):
  if optional and config[name] is None:
    return
  given = config[name]
  if isinstance(given, bool) or not isinstance(given, numbers.Real):
    _fail(config, name, 'a number', optional)
  if not least <= given <= most:  # Nor is NaN.
    wanted = 'finite and not negative'
    if most < _LARGEST:
      wanted = f'from {least} to {most}'
    _fail(config, name, wanted, optional)


def _sequences(config):
  for name in ('hidden', 'methods'):
    if not isinstance(config[name], (tuple, list)):
      _fail(config, name, 'a tuple', False)
  if len(config.hidden) > 100:
    raise ValueError(
      f'hidden must hold at most 100 layers, got {len(config.hidden)}'
    )
  if any(type(n) is not int or not 0 < n < 2**31 for n in config.hidden):
    raise ValueError(
      f'hidden must hold positive integers, got {tuple(config.hidden)}'
    )
  if any(not isinstance(m, str) for m in config.methods):
    raise ValueError(f'methods must hold names, got {tuple(config.methods)}')
  for name in ('optimizer_kwargs', 'schedule_kwargs'):
    if not isinstance(config[name], (ml_collections.ConfigDict, dict)):
      _fail(config, name, 'a dict of arguments', False)
    for argument, value in config[name].items():
      if not _is_plain(value):
        raise ValueError(
          f'{name}.{argument} must be a finite number, a name, True, False, '
          f'None, or a sequence of these, got {_shown(value)}'
        )


def _is_plain(value):
  """Whether JSON can say it, for `config.json`."""
  if isinstance(value, tuple | list):
    return all(map(_is_plain, value))
  if isinstance(value, ml_collections.ConfigDict | dict):
    return all(map(_is_plain, value.values()))
  if isinstance(value, numbers.Real):
    return math.isfinite(value)
  return value is None or isinstance(value, str)


def _between(config):
  """Settings that bound one another."""
  if config.replays is not None and config.replays > config.window:
    raise ValueError(
      f'replays must be from 0 to window={config.window}, got {config.replays}'
    )
  if not 0 < config.train_share < 1 - config.validation_share - 1e-9:
    raise ValueError(
      'train_share must be above 0 and leave something for testing, got '
      f'train_share={config.train_share:g} and '
      f'validation_share={config.validation_share:g}'
    )
  if config.patience is not None and not config.validation_share:
    raise ValueError(
      'patience stops by validation accuracy and needs validation_share above 0'
    )
  if config.guidance is not None and config.parallel is None:
    raise ValueError(
      'guidance belongs to parallel: set both, or write the method as '
      f'--config.methods=asynchronous+{_shown(config.guidance)[1:-1]}'
    )
  if config.warmup >= config.updates:
    raise ValueError(
      f'warmup must be less than updates={config.updates}, got {config.warmup}'
    )
  if config.stored_gradients and config.revisit:
    raise ValueError(
      'stored_gradients computes nothing, so revisit must be 0 with it, got '
      f'{config.revisit}'
    )
