"""Every setting: what it may be, and what is said where it is not."""

import math

import ml_collections
import numpy as np
import pytest

from gsgd_jax import settings

NAN = math.nan
TEXTS = ['dataset', 'preprocessing', 'model', 'combine', 'optimizer']
TEXTS += ['schedule', 'arrivals', 'replay_model', 'normalization', 'dtype']
OPTIONAL_TEXTS = ['target', 'parallel', 'guidance', 'compilation_cache']
OPTIONAL_TEXTS += ['trace', 'compensation', 'coordinator', 'data_dir']
OPTIONAL_TEXTS += ['augmentation']
CHOICES = {
  'model': 'cnn_large, cnn_small, gpt, mlp, resnet20, softmax_regression',
  'normalization': 'batch, group',
  'dtype': 'bfloat16, float32',
  'augmentation': 'crop_and_flip',
  'preprocessing': 'author, standard',
  'combine': 'mean, sequential',
  'replay_model': 'parallel, serial, shared',
}
TRUTHS = ['verification', 'average_scores', 'stored_gradients']
TRUTHS += ['tensorboard', 'profile', 'distributed']
OPTIONAL_TRUTHS = ['stream']
LEAST = dict(
  workers=1,
  batch_size=1,
  seeds=1,
  updates=1,
  evaluate_every=1,
  window=1,
  accumulate=1,
  delay=0,
  warmup=0,
)
LEAST |= dict(context=1, layers=1, heads=1, width=1, checkpoints=0)
OPTIONAL_LEAST = dict(
  patience=1, replays=0, revisit=0, wait_for=1, split_batch_size=1, max_ahead=0
)
OPTIONAL_LEAST |= dict(devices=1, round_size=1, processes=1, process_id=0)
OPTIONAL_LEAST |= dict(image_size=1, measured=1, checkpoint_every=1)
SHARES = ['train_share', 'validation_share', 'label_noise', 'spread', 'dropout']
SHARES += ['drop_factor']
OPTIONAL_SHARES = ['warmup_start']
NUMBERS = ['cv', 'machine_cv', 'sync_cost', 'weight_decay', 'warmup_epochs']
OPTIONAL_NUMBERS = ['learning_rate', 'overwrite_within', 'trace_unit']
OPTIONAL_NUMBERS += ['straggler', 'fails_at', 'back_at', 'clip_norm']
OPTIONAL_NUMBERS += ['replay_step']
OPTIONAL_NUMBERS += ['epochs', 'evaluate_epochs', 'checkpoint_minutes']
SEQUENCES = ['hidden', 'methods', 'speeds', 'drops', 'drop_epochs']
DICTS = ['optimizer_kwargs', 'schedule_kwargs', 'compensation_kwargs']
ALL = list(settings.default_config())


def config_of(**given):
  """The defaults but for what is given, whatever its type."""
  return ml_collections.ConfigDict({**settings.default_config(), **given})


def refusal(config):
  """What `check` says, always in one line."""
  with pytest.raises(ValueError) as error:
    settings.check(config)
  message = str(error.value)
  assert message and '\n' not in message
  return message


def test_the_default_config():
  settings.check(settings.default_config())
  settings.check(config_of())
  first, second = settings.default_config(), settings.default_config()
  first.optimizer_kwargs.momentum = 0.9
  assert not second.optimizer_kwargs


def test_the_default_config_is_open():
  config = settings.default_config()
  config.target = 'kind'
  config.replays = 3
  config.learning_rate = None
  settings.check(config)
  for delay in (7, 'by_depth', 3):
    config.delay = delay
    settings.check(config)
    assert config.to_dict()['delay'] == delay
  with pytest.raises(TypeError):
    config.workers = 'many'


def test_these_tests_know_every_setting():
  known = [
    *TEXTS,
    *OPTIONAL_TEXTS,
    *TRUTHS,
    *OPTIONAL_TRUTHS,
    *LEAST,
    *OPTIONAL_LEAST,
  ]
  known += [*SHARES, *OPTIONAL_SHARES, *NUMBERS, *OPTIONAL_NUMBERS]
  known += [*SEQUENCES, *DICTS]
  assert sorted(known) == sorted(ALL)


