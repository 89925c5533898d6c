"""What numbers of several seeds show: means, differences, shares, ranges.

Every interval is one of 95 %. Values are paired by seed: a seed decides the
split, the first weights and the order of arrivals for all methods alike, so
that much of what varies is common to two methods and drops out between them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

_LEVEL = 0.95
_ROUNDING = 1e-9  # Of accuracies: what is no difference.


class Interval(NamedTuple):
  """A mean over seeds and the half-width of its 95 % confidence interval."""

  mean: float
  half_width: float | None  # None with one seed.

  def __str__(self) -> str:
    mean = f'{round(self.mean, 2) + 0.0:.2f}'  # Not -0.00.
    if self.half_width is None:
      return mean
    return f'{mean} ± {self.half_width:.2f}'


def interval(values: np.ndarray) -> Interval:
  """Student's t interval of the mean of independent values.

  Args:
    values: One number a seed.

  Returns:
    An ``Interval``.

  Examples:
    >>> import numpy as np
    >>> from gsgd_jax import statistics
    >>> print(statistics.interval(np.array([1.0, 2.0, 3.0])))
    2.00 ± 2.48
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n < 2:
    return Interval(float(values.mean()), None)
  half_width = _quantile(n) * values.std(ddof=1) / n**0.5
  return Interval(float(values.mean()), float(half_width))


def _quantile(n):
  """How many standard errors of n values an interval reaches."""
  return scipy.stats.t.ppf((1 + _LEVEL) / 2, n - 1)


class Paired(NamedTuple):
  """A mean difference, and how likely one so large is by chance."""

  difference: Interval
  p: float  # Two-sided; NaN with one seed.


def paired(ours: ArrayLike, theirs: ArrayLike) -> Paired:
  r"""The paired t-test of two methods on the same seeds.

  Of the :math:`n` differences :math:`d_i` with mean :math:`\bar d` and standard
  deviation :math:`s`, :math:`t = \bar d \sqrt n / s` is held against Student's
  distribution with :math:`n - 1` degrees of freedom.

  Args:
    ours: One number a seed, at least one.
    theirs: Those of another method on the same seeds, in the same order.

  Returns:
    A ``Paired``. Differences that are all equal have no :math:`t`; p is then 1
    where they are zero, else that of the sign-flip test, :math:`2^{1-n}`.
    (Accuracies are of so many examples each: equal differences are no rarity.)

  Raises:
    ValueError: The shapes differ, or there is no seed.

  Examples:
    >>> from gsgd_jax import statistics
    >>> found = statistics.paired([2.0, 3.0, 5.0], [1.0, 1.0, 2.0])
    >>> print(found.difference, f'p={found.p:.3f}')
    2.00 ± 2.48 p=0.074
  """
  ours, theirs = _same_seeds(ours, theirs)
  differences = ours - theirs
  n = len(differences)
  measured = interval(differences)
  if n < 2:
    return Paired(measured, float('nan'))
  error = differences.std(ddof=1) / n**0.5
  if error < 1e-9 * max(1.0, abs(measured.mean)):  # But for rounding.
    same = abs(measured.mean) < 1e-9
    return Paired(measured, 1.0 if same else 2.0 ** (1 - n))
  t = abs(measured.mean) / error
  return Paired(measured, float(2 * scipy.stats.t.sf(t, n - 1)))


def _same_seeds(*values):
  """As arrays, one number a seed, of the same seeds."""
  values = [np.asarray(v, np.float64) for v in values]
  shapes = {v.shape for v in values}
  if len(shapes) > 1 or values[0].ndim != 1 or not len(values[0]):
    shown = ' and '.join(str(v.shape) for v in values)
    raise ValueError(
      f'one number a seed, of the same seeds, is needed, got shapes {shown}'
    )
  return values


def holm(p_values: Sequence[float]) -> np.ndarray:
  r"""Holm and Bonferroni's adjustment of p values of many comparisons.

  With :math:`p_{(1)} \le \dots \le p_{(m)}` the adjusted values are

  .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)}).

  Whoever calls differences real where :math:`\tilde p < 0.05` errs once or more
  with a probability of at most 5 %, however the comparisons depend on one
  another.

  Args:
    p_values: In [0, 1]; NaN is no comparison, and does not count.

  Returns:
    The adjusted ones in the same order, NaN where it was.

  Examples:
    >>> from gsgd_jax import statistics
    >>> statistics.holm([0.01, 0.04, 0.03, 0.5]).round(2).tolist()
    [0.04, 0.09, 0.09, 0.5]

  References:
    Holm. *A Simple Sequentially Rejective Multiple Test Procedure.*
    Scandinavian Journal of Statistics 6(2), 1979.
  """
  p = np.array(p_values, np.float64)
  counted = np.flatnonzero(~np.isnan(p))
  order = counted[np.argsort(p[counted], kind='stable')]
  left = len(order) - np.arange(len(order))
  p[order] = np.maximum.accumulate(np.minimum(1, left * p[order]))
  return p


def shown_p(p: float) -> str:
  """A p value as tables have it.

  Examples:
    >>> from gsgd_jax import statistics
    >>> statistics.shown_p(0.0001), statistics.shown_p(0.25)
    ('< 0.001', '0.250')
  """
  return '< 0.001' if p < 0.001 else f'{p:.3f}'


class Recovered(NamedTuple):
  """The share of a loss that was won back, and its 95 % interval."""

  share: float  # 1 is all of it.
  low: float
  high: float

  def __str__(self) -> str:
    share, low, high = (round(100 * v) for v in self)
    return f'{share} % ({low} to {high})'


