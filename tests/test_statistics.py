"""Statistics against plain loops, SciPy, and examples worked out by hand."""

import math

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from gsgd_jax import report, statistics


def test_interval_is_where_it_was():
  assert report.interval is statistics.interval
  assert report.Interval is statistics.Interval


def test_paired_is_scipys_test():
  rng = np.random.default_rng(0)
  for n in (2, 3, 10, 50):
    ours, theirs = rng.normal(0.9, 0.05, (2, n))
    found = statistics.paired(ours, theirs)
    expected = scipy.stats.ttest_rel(ours, theirs)
    np.testing.assert_allclose(found.p, expected.pvalue, rtol=1e-9)
    low, high = expected.confidence_interval()
    mean, half_width = found.difference
    np.testing.assert_allclose(
      [mean - half_width, mean + half_width], [low, high]
    )


def test_paired_without_a_t():
  assert statistics.paired([0.5, 0.7], [0.5, 0.7]).p == 1
  assert statistics.paired([2.0, 3.0], [1.0, 2.0]).p == 0.5
  found = statistics.paired(np.full(5, 1 / 3) + 0.1, np.full(5, 1 / 3))
  assert found.p == 2.0**-4
  alone = statistics.paired([0.7], [0.5])
  assert math.isnan(alone.p) and alone.difference.half_width is None


@pytest.mark.parametrize('theirs', [[1.0], [[1.0, 2.0]], []])
def test_seeds_must_be_the_same(theirs):
  with pytest.raises(ValueError, match='of the same seeds, is needed, got'):
    statistics.paired([1.0, 2.0], theirs)
  with pytest.raises(ValueError, match='is needed, got'):
    statistics.paired([], [])
  with pytest.raises(ValueError, match='is needed, got'):
    statistics.recovered([1.0, 2.0], [1.0, 2.0], theirs)


def holm(p_values):
  """As the paper goes: smallest first, each times the hypotheses left."""
  order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
  adjusted = [math.nan] * len(p_values)
  highest = 0.0
  for rank, (p, i) in enumerate(order):
    highest = max(highest, min(1.0, (len(order) - rank) * p))
    adjusted[i] = highest
  return adjusted


def test_holm_by_hand():
  # 4 * 0.01, 3 * 0.02, 2 * 0.03 and 1 * 0.035, which may not be below.
  adjusted = statistics.holm([0.035, 0.01, 0.03, 0.02])
  np.testing.assert_allclose(adjusted, [0.06, 0.04, 0.06, 0.06])
  np.testing.assert_allclose(statistics.holm([0.7, 0.6]), [1, 1])
  np.testing.assert_array_equal(
    statistics.holm([np.nan, 0.02, np.nan, 0.5]), [np.nan, 0.04, np.nan, 0.5]
  )
  assert statistics.holm([]).shape == (0,)


@hypothesis.given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan))))
def test_holm_is_the_papers_loop(p_values):
  np.testing.assert_allclose(statistics.holm(p_values), holm(p_values))


def pairs_of(seed, n=12, loss=0.1, share=0.6, noise=0.02):
  """Accuracies that vary by seed together, and each on its own."""
  rng = np.random.default_rng(seed)
  common = rng.normal(0, 0.03, n)
  means = (0.9, 0.9 - loss, 0.9 - loss + share * loss)
  return [mean + common + rng.normal(0, noise, n) for mean in means]


@pytest.mark.parametrize('seed', range(4))
def test_recovered_holds_the_shares_that_no_t_test_rejects(seed):
  baseline, delayed, method = pairs_of(seed)
  found = statistics.recovered(baseline, delayed, method)
  gain, loss = method - delayed, baseline - delayed
  assert found.share == pytest.approx(gain.mean() / loss.mean())
  for share in np.linspace(found.low - 0.5, found.high + 0.5, 101):
    p = scipy.stats.ttest_1samp(gain - share * loss, 0).pvalue
    assert (p > 0.05) == (found.low < share < found.high)


def test_recovered_covers_the_share():
  tries = 1500
  covered = 0
  for seed in range(tries):
    found = statistics.recovered(*pairs_of(seed, n=8))
    covered += found.low <= 0.6 <= found.high
  assert 0.93 < covered / tries < 0.97  # Three deviations about 95 %.


def test_no_share_of_a_loss_that_is_not_shown():
  assert statistics.recovered(*pairs_of(0, loss=0.0)) is None
  assert statistics.recovered(*pairs_of(0, loss=-0.1)) is None
  assert statistics.recovered([0.9], [0.8], [0.85]) is None
  # Its interval is bounded exactly where that of the loss excludes zero.
  for loss in np.linspace(0.0, 0.04, 21):
    baseline, delayed, method = pairs_of(1, loss=loss)
    measured = statistics.interval(baseline - delayed)
    found = statistics.recovered(baseline, delayed, method)
    assert (found is not None) == (measured.mean > measured.half_width)
    assert found is None or found.low < found.share < found.high


def test_recovered_without_noise():
  found = statistics.recovered([1.0, 1.0], [0.5, 0.5], [0.75, 0.75])
  assert found == (0.5, 0.5, 0.5) and str(found) == '50 % (50 to 50)'


def good_rates(tried, within):
  """Walks from the best rate in small steps while accuracy is good."""
  rates = sorted(tried)
  accuracy = [sum(tried[r]) / len(tried[r]) for r in rates]
  best = accuracy.index(max(accuracy))
  logs = [math.log(r) for r in rates]
  ends = []
  for step in (-1e-4, 1e-4):
    at = logs[best]
    while logs[0] <= at <= logs[-1]:
      if np.interp(at, logs, accuracy) < accuracy[best] - within:
        break
      at += step
    ends.append(math.exp(at))
  return rates[best], *ends


@pytest.mark.parametrize('seed', range(6))
def test_good_rates_are_those_of_a_walk(seed):
  rng = np.random.default_rng(seed)
  rates = 10.0 ** np.arange(-2, 1.1, 0.5)
  tried = {
    float(rate): 0.9 - 0.02 * np.log10(rate / 0.2) ** 2 + noise
    for rate, noise in zip(rates, rng.normal(0, 0.003, (7, 4)), strict=True)
  }
  found = statistics.good_rates(tried)
  best, low, high = good_rates(tried, 0.01)
  assert found.best == best
  np.testing.assert_allclose([found.low, found.high], [low, high], rtol=2e-4)
  np.testing.assert_allclose(found.factor, high / low, rtol=4e-4)


def test_good_rates_by_hand():
  # Half way down from 0.90 to 0.88 in the logarithm; a second top is no part.
  tried = {0.01: [0.88], 0.1: [0.9], 1.0: [0.88], 10.0: [0.9]}
  found = statistics.good_rates(tried)
  assert found.best == 0.1 and not found.open_below and not found.open_above
  np.testing.assert_allclose([found.low, found.high], [0.1**1.5, 0.1**0.5])
  np.testing.assert_allclose(found.factor, 10)


def test_good_rates_may_be_open():
  tried = {1.0: [0.9, 0.8], 0.1: [0.85, 0.85], 0.01: [0.84, 0.84]}
  assert statistics.good_rates(tried) == (0.1, 0.01, 1.0, 100.0, True, True)
  assert statistics.good_rates({0.5: [0.3]}) == (0.5, 0.5, 0.5, 1, True, True)
  found = statistics.good_rates({0.1: [0.9], 1.0: [np.nan]})
  assert found.open_below and not found.open_above and found.high < 0.11
  with pytest.raises(ValueError, match='at least one learning rate'):
    statistics.good_rates({})