# One setting is wrong: (setting, value, what it must be).

WRONG = [('delay', 'by_dept', 'an integer or by_depth')]
for name in TEXTS:
  values = ['', None, 3, True, NAN, ('mlp',)]
  WRONG += [(name, value, 'a name') for value in values]
for name in OPTIONAL_TEXTS:
  WRONG += [(name, value, 'a name or None') for value in ['', 3, False, NAN]]
for name, known in CHOICES.items():
  WRONG += [(name, 'xyz', f'one of {known}')]
for name in TRUTHS:
  values = [None, 0, 1, 'True', NAN, np.True_]
  WRONG += [(name, value, 'True or False') for value in values]
for name in OPTIONAL_TRUTHS:
  values = [0, 1, 'True', NAN, np.True_]
  WRONG += [(name, value, 'True or False or None') for value in values]
for name in [*LEAST, *OPTIONAL_LEAST]:
  least = (LEAST | OPTIONAL_LEAST)[name]
  more = ' or None' if name in OPTIONAL_LEAST else ''
  wanted = 'an integer or by_depth' if name == 'delay' else 'an integer' + more
  values = [1.0, 1.5, NAN, math.inf, '3', True, (3,), np.float32(3)]
  values += [] if more else [None]
  WRONG += [(name, value, wanted) for value in values]
  values = [least - 1, -7, np.int64(least - 1)]
  WRONG += [(name, value, f'at least {least}{more}') for value in values]
  WRONG += [(name, value, f'below 2**31{more}') for value in [2**31, 2**70]]
for name in [*SHARES, *OPTIONAL_SHARES]:
  more = ' or None' if name in OPTIONAL_SHARES else ''
  values = ['0.5', True, (0.5,), 0.5j]
  values += [] if more else [None]
  WRONG += [(name, value, 'a number' + more) for value in values]
  values = [-0.1, 1.1, 2, NAN, math.inf, -math.inf, np.float64(-0.1)]
  WRONG += [(name, value, 'from 0 to 1' + more) for value in values]
for name in [*NUMBERS, *OPTIONAL_NUMBERS]:
  more = ' or None' if name in OPTIONAL_NUMBERS else ''
  values = ['0.5', False, (0.5,), 0.5j]
  values += [] if more else [None]
  WRONG += [(name, value, 'a number' + more) for value in values]
  values = [-0.1, -1, NAN, math.inf, -math.inf, np.float32(-1)]
  WRONG += [(name, value, f'finite and not negative{more}') for value in values]
for name in SEQUENCES:
  values = [None, 64, 'sequential', NAN]
  WRONG += [(name, value, 'a tuple') for value in values]
for name in DICTS:
  values = [None, 3, 'momentum', NAN, ('momentum', 0.9)]
  WRONG += [(name, value, 'a dict of arguments') for value in values]


@pytest.mark.parametrize('name', ALL)
def test_wrong(name):
  cases = [case for case in WRONG if case[0] == name]
  assert any(value is NAN for _, value, _ in cases)
  for _, value, wanted in cases:
    message = refusal(config_of(**{name: value}))
    assert message == f'{name} must be {wanted}, got {value!r}'


ENTRIES = [
  ('hidden', value, 'positive integers')
  for value in [(0,), (64, -1), (1.5,), (True,), (None,), ('64',), (NAN,)]
]
ENTRIES += [
  ('drops', value, 'positive integers')
  for value in [(0,), (1, 2.5), (True,), (None,), ('64',), (NAN,)]
]
ENTRIES += [
  ('drop_epochs', value, 'positive numbers')
  for value in [(0,), (1, -2.5), (True,), (None,), ('64',), (NAN,)]
]
ENTRIES += [
  ('methods', value, 'names')
  for value in [(None,), (3,), ('sequential', NAN), (('delayed',),)]
]


@pytest.mark.parametrize('name, value, wanted', ENTRIES)
def test_wrong_entry(name, value, wanted):
  for given in (value, list(value)):
    message = refusal(config_of(**{name: given}))
    assert message == f'{name} must hold {wanted}, got {value!r}'