def recovered(
  baseline: ArrayLike, delayed: ArrayLike, method: ArrayLike
) -> Recovered | None:
  r"""The share of the accuracy lost to delay that a method wins back.

  Of the gains :math:`g_i = m_i - d_i` and the losses :math:`l_i = b_i - d_i` of
  the seeds the share is :math:`\bar g / \bar l`. A ratio of two noisy means has
  no t interval of its own: its noise is skewed, and without bounds where the
  loss may be zero. Fieller's interval holds every share :math:`R` that a t-test
  of :math:`g_i - R\, l_i` against zero does not reject,

  .. math:: (\bar g - R\, \bar l)^2 \le t^2 (s_{gg} - 2 R s_{gl} + R^2 s_{ll})/n

  with the variances and the covariance of the pairs and Student's :math:`t` of
  :math:`n - 1` degrees of freedom. It is exact for normal values, keeps the
  pairing, and needs no random numbers, so it was preferred to a bootstrap,
  which is too narrow with few seeds. It is bounded exactly where the t
  interval of the loss excludes zero: just there a share is reported. Where that
  is a close call the interval is wide, and, as other losses go unreported, a
  little less sure than 95 %.

  Args:
    baseline: Accuracy without delay, one number a seed.
    delayed: Accuracy with delay, on the same seeds.
    method: Accuracy of a method that is to win the loss back, on these, too.

  Returns:
    A ``Recovered``; above 1 the method is better than the baseline, below 0
    worse than the delayed method. None where no loss is shown: its own 95 %
    interval contains zero or less, or there is one seed.

  Raises:
    ValueError: The shapes differ, or there is no seed.

  Examples:
    >>> from gsgd_jax import statistics
    >>> lost = [0.80, 0.82, 0.81, 0.79], [0.70, 0.71, 0.72, 0.69]
    >>> print(statistics.recovered(*lost, [0.75, 0.77, 0.76, 0.74]))
    50 % (43 to 56)

  References:
    Fieller. *Some Problems in Interval Estimation.* Journal of the Royal
    Statistical Society B 16(2), 1954.

    Franz. *Ratios: A Short Guide to Confidence Limits and Proper Use.*
    arXiv:0710.2024, 2007.
  """
  baseline, delayed, method = _same_seeds(baseline, delayed, method)
  n = len(delayed)
  gain, loss = method - delayed, baseline - delayed
  of_loss = interval(loss)
  if of_loss.half_width is None or of_loss.mean <= of_loss.half_width:
    return None
  noise = _quantile(n) ** 2 / n * np.cov(gain, loss)
  # The roots in R of a R^2 - 2 b R + c, with a above zero.
  a = loss.mean() ** 2 - noise[1, 1]
  b = gain.mean() * loss.mean() - noise[0, 1]
  c = gain.mean() ** 2 - noise[0, 0]
  reach = max(b**2 - a * c, 0) ** 0.5
  share = gain.mean() / loss.mean()
  return Recovered(float(share), float((b - reach) / a), float((b + reach) / a))


class GoodRates(NamedTuple):
  """Learning rates that are about as good as the best one."""

  best: float
  low: float
  high: float
  factor: float  # high / low.
  open_below: bool  # No rate below was tried that is worse.
  open_above: bool


def good_rates(
  tried: Mapping[float, ArrayLike], within: float = 0.01
) -> GoodRates:
  r"""The range of learning rates around the best that lose next to nothing.

  From the best rate the range reaches, on each side, to the first rate tried
  whose mean accuracy is more than ``within`` below the best. Between this one
  and its neighbour the accuracy is taken to be linear in :math:`\log \eta`, and
  the range ends where it crosses the threshold.

  Args:
    tried: Learning rate, above zero -> accuracy in [0, 1], one a seed. A rate
      without a number (NaN) is as bad as accuracy 0.
    within: How much accuracy a good rate may lose.

  Returns:
    A ``GoodRates``; of several equally good rates the smallest is the best.

  Raises:
    ValueError: No rate was tried.

  Examples:
    >>> from gsgd_jax import statistics
    >>> tried = {0.01: [0.5], 0.1: [0.9], 1.0: [0.895], 10.0: [0.885]}
    >>> found = statistics.good_rates(tried)
    >>> found.best, round(found.high, 2), found.open_above
    (0.1, 3.16, False)
  """
  if not tried:
    raise ValueError(
      'good_rates needs at least one learning rate that was tried'
    )
  rates = sorted(tried)
  accuracy = np.array([np.mean(np.asarray(tried[r], float)) for r in rates])
  accuracy = np.nan_to_num(accuracy, nan=0.0)
  best = int((accuracy >= accuracy.max() - _ROUNDING).argmax())
  above = accuracy - (accuracy[best] - within)
  high, open_above = _end(np.log(rates[best:]), above[best:])
  low, open_below = _end(np.log(rates[best::-1]), above[best::-1])
  # A rate that was tried is itself, not the exponential of its logarithm.
  low = rates[0] if open_below else float(np.exp(low))
  high = rates[-1] if open_above else float(np.exp(high))
  return GoodRates(rates[best], low, high, high / low, open_below, open_above)


def _end(log_rates, above):
  """Where accuracy falls below the threshold; the last rate if it does not."""
  bad = np.flatnonzero(above < -_ROUNDING)
  if not len(bad):
    return log_rates[-1], True
  i = bad[0]
  good = max(above[i - 1], 0)
  share = good / (good - above[i])
  return log_rates[i - 1] + share * (log_rates[i] - log_rates[i - 1]), False
