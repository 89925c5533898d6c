"""The settings of an experiment: what they are, and what they may be."""

import difflib
import itertools
import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard

import ml_collections
from ml_collections import config_dict

_LARGEST = 3.4e38  # Of float32.
ARRIVALS = (
  'round_robin',
  'gamma',
  'uniform',
  'exponential',
  'speeds',
  'recorded',
)
# Compensations, and how they are called in tables and pictures.
COMPENSATIONS = {
  'delay_compensation': 'DC-ASGD',
  'exact_delay_compensation': 'exact DC',
  'scale_by_staleness': 'weighing by staleness',
  'adaptive_braking': 'adaptive braking',
  'spike_compensation': 'spike compensation',
  'drop_stale': 'Ringmaster',
  'rennala': 'Rennala',
  'dana': 'DANA',
  'dana_slim': 'DANA-Slim',
  'dana_dc': 'DANA-DC',
  'smega2': 'SMEGA2',
  'predict': 'weight prediction',
  'asynchronous_nesterov': 'asynchronous Nesterov',
  'delayed_nesterov': 'delayed Nesterov',
}
BY_DEPTH = 'by_depth'  # A delay.
MODELS = (
  'mlp',
  'softmax_regression',
  'cnn_small',
  'cnn_large',
  'resnet20',
  'gpt',
)
REPLAY_MODELS = ('serial', 'parallel', 'shared')


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
  # Data. dataset: digits, breast_cancer, iris, wine, a file, openml:NAME, or
  # tfds:NAME, an image set of tensorflow-datasets; of gpt, a text file.
  config.dataset = 'digits'
  config.target = config_dict.placeholder(str)  # The column of the classes.
  config.preprocessing = 'standard'  # Or 'author'; see gsgd_jax.data.
  config.train_share = 0.6  # Of the examples;
  config.validation_share = 0.2  # the rest is for testing.
  config.label_noise = 0.0  # Share of training labels that are flipped.
  # Of tfds:NAME. Where prepared sets are (None: where tensorflow-datasets looks
  # for them); the side to which images are resized; whether they are read as
  # they are needed (None: what takes much of the memory is); what is done to
  # training images at random: crop_and_flip (padded by 4, cropped, mirrored).
  config.data_dir = config_dict.placeholder(str)
  config.image_size = config_dict.placeholder(int)
  config.stream = config_dict.placeholder(bool)
  config.augmentation = config_dict.placeholder(str)
  # Examples of a split that large models are measured on at most, from all over
  # it; None is 10,000 images, 400 windows of text.
  config.measured = config_dict.placeholder(int)
  # Model: one of MODELS.
  config.model = 'mlp'
  config.hidden = (64,)  # Of mlp: units of each hidden layer.
  config.normalization = 'group'  # Of resnet20; or 'batch'.
  config.context = 128  # Of gpt: characters that it sees at once,
  config.layers = 5  # its blocks,
  config.heads = 4  # their attention heads,
  config.width = 128  # and features.
  config.dropout = 0.0  # Of gpt and the CNNs.
  config.dtype = 'float32'  # Of activations; or 'bfloat16'.
  # Methods, side by side: each PARALLEL[+COMPENSATION][+GUIDANCE], with
  # PARALLEL sequential, synchronous, asynchronous, delayed or data_parallel,
  # COMPENSATION as below, and GUIDANCE consistent (guided SGD), random,
  # hardest, inconsistent or surprise (its controls).
  config.methods = (
    'sequential',
    'asynchronous',
    'asynchronous+consistent',
    'asynchronous+random',
  )
  config.parallel = config_dict.placeholder(str)  # One method alone, instead,
  config.guidance = config_dict.placeholder(str)  # and its guidance, if any.
  # What methods with stale gradients do about them that name nothing else (one
  # of COMPENSATIONS; an unguided one is kept beside it), and its arguments:
  # numbers of workers and delays follow from the cluster, one argument is a
  # learning_rate of its own. With several compensations side by side write
  # compensation_kwargs.NAME.ARGUMENT.
  config.compensation = config_dict.placeholder(str)
  config.compensation_kwargs = ml_collections.ConfigDict(
    {name: {} for name in COMPENSATIONS}
  )
  config.workers = 16
  # Of 'delayed', in updates: a number, or by_depth, every layer its own. Then
  # the layers are the stages of a pipeline that learns from every batch at
  # once: stage s of S (0 is at the input) is 2 (S - 1 - s) updates late.
  config.delay = config_dict.FieldReference(15, field_type=object)
  config.combine = 'sequential'  # Rounds of 'synchronous'; or 'mean'.
  config.wait_for = config_dict.placeholder(int)  # Of a round, the m fastest.
  # The batch that 'data_parallel' splits over the workers; None is batch_size.
  config.split_batch_size = config_dict.placeholder(int)
  config.max_ahead = config_dict.placeholder(int)  # Of 'asynchronous': a bound.
  # Of 'asynchronous': gradients that come so soon overwrite one another.
  config.overwrite_within = config_dict.placeholder(float)
  # The cluster of workers, a new one for each seed; times are in mean gradient
  # computations. arrivals: round_robin, gamma, uniform, exponential, speeds or
  # recorded.
  config.arrivals = 'round_robin'
  config.cv = 0.1  # Of 'gamma': how much a machine's task times vary.
  config.spread = 0.5  # Of 'uniform': task times lie within 1 +- spread.
  config.machine_cv = (
    0.0  # Of these and 'exponential': how uneven machines are.
  )
  config.speeds = ()  # Of 'speeds': each worker's gradients a unit of time.
  config.trace = config_dict.placeholder(str)  # Of 'recorded': the file.
  config.trace_unit = config_dict.placeholder(float)  # None: measured in it.
  config.straggler = config_dict.placeholder(float)  # Worker 0: times as slow.
  config.fails_at = config_dict.placeholder(float)  # The last worker: a time.
  config.back_at = config_dict.placeholder(float)  # None: never.
  config.sync_cost = 0.1  # Of a round, a split batch, a shared replay.
  # Optimizer: any of optax or optax.contrib by name, 'momentum', 'nesterov'.
  # 'muon' takes the matrices inside a network, convolutions among them; Adam
  # takes embeddings, the output layer and what is no matrix.
  config.optimizer = 'sgd'
  config.optimizer_kwargs = ml_collections.ConfigDict()
  config.learning_rate = config_dict.placeholder(float)  # None: its default.
  config.learning_rate = 0.18
  config.schedule = 'constant'  # Any optax schedule, over the arrivals.
  config.schedule_kwargs = ml_collections.ConfigDict()
  config.warmup = 0  # Arrivals over which the rate rises, linearly,
  config.warmup_start = config_dict.placeholder(float)  # from this share of it.
  # (None is 1 / warmup.) At each of these arrivals the rate is multiplied by
  # drop_factor, on top of its schedule.
  config.drops = ()
  config.drop_factor = 0.1
  # L2 regularisation: so many times the parameters are added to a gradient,
  # after a compensation's correction and before any momentum. A decay that is
  # decoupled from the gradient is optimizer_kwargs.weight_decay, of adamw and
  # others that have it.
  config.weight_decay = 0.0
  # The norm, over all parameters, that a gradient is clipped to as it arrives,
  # before all else; None is any. Replays are clipped and decayed likewise.
  # Where momentum is the workers' own, in dana_slim, so are clipping and decay.
  config.clip_norm = config_dict.placeholder(float)
  # The run.
  config.batch_size = 16
  # A gradient is taken in so many pieces of its batch, one after another: the
  # same but for rounding, in less memory and a third more time. (But batch
  # normalisation then has the statistics of a piece.)
  config.accumulate = 1
  config.seeds = 10  # Trained at once.
  config.updates = 1680  # Arriving gradients, replays aside.
  config.evaluate_every = 134  # Updates.
  # The same in epochs, passes of batch_size over the training examples that
  # drop what is left over. What is given here is put in place of updates,
  # evaluate_every, warmup and drops; see experiment.resolved.
  config.epochs = config_dict.placeholder(float)
  config.evaluate_epochs = config_dict.placeholder(float)
  config.warmup_epochs = 0.0
  config.drop_epochs = ()  # Such as 80,120.
  config.patience = config_dict.placeholder(int)  # See docs/training.md.
  # Guided SGD: window (the paper's delay tolerance), at most so many replays a
  # window (None is min(4, window // 2)), who takes them (serial: the server,
  # parallel: as many workers, shared: all together), batches scored anew (None
  # is all, the paper's rule; 0 is free scoring), whether to draw a verification
  # sample, whether a replay applies the stored gradient once more.
  config.window = 10
  config.replays = config_dict.placeholder(int)
  config.replay_model = 'serial'
  # Replays are steps of plain SGD, of so many times what an arriving gradient
  # weighs in the end (the learning rate, over 1 - momentum where there is one):
  # they are fresh, and stand larger steps. None: they go through the optimizer
  # (where momenta are the workers', in DANA and its kin, None is 1).
  config.replay_step = config_dict.placeholder(float)
  config.revisit = config_dict.placeholder(int)
  config.verification = True
  config.average_scores = False
  config.stored_gradients = False
  # Devices: all there are (None), or so many; of several hosts as many each.
  config.devices = config_dict.placeholder(int)
  # At most so many of the 'asynchronous' workers take gradients at once; each
  # needs a copy of the parameters meanwhile. None is all. One device takes one.
  config.round_size = config_dict.placeholder(int)
  # Several processes that train together: docs/devices.md. What is not given is
  # asked from the cluster, if it says it.
  config.distributed = False
  config.coordinator = config_dict.placeholder(str)  # HOST:PORT of process 0.
  config.processes = config_dict.placeholder(int)  # How many,
  config.process_id = config_dict.placeholder(int)  # and which one this is.
  # Checkpoints in the workdir: after so many minutes, or updates, or both; of
  # each method the last ones are kept (0: none are written).
  config.checkpoint_minutes = config_dict.placeholder(float)
  config.checkpoint_minutes = 1.0
  config.checkpoint_every = config_dict.placeholder(int)
  config.checkpoints = 2
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
  for name in ('schedule', 'arrivals', 'replay_model'):
    _text(config, name)
  for name in ('normalization', 'dtype'):
    _text(config, name)
  for name in ('data_dir', 'augmentation'):
    _text(config, name, optional=True)
  for name in ('target', 'parallel', 'guidance', 'compensation'):
    _text(config, name, optional=True)
  for name in ('compilation_cache', 'trace', 'coordinator'):
    _text(config, name, optional=True)
  for name in ('workers', 'batch_size', 'seeds', 'updates', 'evaluate_every'):
    _integer(config, name, 1)
  for name in ('context', 'layers', 'heads', 'width'):
    _integer(config, name, 1)
  _integer(config, 'image_size', 1, optional=True)
  _integer(config, 'measured', 1, optional=True)
  _integer(config, 'window', 1)
  _integer(config, 'accumulate', 1)
  if not isinstance(config.delay, str) or config.delay != BY_DEPTH:
    _integer(config, 'delay', 0, f'an integer or {BY_DEPTH}')
  _integer(config, 'warmup', 0)
  _integer(config, 'patience', 1, optional=True)
  _integer(config, 'replays', 0, optional=True)
  _integer(config, 'revisit', 0, optional=True)
  _integer(config, 'wait_for', 1, optional=True)
  _integer(config, 'split_batch_size', 1, optional=True)
  _integer(config, 'max_ahead', 0, optional=True)
  _integer(config, 'devices', 1, optional=True)
  _integer(config, 'processes', 1, optional=True)
  _integer(config, 'process_id', 0, optional=True)
  _integer(config, 'round_size', 1, optional=True)
  _integer(config, 'checkpoints', 0)
  _integer(config, 'checkpoint_every', 1, optional=True)
  for name in ('verification', 'average_scores', 'stored_gradients'):
    _truth(config, name)
  _truth(config, 'distributed')
  _truth(config, 'tensorboard')
  _truth(config, 'profile')
  _truth(config, 'stream', optional=True)
  _number(config, 'train_share', 0, 1)
  _number(config, 'validation_share', 0, 1)
  _number(config, 'label_noise', 0, 1)
  _number(config, 'dropout', 0, 1)
  _number(config, 'learning_rate', 0, _LARGEST, optional=True)
  for name in ('cv', 'machine_cv', 'sync_cost', 'weight_decay'):
    _number(config, name, 0, _LARGEST)
  _number(config, 'spread', 0, 1)
  for name in ('overwrite_within', 'trace_unit', 'fails_at', 'back_at'):
    _number(config, name, 0, _LARGEST, optional=True)
  for name in ('straggler', 'clip_norm', 'replay_step'):
    _number(config, name, 0, _LARGEST, optional=True)
  for name in ('epochs', 'evaluate_epochs'):
    _number(config, name, 0, _LARGEST, optional=True)
  _number(config, 'checkpoint_minutes', 0, _LARGEST, optional=True)
  _number(config, 'warmup_epochs', 0, _LARGEST)
  _number(config, 'warmup_start', 0, 1, optional=True)
  _number(config, 'drop_factor', 0, 1)
  one_of('model', config.model, MODELS)
  one_of('normalization', config.normalization, ('group', 'batch'))
  one_of('dtype', config.dtype, ('float32', 'bfloat16'))
  if config.augmentation is not None:
    one_of('augmentation', config.augmentation, ('crop_and_flip',))
  one_of('preprocessing', config.preprocessing, ('standard', 'author'))
  one_of('combine', config.combine, ('sequential', 'mean'))
  one_of('arrivals', config.arrivals, ARRIVALS)
  one_of('replay_model', config.replay_model, REPLAY_MODELS)
  _sequences(config)
  _between(config)
  _cluster(config)
  _hosts(config)