@pytest.mark.parametrize('name, known', CHOICES.items())
def test_wrong_choice_with_a_near_one(name, known):
  for choice in known.split(', '):
    settings.check(config_of(**{name: choice}))
    given = f'{choice}s'
    assert refusal(config_of(**{name: given})) == (
      f'{name} must be one of {known}, got {given!r}; did you mean {choice}?'
    )


RIGHT = [(name, least) for name, least in (LEAST | OPTIONAL_LEAST).items()]
RIGHT += [(name, 7) for name in {**LEAST, **OPTIONAL_LEAST}]
RIGHT += [(name, np.int64(7)) for name in {**LEAST, **OPTIONAL_LEAST}]
RIGHT += [
  (name, 2**31 - 1)
  for name in {**LEAST, **OPTIONAL_LEAST}
  if name not in ('replays', 'warmup', 'wait_for')
]
RIGHT += [(name, None) for name in [*OPTIONAL_LEAST, *OPTIONAL_TEXTS]]
RIGHT += [(name, value) for name in TRUTHS for value in (True, False)]
RIGHT += [
  ('dataset', 'a/file.csv'),
  ('target', 'kind'),
  ('parallel', 'delayed'),
]
RIGHT += [
  ('compilation_cache', 'folder'),
  ('schedule', 'any'),
  ('optimizer', 'x'),
]
RIGHT += [('delay', 'by_depth')]
RIGHT += [('label_noise', value) for value in (0, 1, 0.5, np.float32(0.5))]
RIGHT += [('validation_share', 0), ('train_share', 0.01), ('train_share', 0.79)]
RIGHT += [('learning_rate', value) for value in (None, 0, 3, 0.1, 1e30)]
RIGHT += [('hidden', value) for value in ((), (1,), [64, 32])]
RIGHT += [('methods', value) for value in ((), ('delayed',), ['delayed'])]
RIGHT += [(name, dict(momentum=0.9)) for name in DICTS]


@pytest.mark.parametrize('name', ALL)
def test_right(name):
  for value in [value for given, value in RIGHT if given == name]:
    needs = {}
    if name in ('coordinator', 'processes', 'process_id') and value is not None:
      needs = dict(distributed=True)
    settings.check(config_of(**{name: value}, **needs))


@pytest.mark.parametrize(
  'given, message',
  [
    (
      dict(wokers=3),
      'the config has no setting wokers; did you mean workers?',
    ),
    (
      dict(learningrate=0.1),
      'the config has no setting learningrate; did you mean learning_rate?',
    ),
    (dict(xyz=3), 'the config has no setting xyz'),
  ],
)
def test_unknown_setting(given, message):
  assert refusal(config_of(**given)) == message


@pytest.mark.parametrize('name', ALL)
def test_lacking_setting(name):
  config = config_of()
  del config[name]
  assert refusal(config) == f'the config lacks the setting {name}'


