"""The largest stable steps: the library, theory, and what the page says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gsgd_jax
from benchmarks import stability

LINEAR = [n for n, m in stability.METHODS.items() if m.radius is not None]
PAGE = (stability.DOCS / 'stability.md').read_text()

# Of the rules that change within a cycle: its calls, of N.
CALLS = {
  'smega2': lambda n: n,
  'delayed_nesterov': lambda n: n,
  'drop_stale': lambda n: n,
  'rennala': lambda n: 2 * n - 1,
}


@functools.cache
def theory(name, tau):
  return stability.theory(stability.METHODS[name], tau)


def tables():
  """The page's tables: names to numbers, by the first cell of the head."""
  found, name = {}, None
  for line in PAGE.splitlines():
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    if not line.startswith('|'):
      name = None
    elif name is None:
      name, found[cells[0]] = cells[0], {}
    elif not cells[0].startswith('---'):
      found[name][cells[0]] = cells[1:]
  return found


def printed():
  """The measured nominal steps as the page has them."""
  rows = tables()['method']
  # Two tables begin with the methods: that of numbers is the second.
  return {
    name: [float(x) for x in rows[method.label][: len(stability.TAUS)]]
    for name, method in stability.METHODS.items()
  }


@pytest.mark.parametrize(
  'name, tau',
  [
    (name, tau)
    for name in LINEAR
    for tau in (0, 1, 3, 7)
    # Of SGD with another rate one tau is enough.
    if tau == 3 or name not in ('inverse', 'polynomial', 'adaptive')
  ],
)
def test_the_library_agrees_with_theory(name, tau):
  around = np.array([0.1, 0.5, 0.9, 0.999, 1.001])
  cycle = stability.Cycle(stability.METHODS[name], tau)
  radii = cycle.spectral_radii(theory(name, tau) * around)
  assert (radii < 1).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize('name', ['heavy_ball', 'dana', 'delayed_nesterov'])
def test_bisection_through_the_library(name):
  found = stability.measured(stability.METHODS[name], 3)
  assert found == pytest.approx(theory(name, 3), rel=1e-4)


@pytest.mark.parametrize(
  'name, known',
  [
    ('sgd', [2, 1, 0.445042, 0.209057, 0.101298, 0.049861, 0.024736]),
    ('heavy_ball', [3.8, 0.1, 0.03478, 0.01575, 0.00793, 0.00418, 0.00222]),
  ],
)
def test_theory_agrees_with_known_values(name, known):
  for tau, value in zip(stability.TAUS, known, strict=True):
    assert theory(name, tau) == pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize('tau', stability.TAUS)
def test_closed_forms(tau):
  sgd = lambda tau: 2 * math.sin(math.pi / (2 * (2 * tau + 1)))
  near = functools.partial(pytest.approx, rel=1e-5)
  assert theory('sgd', tau) == near(sgd(tau))
  assert theory('drop_stale', tau) == near(sgd(tau // 2))
  assert theory('exact', tau) == theory('rennala', tau) == near(2)
  assert theory('inverse', tau) == near(sgd(tau) * max(tau, 1))
  assert theory('asynchronous_nesterov_09', tau) == near(
    10 * theory('nesterov', tau)
  )


@pytest.mark.parametrize('name', LINEAR)
def test_weights(name):
  """After tiny steps a mode is left that shrinks by what gradients weigh."""
  method = stability.METHODS[name]
  for tau in (0, 1, 7):
    weight, calls = method.weight(tau + 1), 1
    if name in CALLS:
      calls = CALLS[name](tau + 1)
    radius = method.radius(1e-7 / weight, tau)
    assert -math.log(radius) / calls == pytest.approx(1e-7, rel=1e-3)


@pytest.mark.parametrize('name', LINEAR)
@pytest.mark.parametrize('tau', [0, 3, 15])
def test_stable_below_and_nowhere_above(name, tau):
  radius = stability.METHODS[name].radius
  end = theory(name, tau)
  assert all(radius(end * x, tau) < 1 for x in np.geomspace(1e-4, 0.999, 60))
  assert all(radius(end * x, tau) > 1 for x in np.geomspace(1.001, 100, 60))


@pytest.mark.parametrize(
  'name, tau',
  [
    ('sgd', 7),
    ('exact', 3),
    ('rennala', 3),
    ('predicted_heavy_ball', 3),
    ('dana', 3),
    ('dana_slim', 3),
    ('smega2', 7),
    ('delayed_nesterov', 3),
  ],
)
def test_long_runs_shrink_below_and_grow_above(name, tau):
  run = stability.Run(stability.METHODS[name], tau, cycles=800)
  end = theory(name, tau)
  below, above = run.sizes(np.array([0.98 * end, 1.02 * end]))
  assert below[3] < below[1] / 2
  assert above[3] > 2 * above[1]


def test_what_a_run_cannot_reach_does_not_count():
  maps = np.array([np.diag([0.5, 2.0, 1.0]), np.diag([0.5, 2.0, 3.0])])
  product = lambda vectors: np.einsum('mij,mj->mi', maps, vectors)
  start = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]) / math.sqrt(2)
  radii = stability.krylov_radii(product, start)
  np.testing.assert_allclose(radii, [1, 2])


