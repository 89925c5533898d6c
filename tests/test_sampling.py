"""Random durations: the right distributions, in exact arithmetic."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from gsgd_jax import _sampling, clock

uint32 = st.integers(0, 2**32 - 1)
KEY = np.array([1, 2], np.uint32)


def gamma(cv):
  return scipy.stats.gamma(1 / cv**2, scale=cv**2)


DISTRIBUTIONS = {
  **{
    f'gamma {cv}': (_sampling.gamma_quantile(cv), gamma(cv))
    for cv in (1e-3, 0.1, 0.6, 1.0, 1.5)
  },
  'exponential': (_sampling.exponential_quantile, scipy.stats.expon()),
  'uniform': (lambda p: 0.5 + p, scipy.stats.uniform(0.5, 1)),
}


@pytest.mark.parametrize('name', DISTRIBUTIONS)
def test_quantiles(name):
  quantile, expected = DISTRIBUTIONS[name]
  p = np.array([1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 2**-22])
  np.testing.assert_allclose(quantile(p), expected.ppf(p), rtol=1e-6)


@pytest.mark.parametrize('name', DISTRIBUTIONS)
def test_draws(name):
  """Kolmogorov and Smirnov's test, and the first moments."""
  quantile, expected = DISTRIBUTIONS[name]
  table = _sampling.table(quantile)
  counters = np.arange(100_000, dtype=np.int32)
  draw = jax.jit(lambda *counters: _sampling.draw(table, KEY, counters))
  drawn = np.asarray(draw(counters // 100, counters % 100), np.float64)
  drawn /= 2**table.bits
  assert scipy.stats.kstest(drawn, expected.cdf).pvalue > 1e-3
  errors = expected.std() / len(drawn) ** 0.5
  assert abs(drawn.mean() - 1) < 4 * errors
  np.testing.assert_allclose(drawn.std(), expected.std(), rtol=0.03)


@given(a=uint32, b=uint32)
def test_products_are_those_of_integers(a, b):
  high, low = _sampling._product(jnp.uint32(a), jnp.uint32(b))
  assert int(high) * 2**32 + int(low) == a * b


@given(
  a=st.integers(0, 2**31 - 1),
  b=st.integers(0, 2**31 - 1),
  bits=st.integers(16, 30),
  more=st.integers(16, 30),
)
def test_times_are_exact_to_the_tick_below(a, b, bits, more):
  def ticks(time):
    return int(time.whole) * clock.TICKS + int(time.ticks)

  a32, b32 = jnp.uint32(a), jnp.uint32(b)
  alone = ticks(_sampling.as_time(a32, bits))
  assert alone == math.floor(a * 2**30 / 2**bits)
  both = ticks(_sampling.product(a32, bits, b32, more))
  assert both == (a * b * 2**30) >> (bits + more)


@pytest.mark.usefixtures('as_users_compile_it')
def test_the_same_bits_alone_and_together():
  table = _sampling.table(_sampling.gamma_quantile(0.6))
  draw = lambda first, second: _sampling.product(
    _sampling.draw(table, KEY, (first, second)),
    table.bits,
    jnp.uint32(12345678),
    27,
  )
  counters = np.arange(200, dtype=np.int32)
  together = jax.jit(jax.vmap(draw))(counters, counters[::-1])
  pairs = zip(counters, counters[::-1], strict=True)
  alone = [jax.jit(draw)(*pair) for pair in pairs]
  np.testing.assert_array_equal(together.whole, [t.whole for t in alone])
  np.testing.assert_array_equal(together.ticks, [t.ticks for t in alone])


@given(key=st.tuples(uint32, uint32), counters=st.tuples(uint32, uint32))
def test_threefry_is_jaxs(key, counters):
  expected = jax.extend.random.threefry_2x32(
    jnp.array(key, jnp.uint32), jnp.array(counters, jnp.uint32)
  )
  ours = _sampling.threefry(
    jnp.array(key, jnp.uint32), *map(jnp.uint32, counters)
  )
  assert list(map(int, ours)) == expected.tolist()