# Settings that bound one another: those given, and the message.
BETWEEN = {
  'replays': (
    dict(replays=11),
    'replays must be from 0 to window=10, got 11',
  ),
  'replays of a window': (
    dict(replays=3, window=2),
    'replays must be from 0 to window=2, got 3',
  ),
  'no training': (
    dict(train_share=0.0),
    'train_share must be above 0 and leave something for testing, got '
    'train_share=0 and validation_share=0.2',
  ),
  'shares': (
    dict(train_share=0.7, validation_share=0.4),
    'train_share must be above 0 and leave something for testing, got '
    'train_share=0.7 and validation_share=0.4',
  ),
  'validation of everything': (
    dict(train_share=0.1, validation_share=1.0),
    'train_share must be above 0 and leave something for testing, got '
    'train_share=0.1 and validation_share=1',
  ),
  'patience': (
    dict(patience=3, validation_share=0.0),
    'patience stops by validation accuracy and needs validation_share above 0',
  ),
  'guidance': (
    dict(guidance='hardest'),
    'guidance belongs to parallel: set both, or write the method as '
    '--config.methods=asynchronous+hardest',
  ),
  'warmup': (
    dict(warmup=1680),
    'warmup must be less than updates=1680, got 1680',
  ),
  'warmup of a short run': (
    dict(warmup=3, updates=2),
    'warmup must be less than updates=2, got 3',
  ),
  'warmup_start': (
    dict(warmup_start=0.1),
    'warmup_start is where a warm-up begins and needs warmup or warmup_epochs',
  ),
  'no epochs': (dict(epochs=0.0), 'epochs must be positive, got 0'),
  'no evaluation': (
    dict(evaluate_epochs=0),
    'evaluate_epochs must be positive, got 0',
  ),
  'drops': (
    dict(drops=(5, 1681)),
    'drops must be at most updates=1680, got (5, 1681)',
  ),
  'drops in any order': (
    dict(drops=(5, 7, 7)),
    'drops must ascend, got (5, 7, 7)',
  ),
  'epochs in any order': (
    dict(drop_epochs=(5, 2.5)),
    'drop_epochs must ascend, got (5, 2.5)',
  ),
  'clip_norm': (dict(clip_norm=0.0), 'clip_norm must be positive, got 0'),
  'replay_step': (dict(replay_step=0.0), 'replay_step must be positive, got 0'),
  'stored gradients': (
    dict(stored_gradients=True, revisit=2),
    'stored_gradients computes nothing, so revisit must be 0 with it, got 2',
  ),
}


@pytest.mark.parametrize('case', BETWEEN)
def test_between(case):
  given, message = BETWEEN[case]
  assert refusal(config_of(**given)) == message


@pytest.mark.parametrize(
  'given',
  [
    dict(replays=10),
    dict(replays=2, window=2),
    dict(train_share=0.9, validation_share=0.05),
    dict(patience=3, validation_share=0.01),
    dict(guidance='hardest', parallel='asynchronous'),
    dict(warmup=1679),
    dict(warmup=5000, epochs=10),
    dict(warmup=2, warmup_start=0.0),
    dict(warmup_epochs=2.5, warmup_start=1.0),
    dict(drops=(5, 1680), drop_epochs=(0.5, 7)),
    dict(stored_gradients=True, revisit=0),
    dict(stored_gradients=True, revisit=None),
    dict(stored_gradients=False, revisit=2),
  ],
)
def test_just_within(given):
  settings.check(config_of(**given))


# Known weaknesses.


@pytest.mark.parametrize(
  'train, validation', [(0.8, 0.2), (1.0, 0.0), (0.7, 0.3)]
)
def test_nothing_left_for_testing(train, validation):
  config = config_of(train_share=train, validation_share=validation)
  assert refusal(config).startswith('train_share must')


@pytest.mark.parametrize(
  'given',
  [
    dict(workers={}),
    dict(model=dict(hidden=3)),
    dict(verification=np.ones([2, 2])),
    dict(guidance='hard\nest'),
  ],
)
def test_one_line_whatever_is_given(given):
  assert refusal(config_of(**given)).startswith(next(iter(given)))


@pytest.mark.parametrize('name', [*SHARES, 'learning_rate'])
def test_a_number_beyond_floats(name):
  assert refusal(config_of(**{name: 10**400})).startswith(name)


# The words for it.


def test_nearest():
  known = ['workers', 'window', 'warmup']
  assert settings.nearest('worker', known) == '; did you mean workers?'
  assert settings.nearest('windwo', iter(known)) == '; did you mean window?'
  for nothing in ('xyz', '', None, 3):
    assert settings.nearest(nothing, known) == ''
  assert settings.nearest('worker', []) == ''


def test_one_of():
  known = {'red', 'green', 'blue'}
  assert settings.one_of('colour', 'red', known) is None
  for given, hint in [
    ('gren', '; did you mean green?'),
    ('xyz', ''),
    (None, ''),
    (3, ''),
    (['red'], '; did you mean red?'),
    ('RED', ''),
  ]:
    with pytest.raises(ValueError) as error:
      settings.one_of('colour', given, known)
    listed = 'colour must be one of blue, green, red'
    assert str(error.value) == f'{listed}, got {given!r}{hint}'