def test_krylov_radii_of_full_matrices():
  maps = np.random.default_rng(0).normal(size=(4, 6, 6))
  product = lambda vectors: np.einsum('mij,mj->mi', maps, vectors)
  start = np.ones([4, 6]) / math.sqrt(6)
  np.testing.assert_allclose(
    stability.krylov_radii(product, start),
    np.abs(np.linalg.eigvals(maps)).max(axis=1),
  )


def test_the_page_has_every_method_and_agrees_with_theory():
  for name in LINEAR:
    for tau, value in zip(stability.TAUS, printed()[name], strict=True):
      assert value == pytest.approx(theory(name, tau), rel=1e-3)


@pytest.mark.parametrize(
  'name', ['delay_compensation', 'adaptive_compensation', 'dana_dc', 'braking']
)
def test_the_page_agrees_with_runs(name):
  found = stability.measured(stability.METHODS[name], 3)
  at = stability.TAUS.index(3)
  assert printed()[name][at] == pytest.approx(found, rel=5e-3)


def test_the_page_is_what_the_command_writes():
  expected = {
    name: [theory(name, tau) for tau in stability.TAUS] for name in LINEAR
  }
  again = stability.page(printed(), expected)
  words = lambda text: [x for x in text.splitlines() if not x.startswith('|')]
  assert words(PAGE) == words(again)
  # The page's ratios are of more digits than it prints.
  numbers = lambda text: re.findall(r'(?<= )\d+\.\d\d(?= )', text)
  ratios = stability.ratio_table(printed())
  head = ratios.splitlines()[0]
  (ours,) = re.findall(re.escape(head) + r'\n(.*?)\n\n', PAGE, flags=re.DOTALL)
  np.testing.assert_allclose(
    [float(x) for x in numbers(ours)],
    [float(x) for x in numbers(ratios)],
    rtol=0,
    atol=0.03,
  )
  assert (stability.DOCS / 'images' / 'stability.png').exists()


def test_what_the_page_reads_from_the_figures():
  sgd = {tau: theory('sgd', tau) for tau in stability.TAUS}

  def over_sgd(name, *taus):
    weight = stability.METHODS[name].weight
    return np.array([theory(name, t) * weight(t + 1) / sgd[t] for t in taus])

  late = (3, 7, 15, 31, 63)
  assert over_sgd('heavy_ball', 0, 1) == pytest.approx([19, 1], rel=1e-4)
  heavy_ball = over_sgd('heavy_ball', *late)
  assert np.all((heavy_ball > 0.75) & (heavy_ball < 0.9))
  for name in ('dana', 'smega2', 'delayed_nesterov'):
    assert np.all(over_sgd(name, *stability.TAUS) > 2.5)
  assert np.all(over_sgd('spike', 1, 3, 7) > 1.1)
  assert over_sgd('spike', 15, 31, 63) == pytest.approx(1, abs=0.02)
  helps = over_sgd('predicted_heavy_ball', *late) > heavy_ball
  assert helps.tolist() == [True, True, True, False, False]
  ahead = over_sgd('predicted_sgd', 1, *late)
  assert np.all((ahead > 0.59) & (ahead < 0.62))
  dropped = over_sgd('drop_stale', *stability.TAUS)
  assert np.all((dropped > 1 - 1e-5) & (dropped < 1.125))
  rennala = over_sgd('rennala', 1, *late)
  assert np.all((rennala > 0.63) & (rennala < 0.67))


def test_above_its_end_delay_compensation_goes_round():
  run = stability.Run(stability.METHODS['delay_compensation'], 3, cycles=400)
  ((_, second, _, last),) = run.sizes(np.array([0.53]))
  assert 2 < last < 3 and last == pytest.approx(second, rel=1e-3)


def test_from_afar_delay_compensation_ends_earlier(monkeypatch):
  monkeypatch.setattr(stability, 'START', 30.0)
  found = stability.measured(stability.METHODS['delay_compensation'], 3)
  assert found == pytest.approx(0.039, abs=5e-4)


def test_of_one_parameter_full_braking_stops():
  tx = gsgd_jax.asynchronous(gsgd_jax.adaptive_braking(0.01), workers=4)

  def step(carry, _):
    w, state = carry
    updates, state = tx.update(w, state, w)
    return (w + updates, state), w

  w = jnp.ones([])
  # The square of 0.9^3364, what is left of the momentum, is nothing any more.
  _, ws = jax.lax.scan(step, (w, tx.init(w)), length=3000)
  # The first gradient, with what momentum makes of it, and no other.
  assert ws[-1] == pytest.approx(0.9)
