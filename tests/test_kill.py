"""Runs that are killed at any moment end as if they had not been."""

import pytest

from benchmarks import kill

# One kill each; `benchmarks/kill.py` has many, in every mode.
CASES = [
  'asynchronous',
  'dana',
  'early-stopping',
  'streamed',
  '8-devices-asynchronous',
]


@pytest.fixture(scope='module')
def places(tmp_path_factory, digits_dir):
  return kill.Places(tmp_path_factory.mktemp('cache'), digits_dir)


@pytest.mark.parametrize('name', CASES)
def test_killed_and_started_again(name, tmp_path, places):
  case = kill.CASES[name]
  kill.undisturbed(case, tmp_path / 'reference', places)
  came = kill.killed(
    case,
    tmp_path / 'killed',
    places,
    tmp_path / 'reference',
    kills=1,
    moment=kill.in_saving,
  )
  assert came.kills == came.resumed == 1
  assert came.differences == []
