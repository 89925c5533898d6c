"""Strict: float64, no silent promotion; and warnings are errors (pyproject).

What is compiled is compiled fast, but where a test is about that; see `quick`.

There are eight devices. What uses all that there are is shown one, unless a
test is about more.
"""

import os

import hypothesis
import jax
import pytest

from gsgd_jax import parallel
from tests import quick, tfds_digits

_STRICT = {
  'jax_enable_x64': True,
  'jax_numpy_rank_promotion': 'raise',
  'jax_numpy_dtype_promotion': 'strict',
}
if quick.WITHOUT.upper() not in os.environ:
  _STRICT[quick.WITHOUT] = True

jax.config.update('jax_num_cpu_devices', 8)
quick.install()

hypothesis.settings.register_profile(
  'default',
  deadline=None,
  derandomize=True,
  max_examples=25,
  suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile('default')


@pytest.fixture(autouse=True)
def strict():
  """For these tests; the package's doctests run as users run them."""
  now = jax.config.values
  before = {name: now[name] for name in _STRICT}
  for name, value in _STRICT.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """For what uses all devices; see `test_parallel`."""
  monkeypatch.setattr(parallel, 'device_count', lambda: 1)


@pytest.fixture
def as_users_run_it(strict):
  """For tests of what optax and Flax are part of: they are not that strict."""
  del strict
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    yield


@pytest.fixture
def as_users_compile_it(strict):
  """For tests of bits, of memory, or of the compiled program."""
  del strict
  jax.config.update(quick.WITHOUT, False)


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
  """A data_dir that holds 'tfds:digits'; see `tests/tfds_digits.py`."""
  folder = tmp_path_factory.mktemp('tfds')
  tfds_digits.prepare_digits(folder)
  return folder
