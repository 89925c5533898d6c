r"""Learning rates, chosen on validation data.

Rates lie on the grid :math:`\eta_0 2^{k/2}`. The search begins with four of
them, factors of four apart, and goes on, for every budget, until the best has
both its neighbours and, by factors of two, the range around it that is within a
point of it is bounded on both sides; or until so many rates were tried that
validation data evidently cannot tell them apart.
"""

import math
from collections.abc import Callable

import numpy as np

WITHIN = 0.01  # Of accuracy: what is as good as the best.
_START = (-8, -4, 0, 4)
_MOST = 32  # Rates in all.


def search(
  measure: Callable[[list[int]], dict[int, np.ndarray]],
  at_once: int = 4,
  most: int = _MOST,
) -> dict[int, np.ndarray]:
  """Measures rates until the best of every budget is bracketed.

  Args:
    measure: Of steps :math:`k` on the grid, for each the validation accuracy,
      shape ``(budgets, seeds)``.
    at_once: How many rates are measured together.
    most: How many are measured at most.

  Returns:
    What was measured, by step, in ascending order.

  Examples:
    >>> import numpy as np
    >>> from gsgd_jax import tuning
    >>> accuracy = lambda k: np.full([1, 2], 0.9 - 0.001 * (k - 5) ** 2)
    >>> tried = tuning.search(lambda ks: {k: accuracy(k) for k in ks})
    >>> print(*tried, '|', tuning.best(tried, 0))
    -8 -4 0 1 3 4 5 6 7 9 | 5
  """
  tried = {}
  wanted = list(_START)
  while wanted and len(tried) < most:
    wanted = wanted[: min(at_once, most - len(tried))]
    tried |= measure(wanted)
    budgets = len(next(iter(tried.values())))
    missing = {}
    for budget in range(budgets):
      for distance, step in _missing(tried, budget):
        missing[step] = min(distance, missing.get(step, distance))
    wanted = sorted(missing, key=lambda step: (missing[step], step))
  return dict(sorted(tried.items()))


def best(tried: dict[int, np.ndarray], budget: int) -> int:
  """The step of the best mean accuracy at a budget; the middle of equal ones.

  Args:
    tried: What `search` returns.
    budget: The position of the budget.
  """
  top = max(_mean(tried, step, budget) for step in tried)
  equal = sorted(s for s in tried if _mean(tried, s, budget) > top - 1e-9)
  return equal[(len(equal) - 1) // 2]


def _mean(tried, step, budget):
  return float(np.mean(tried[step][budget]))


def _missing(tried, budget):
  """(distance from the best, step) of what is to be measured still."""
  top = best(tried, budget)
  least = _mean(tried, top, budget) - WITHIN
  for direction in (-1, 1):
    for distance in (1, *range(2, 2 * _MOST, 2)):
      step = top + direction * distance
      if step not in tried:
        yield distance, step
        break
      if _mean(tried, step, budget) < least:
        break


def grid(start: float, step: int) -> float:
  """The rate of a step, to six digits."""
  rate = start * 2.0 ** (step / 2)
  return round(rate, 5 - math.floor(math.log10(rate))) if rate else 0.0