def check_lengths(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError unless warm-up and drops are within the run."""
  if config.warmup >= config.updates:
    raise ValueError(
      f'warmup must be less than updates={config.updates}, got {config.warmup}'
    )
  if config.drops and config.drops[-1] > config.updates:
    raise ValueError(
      f'drops must be at most updates={config.updates}, got '
      f'{tuple(config.drops)}'
    )


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


def _truth(config, name, optional=False):
  if optional and config[name] is None:
    return
  if not isinstance(config[name], bool):
    _fail(config, name, 'True or False', optional)


def _integer(config, name, least, wanted='an integer', optional=False):
  if optional and config[name] is None:
    return
  given = config[name]
  if not _is_integer(given):
    _fail(config, name, wanted, optional)
  if given < least:
    _fail(config, name, f'at least {least}', optional)
  if given >= 2**31:
    _fail(config, name, 'below 2**31', optional)


def _number(config, name, least, most, optional=False):
  if optional and config[name] is None:
    return
  given = config[name]
  if not is_real(given):
    _fail(config, name, 'a number', optional)
  if not least <= given <= most:  # Nor is NaN.
    wanted = 'finite and not negative'
    if most < _LARGEST:
      wanted = f'from {least} to {most}'
    _fail(config, name, wanted, optional)


def _sequences(config):
  for name in ('hidden', 'methods', 'speeds', 'drops', 'drop_epochs'):
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
  for name in ('speeds', 'drop_epochs'):
    if not all(map(_is_positive, config[name])):
      raise ValueError(
        f'{name} must hold positive numbers, got {tuple(config[name])}'
      )
  if any(type(n) is not int or not 0 < n < 2**31 for n in config.drops):
    raise ValueError(
      f'drops must hold positive integers, got {tuple(config.drops)}'
    )
  for name in ('drops', 'drop_epochs'):
    if any(a >= b for a, b in itertools.pairwise(config[name])):
      raise ValueError(f'{name} must ascend, got {tuple(config[name])}')
  if any(not isinstance(m, str) for m in config.methods):
    raise ValueError(f'methods must hold names, got {tuple(config.methods)}')
  for name in ('optimizer_kwargs', 'schedule_kwargs', 'compensation_kwargs'):
    if not isinstance(config[name], (ml_collections.ConfigDict, dict)):
      _fail(config, name, 'a dict of arguments', False)
    for argument, value in config[name].items():
      if not _is_plain(value):
        raise ValueError(
          f'{name}.{argument} must be a finite number, a name, True, False, '
          f'None, or a sequence of these, got {_shown(value)}'
        )


def _is_positive(value):
  return is_real(value) and 0 < value <= _LARGEST


def is_real(value: Any) -> TypeGuard[float]:
  """Whether it is a number that can be compared, and no bool."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value) -> TypeGuard[int]:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


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
  if config.dropout == 1:
    raise ValueError('dropout must be below 1, which leaves nothing')
  if config.replays is not None and config.replays > config.window:
    raise ValueError(
      f'replays must be from 0 to window={config.window}, got {config.replays}'
    )
  images = config.dataset.startswith('tfds:')  # Tested on their own split.
  if images and config.validation_share == 1:
    raise ValueError('validation_share must leave something to train on, got 1')
  rest = 1 - config.validation_share - 1e-9
  if not images and not 0 < config.train_share < rest:
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
  for name in ('epochs', 'evaluate_epochs'):
    if config[name] == 0:
      raise ValueError(f'{name} must be positive, got 0')
  warms_up = config.warmup or config.warmup_epochs
  if config.warmup_start is not None and not warms_up:
    raise ValueError(
      'warmup_start is where a warm-up begins and needs warmup or warmup_epochs'
    )
  if config.epochs is None:  # Else it is not known how long the run is.
    check_lengths(config)
  for name in ('clip_norm', 'replay_step'):
    if config[name] == 0:
      raise ValueError(f'{name} must be positive, got 0')
  if config.stored_gradients and config.revisit:
    raise ValueError(
      'stored_gradients computes nothing, so revisit must be 0 with it, got '
      f'{config.revisit}'
    )


def _hosts(config):
  """Settings of several processes."""
  for name in ('coordinator', 'processes', 'process_id'):
    if config[name] is not None and not config.distributed:
      raise ValueError(
        f'{name} is of a run of several processes and needs '
        '--config.distributed=True'
      )
  coordinator = config.coordinator
  if coordinator is not None:
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise ValueError(
        f'coordinator must be HOST:PORT, got {_shown(coordinator)}'
      )
  number, own = config.processes, config.process_id
  if number is not None and own is not None and own >= number:
    raise ValueError(
      f'process_id must be from 0 to {number - 1}, as there are '
      f'processes={number}, got {own}'
    )


def _cluster(config):
  """Settings of the cluster that only mean something together."""
  if config.wait_for is not None and config.wait_for > config.workers:
    raise ValueError(
      f'wait_for must be at most workers={config.workers}, got '
      f'{config.wait_for}'
    )
  if config.straggler == 0:
    raise ValueError('straggler must be positive, got 0')
  if config.machine_cv and config.arrivals not in (
    'gamma',
    'uniform',
    'exponential',
  ):
    raise ValueError(
      'machine_cv makes random task times uneven and needs --config.arrivals='
      f'gamma, uniform or exponential, got {config.arrivals}'
    )
  for arrivals, name, given in (
    ('recorded', 'trace', config.trace is not None),
    ('speeds', 'speeds', bool(config.speeds)),
  ):
    if (config.arrivals == arrivals) != given:
      raise ValueError(
        f'--config.arrivals={arrivals} and --config.{name} belong together: '
        'give both or neither'
      )
  if config.trace_unit is not None and config.trace is None:
    raise ValueError('trace_unit is the unit of a trace and needs one')
  if config.back_at is not None and config.fails_at is None:
    raise ValueError('back_at is when a worker comes back and needs fails_at')
