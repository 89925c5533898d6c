"""The search for learning rates, over accuracies that are made up."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from gsgd_jax import tuning


def searched(*accuracies, seeds=2, at_once=4, most=32):
  """What a search finds of functions of the step, one a budget; and its calls.

  Each returns the accuracy of a seed at a step.
  """
  calls = []

  def measure(steps):
    calls.append(list(steps))
    return {
      step: np.array([[f(step, s) for s in range(seeds)] for f in accuracies])
      for step in steps
    }

  return tuning.search(measure, at_once, most), calls


def mean(tried, step, budget=0):
  return float(np.mean(tried[step][budget]))


def is_bracketed(tried, budget):
  top = tuning.best(tried, budget)
  return {top - 1, top + 1} <= tried.keys()


def is_bounded(tried, budget):
  """Whether rates around the best are tried until they are a point worse."""
  top = tuning.best(tried, budget)
  least = mean(tried, top, budget) - tuning.WITHIN

  def bounded(direction):
    for distance in (1, *range(2, 100, 2)):
      step = top + direction * distance
      if step not in tried:
        return False
      if mean(tried, step, budget) < least:
        return True
    return False

  return bounded(-1) and bounded(1)


def assert_searched(tried, calls, budgets, at_once, most):
  steps = [step for call in calls for step in call]
  assert len(set(steps)) == len(steps)  # Each is measured once.
  assert list(tried) == sorted(steps)
  assert len(tried) <= most
  assert all(0 < len(call) <= at_once for call in calls)
  if len(tried) < most:
    for budget in range(budgets):
      assert is_bracketed(tried, budget)
      assert is_bounded(tried, budget)


def hill(peak, width, height=0.9):
  return lambda step, seed: max(0.1, height - ((step - peak) / width) ** 2)


def noisy(peak, width, size):
  """Other noise for every step and seed, always the same."""

  def accuracy(step, seed):
    noise = np.random.default_rng([step + 10**6, seed, peak + 10**6]).normal()
    return hill(peak, width)(step, seed) + size * noise

  return accuracy


SHAPES = strategies.builds(
  noisy,
  strategies.integers(-14, 14),
  strategies.floats(1.5, 20),
  strategies.sampled_from([0.0, 0.003, 0.03]),
)


@hypothesis.settings(max_examples=100)
@hypothesis.given(
  strategies.lists(SHAPES, min_size=1, max_size=4),
  strategies.integers(1, 9),
  strategies.integers(4, 40),
)
def test_search(shapes, at_once, most):
  tried, calls = searched(*shapes, at_once=at_once, most=most)
  assert_searched(tried, calls, len(shapes), at_once, most)


@hypothesis.given(strategies.integers(-12, 12), strategies.floats(1.5, 20))
def test_the_best_of_a_hill_is_its_top(peak, width):
  tried, _ = searched(hill(peak, width), most=10**6)
  assert tuning.best(tried, 0) == peak
  assert is_bracketed(tried, 0)
  assert is_bounded(tried, 0)


@pytest.mark.parametrize(
  'accuracy',
  [
    lambda step, seed: 0.5,
    lambda step, seed: 0.5 + step / 1000,
    lambda step, seed: 0.5 - step / 1000,
    lambda step, seed: 0.5 + 0.4 * (step >= 0),
    lambda step, seed: 0.5 + 0.4 * (step < 0),
  ],
  ids=['flat', 'up', 'down', 'step up', 'step down'],
)
@pytest.mark.parametrize('at_once, most', [(1, 32), (4, 32), (4, 7), (40, 32)])
def test_what_has_no_top_ends(accuracy, at_once, most):
  tried, calls = searched(accuracy, at_once=at_once, most=most)
  assert_searched(tried, calls, 1, at_once, most)
  assert len(tried) == most


def test_of_equal_rates_the_middle_is_the_best():
  tried = {step: np.array([[0.5, 0.7], [0.1, 0.2 * step]]) for step in range(3)}
  assert tuning.best(tried, 0) == 1
  assert tuning.best(tried, 1) == 2


def test_budgets_have_tops_of_their_own():
  tried, _ = searched(hill(-5, 3), hill(6, 3))
  assert [tuning.best(tried, b) for b in range(2)] == [-5, 6]
  assert all(is_bracketed(tried, b) for b in range(2))


@pytest.mark.parametrize(
  'start, step, rate',
  [
    (0.05, 0, 0.05),
    (0.05, 2, 0.1),
    (0.05, -2, 0.025),
    (0.05, 1, 0.0707107),
    (3.0, -1, 2.12132),
    (1e-6, 1, 1.41421e-06),
    (0.0, 3, 0.0),
  ],
)
def test_grid(start, step, rate):
  assert tuning.grid(start, step) == rate


@hypothesis.given(strategies.floats(1e-8, 1e8), strategies.integers(-31, 30))
def test_grid_is_by_the_root_of_two(start, step):
  ratio = tuning.grid(start, step + 1) / tuning.grid(start, step)
  assert abs(ratio - 2**0.5) < 2e-5
