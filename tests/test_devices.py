"""The application on several devices: as on one."""

import re

import jax
import numpy as np
import pytest

from gsgd_jax import events, experiment, settings

# Methods, and what else they are about.
CASES = {
  'data_parallel': dict(split_batch_size=32, optimizer='adam'),
  'asynchronous+consistent': dict(arrivals='gamma', machine_cv=0.5, workers=16),
  'asynchronous+random': dict(max_ahead=2),
  'asynchronous+dana': dict(
    compensation_kwargs=dict(learning_rate=0.01), arrivals='exponential'
  ),
  'asynchronous+delay_compensation+consistent': dict(revisit=0),
  'asynchronous+exact_delay_compensation': dict(overwrite_within=0.01),
  'asynchronous+rennala+consistent': dict(
    compensation_kwargs=dict(size=2), window=4
  ),
  'synchronous+dana_dc+consistent': dict(
    compensation_kwargs=dict(learning_rate=0.01),
    arrivals='gamma',
    wait_for=8,
    workers=11,
  ),
  'synchronous+hardest': dict(combine='mean', window=3),
  'delayed+delay_compensation+consistent': dict(delay=3),
  'delayed': dict(delay=0),
}


def config_of(name, devices, **given):
  config = settings.default_config()
  config.update(
    dict(
      methods=(name,),
      dataset='iris',
      model='softmax_regression',
      learning_rate=0.05,
      batch_size=16,
      seeds=2,
      workers=8,
      updates=66,
      evaluate_every=33,  # In the middle of a round.
      window=5,
      devices=devices,
    )
  )
  for key, value in given.items():
    if key == 'compensation_kwargs':
      config[key].update(value)
    else:
      config[key] = value
  return config


@pytest.mark.parametrize('name', CASES)
def test_as_on_one_device(name, as_users_run_it):
  alone = experiment.run(config_of(name, 1, **CASES[name]))[name]
  assert alone.status == 'completed'
  number = 8 if len(name) % 2 else 4  # Some of either.
  many = experiment.run(config_of(name, number, **CASES[name]))[name]
  for field in ('step', *events.MEASURED):
    np.testing.assert_allclose(
      getattr(many, field),
      getattr(alone, field),
      rtol=2e-4,
      atol=1e-5,
      err_msg=field,
    )
  np.testing.assert_array_equal(
    many.arrivals.histogram, alone.arrivals.histogram
  )


@pytest.mark.usefixtures('as_users_compile_it')
def test_chunks_change_nothing(monkeypatch, as_users_run_it):
  """However the run is cut into chunks: bit for bit the same."""
  from gsgd_jax import training

  name = 'asynchronous+consistent'
  config = config_of(name, 8, arrivals='gamma', round_size=8)
  whole = experiment.run(config)[name]
  lengths = iter([2, 9] * 100)  # Less than a round, and more.
  cut = property(lambda self: next(lengths), lambda self, value: None)
  monkeypatch.setattr(training._Pace, 'calls', cut, raising=False)
  pieces = experiment.run(config)[name]
  for field in ('step', *events.MEASURED):
    np.testing.assert_array_equal(getattr(whole, field), getattr(pieces, field))


def test_divergence_names_seed_and_step(as_users_run_it):
  given = dict(learning_rate=1e20, model='mlp', hidden=(8,))
  alone, many = (
    experiment.run(config_of('asynchronous', n, **given))['asynchronous']
    for n in (1, 8)
  )
  assert alone.status == many.status == 'diverged'
  assert alone.message == many.message


def test_all_devices_are_used(monkeypatch):
  """Unless `devices` says how many."""
  meshes = []

  def train(*given):
    meshes.append(given[6].size)
    return iter(())

  monkeypatch.setattr('gsgd_jax.parallel.device_count', jax.device_count)
  monkeypatch.setattr('gsgd_jax.training.train', train)
  for devices in (None, 2):
    list(experiment.stream(config_of('asynchronous', devices)))
  assert meshes == [8, 2]


@pytest.mark.parametrize(
  'name, given, sentence',
  [
    (
      'sequential',
      dict(batch_size=12),
      'sequential: 8 devices cannot share batch_size=12 equally; 16 would do, '
      'or --config.devices=6',
    ),
    (
      'asynchronous',
      dict(workers=10),
      'asynchronous: 8 devices cannot share workers=10 equally; 8 would do, or '
      '--config.devices=2',
    ),
    (
      'synchronous',
      dict(wait_for=7),
      'synchronous: 8 devices cannot share wait_for=7 equally; 8 would do, or '
      '--config.devices=1',
    ),
    (
      'data_parallel',
      dict(split_batch_size=36),
      'data_parallel: 8 devices cannot share split_batch_size=36 equally; 40 '
      'would do, or --config.devices=6',
    ),
    (
      'asynchronous',
      dict(workers=10, batch_size=4),
      'asynchronous: 8 devices cannot share batch_size=4 equally; 8 would do, '
      'or --config.devices=2',
    ),
    (
      'sequential',
      dict(devices=9),
      'devices must be at most the 8 there are, got 9',
    ),
  ],
)
def test_what_does_not_divide(name, given, sentence):
  config = config_of(name, **dict(devices=8) | given)
  with pytest.raises(ValueError, match=f'^{re.escape(sentence)}$'):
    experiment.check(config)
