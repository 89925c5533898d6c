"""Tests compile fast, and as users do where they ask for it."""

import jax
import pytest

from tests import quick


def given():
  """Options that what is compiled now would be given."""
  hook = getattr(quick.compiler, quick.HOOK, None)
  if getattr(hook, '__module__', None) != quick.__name__:
    pytest.skip('this JAX is not told how to compile')
  return dict(hook(1, 1).env_option_overrides)


def test_tests_compile_fast():
  fast = jax.config.values[quick.WITHOUT]
  assert given() == (quick.known() if fast else {})


def test_or_as_users_do(as_users_compile_it):
  assert given() == {}


def test_what_xla_no_longer_knows_is_left_out(monkeypatch):
  monkeypatch.setitem(quick.OPTIONS, 'xla_that_is_gone', True)
  assert quick.known.__wrapped__() == quick.known()


def test_processes_too(monkeypatch):
  monkeypatch.delenv('JAX_DISABLE_MOST_OPTIMIZATIONS', raising=False)
  monkeypatch.setenv('XLA_FLAGS', '--xla_of_mine=1')
  there = quick.environment()
  assert there['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '1'
  mine, *ours = there['XLA_FLAGS'].split()
  assert mine == '--xla_of_mine=1' and len(ours) == len(quick.known())
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '0')
  assert quick.environment()['XLA_FLAGS'] == '--xla_of_mine=1'
