"""The studies that come with the package ask what they say they ask."""

import importlib

import pytest

from configs import delay
from gsgd_jax import guided_sgd, study

STUDIES = {
  'delay': 657,
  'delay:fresh': 47,
  'delay:tables': 75,
  'delay:cnn': 13,
  'delay:gpt': 5,
  'guidance': 210,
  'map': 228,
  'paper': 63,
  'paper:author': 63,
  'paper:lossy': 84,
  'preset': 53,
}
CONTROLS = {'paper': ('random',), 'map': ('random',), 'preset': ()}


def config_of(name, tmp_path=None):
  module, _, argument = name.partition(':')
  config = importlib.import_module(f'configs.{module}').get_config(
    *filter(None, [argument])
  )
  if name == 'delay:gpt':
    text = tmp_path / 'text.txt'
    text.write_text('to be or not to be, that is the question. ' * 100)
    config.dataset = str(text)
  return config


@pytest.mark.parametrize('name', STUDIES)
def test_every_guided_method_has_its_controls(name, tmp_path):
  cells = study.cells(config_of(name, tmp_path))
  assert len(cells) == STUDIES[name]
  places = {}
  for cell in cells:
    where = tuple(v for a, v in cell.values.items() if a != 'method')
    # What decides a run, but for which batches are replayed.
    how = study._alike(cell.config), str(cell.config.compensation_kwargs)
    guidance = [cell.config[n] for n in study._GUIDANCE]
    unguided = cell.method.parallel, cell.method.compensation
    at = places.setdefault((where, how, str(guidance), unguided), set())
    at.add(cell.method.select)
  controls = CONTROLS.get(name.split(':')[0], ('random', 'inconsistent'))
  guided = [found for found in places.values() if 'consistent' in found]
  assert guided
  assert all(found.issuperset(controls) for found in guided)


def seeds_of(config):
  first = config.first_seed
  return set(range(first, first + config.tuning_seeds + config.seeds))


def test_nothing_is_confirmed_by_the_seeds_that_it_was_chosen_on():
  chosen, measured, fresh = (
    seeds_of(config_of(name)) for name in ('preset', 'delay', 'delay:fresh')
  )
  assert not chosen & fresh and not measured & fresh and not chosen & measured


def test_the_preset_is_one_of_those_it_was_chosen_from():
  (preset,) = (
    own
    for label, own in config_of('preset').axes.method.items()
    if label == 'ASGD, guided, 1 in 4, step N/8'
  )
  assert preset == delay.asynchronous()['ASGD, guided']
  defaults = guided_sgd.__kwdefaults__
  assert defaults['window'] == preset['window']
  assert defaults['replays'] == preset['replays']


def test_the_benchmark_computes_a_part_of_the_delay_study():
  config = config_of('delay')
  config.only = delay.PART
  assert len(study.cells(config)) == 11  # One of them is sequential.
