"""The largest stable step of every method, by staleness.

  python -m benchmarks.stability
  python -m benchmarks.stability --docs

On f(w) = c w^2 / 2 with c = 1 and N = tau + 1 round-robin workers every
gradient is tau updates late. For each method and tau this finds the largest
nominal step, eta c, with which w goes to 0, and prints it as a Markdown table.
With --docs it writes docs/stability.md and its picture.

Measured through the library. A linear method is run for one *cycle* of calls
after which everything but the numbers has come round again. That is a linear
map of the numbers in parameters and state. It is restricted to what a run can
reach from its w_0 (some state is redundant: DANA keeps the sum of its momenta
beside the momenta), and stable is where its spectral radius is below 1. A
method that is not linear is run for long from a stated w_0.

Theory, in plain NumPy, from the published update rules: the roots of the
characteristic polynomial, or the eigenvalues over a cycle where the rule
changes within one.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags

import gsgd_jax

_DOCS = flags.DEFINE_bool('docs', False, 'Whether to write docs/stability.md.')

DOCS = pathlib.Path(__file__).parents[1] / 'docs'

TAUS = (0, 1, 3, 7, 15, 31, 63)
MOMENTUM = 0.9
BRAKE = 0.5  # At the default of 1 a single parameter stops where it is.
START = 1.0  # w_0, where it matters.
CYCLES = 4000  # Of N calls, of a method that is not linear.
ESCAPED = 1e3  # Times w_0: it does not come back.
GONE = 1e-9  # Times w_0: it has shrunk, whatever it does from here.

_SMALLEST, _LARGEST = 3e-4, 500.0  # Nominal steps that are tried.
_AT_ONCE = 24  # Steps that are tried together.
_REDUNDANT = 1e-10  # A new direction that is smaller is rounding.
_SHARE = 1e-8  # And a mode of which the start has less.


class Method(NamedTuple):
  """A method, and what is known about it."""

  label: str
  inner: Callable[[Any, int], optax.GradientTransformation]  # Of eta and N.
  # What an arriving gradient weighs in the end over eta, on average; of N.
  weight: Callable[[int], float]
  # The spectral radius of eta and tau; None if it is not linear.
  radius: Callable[[float, int], float] | None
  worker_transform: optax.GradientTransformation | None = None
  cycle: Callable[[int], int] = lambda n: n  # Calls, of N.

  def transformation(self, eta, workers):
    return gsgd_jax.asynchronous(
      self.inner(eta, workers),
      workers,
      worker_transform=self.worker_transform,
      batch_like=1.0,
      keep_params=True,
    )


def largest_stable(
  stable: Callable[[np.ndarray], np.ndarray], tolerance: float
) -> float:
  """The end of the stable steps, by a bisection into many parts at a time."""
  low, high = _SMALLEST, _LARGEST
  while high / low > 1 + tolerance:
    etas = np.geomspace(low, high, _AT_ONCE + 1)[1:]
    found = stable(etas)
    # The first that is unstable: what lies beyond it does not count.
    first = len(found) - 1 if found.all() else int(np.argmin(found))
    low, high = etas[first - 1] if first else low, etas[first]
  return math.sqrt(low * high)


# Theory: the roots of z^tau A(z) + eta B(z), where B / A is what a gradient
# does to the parameters that workers read.


def _roots(rational, eta, tau):
  numerator, denominator = rational(tau)
  delayed = np.concatenate([denominator, np.zeros(tau)])
  polynomial = np.polyadd(delayed, eta * np.asarray(numerator))
  return np.abs(np.roots(polynomial)).max()


def polynomial(rational):
  """A radius from `tau -> (B, A)`, highest powers first."""
  return functools.partial(_roots, rational)


def _momentum(m):
  """(z - 1)(z - m)."""
  return np.polymul([1.0, -1.0], [1.0, -m])


def _plain(scale):
  return lambda tau: ([scale(tau)], [1.0, -1.0])


def _heavy_ball(tau):
  del tau
  return [1.0, 0.0], _momentum(MOMENTUM)


def _nesterov(m, scale=1.0):
  return lambda tau: (scale * np.array([1 + m, -m]), _momentum(m))


def _spike(tau):
  """w -= eta (a v + b g), with v = g z / (z - m)."""
  a = MOMENTUM**tau
  b = (1 - a) / (1 - MOMENTUM)
  return [a + b, -b * MOMENTUM], _momentum(MOMENTUM)


def _ahead(tau):
  """What reads w_t + tau (w_t - w_{t-1}), times z."""
  return [1.0 + tau, -float(tau)]


def _predicted_sgd(tau):
  return _ahead(tau), [1.0, -1.0, 0.0]


def _predicted_heavy_ball(tau):
  return _ahead(tau), _momentum(MOMENTUM)


def _dana(tau):
  """v of a worker is m times what it was N updates ago, plus g.

  With V(z) its transform the sum of all is V (1 - z^-N) / (1 - z^-1), so that
  the reads are -eta V (1 + m (1 - z^-N)) / (z - 1).
  """
  n = tau + 1
  worker = np.zeros(n + 1)
  worker[0], worker[-1] = 1.0, -MOMENTUM
  numerator = np.zeros(n + 1)
  numerator[0], numerator[-1] = 1 + MOMENTUM, -MOMENTUM
  return numerator, np.polymul([1.0, -1.0], worker)


# Theory where the rule changes within a cycle: the rule itself, run on vectors.
# A vector is what a number is of the numbers at the cycle's start.


def _spectral_radius(rows):
  return np.abs(np.linalg.eigvals(np.stack(rows))).max()


def smega2(eta, tau):
  n, m = tau + 1, MOMENTUM
  w, v, *reads = np.eye(2 + tau)  # Of the others' reads, the oldest first.
  total = np.zeros(2 + tau)
  for k in range(n):
    ahead = (n + k * (m - 1)) * v + (k / n) * total
    reads.append(w - eta * m * ahead)
    g = reads.pop(0)
    w = w - eta * (g + m * v)
    total = total + g
  v = m * v + total / n
  return _spectral_radius([w, v, *reads])


def delayed_nesterov(eta, tau):
  n, b = tau + 1, MOMENTUM
  w, v, *reads = np.eye(2 + tau)
  total = np.zeros(2 + tau)
  for k in range(n):
    reads.append(w)
    g = reads.pop(0)
    total = total + g
    w = w - eta * g / n
    if k == n - 1:
      v = b * v + total / n
      w = w - eta * b * v
  return _spectral_radius([w, v, *reads])


def rennala(eta, tau):
  """N kept gradients make an update, N - 1 that were on their way are late."""
  n = tau + 1
  return _with_refusals(eta, tau, calls=2 * n - 1, size=n, most=0)


def drop_stale(eta, tau):
  return _with_refusals(eta, tau, calls=tau + 1, size=1, most=tau // 2)


def _with_refusals(eta, tau, calls, size, most):
  """Every `size` gradients that are at most `most` updates old make one."""
  version, kept = 0, 0
  read_at = [0] * (tau + 1)  # In the order of arrival.
  # As long as it takes for who is refused to repeat itself.
  settling = 2 * calls
  w, *reads = np.zeros([1 + tau, 1 + tau])
  total = np.zeros(1 + tau)
  for t in range(settling + calls):
    if t == settling:
      assert kept == 0  # Nothing else is to be remembered.
      w, *reads = np.eye(1 + tau)
    reads.append(w)
    g, age = reads.pop(0), version - read_at.pop(0)
    if age <= most:
      total, kept = total + g, kept + 1
    if kept == size:
      w, version = w - eta * total / size, version + 1
      total, kept = np.zeros(1 + tau), 0
    read_at.append(version)
  return _spectral_radius([w, *reads])


_nominal = lambda n: 1.0
_by_momentum = lambda n: 1 / (1 - MOMENTUM)
_inverse = lambda tau: 1 / max(tau, 1)
_polynomial = lambda tau: (1 + tau) ** -0.5
_sgd = polynomial(_plain(lambda tau: 1.0))


def _corrected(correction):
  return lambda eta, n: optax.chain(correction(n), optax.sgd(eta))


def _scaled(rule):
  return _corrected(lambda n: gsgd_jax.scale_by_staleness(rule, workers=n))


def _loss(w, curvature):
  return curvature * w**2 / 2


METHODS = {
  'sgd': Method('SGD', lambda eta, n: optax.sgd(eta), _nominal, _sgd),
  'inverse': Method(
    "SGD, `scale_by_staleness('inverse')`",
    _scaled('inverse'),
    lambda n: _inverse(n - 1),
    polynomial(_plain(_inverse)),
  ),
  'polynomial': Method(
    "SGD, `scale_by_staleness('polynomial')`",
    _scaled('polynomial'),
    lambda n: _polynomial(n - 1),
    polynomial(_plain(_polynomial)),
  ),
  'adaptive': Method(
    "SGD, `scale_by_staleness('adaptive')`", _scaled('adaptive'), _nominal, _sgd
  ),
  'exact': Method(
    'SGD, `exact_delay_compensation(trust=None)`',
    _corrected(lambda n: gsgd_jax.exact_delay_compensation(_loss, trust=None)),
    _nominal,
    # What arrives is the gradient here: no delay.
    lambda eta, tau: abs(1 - eta),
  ),
  'predicted_sgd': Method(
    'SGD, `predict(horizon=tau)`',
    lambda eta, n: gsgd_jax.predict(optax.sgd(eta), n - 1),
    _nominal,
    polynomial(_predicted_sgd),
  ),
  'drop_stale': Method(
    'SGD, `drop_stale(max_staleness=tau // 2)`',
    lambda eta, n: gsgd_jax.drop_stale(optax.sgd(eta), (n - 1) // 2),
    lambda n: ((n - 1) // 2 + 1) / n,
    drop_stale,
  ),
  'rennala': Method(
    'SGD, `rennala(size=N)`',
    lambda eta, n: gsgd_jax.rennala(optax.sgd(eta), n),
    lambda n: 1 / (2 * n - 1),
    rennala,
    # Rounds of 2 N - 1 calls, and N workers in turn.
    cycle=lambda n: n * (2 * n - 1),
  ),
  'heavy_ball': Method(
    'heavy ball',
    lambda eta, n: optax.sgd(eta, momentum=MOMENTUM),
    _by_momentum,
    polynomial(_heavy_ball),
  ),
  'nesterov': Method(
    'Nesterov',
    lambda eta, n: optax.sgd(eta, momentum=MOMENTUM, nesterov=True),
    _by_momentum,
    polynomial(_nesterov(MOMENTUM)),
  ),
  'spike': Method(
    '`spike_compensation(delay=tau)`',
    lambda eta, n: gsgd_jax.spike_compensation(eta, n - 1, MOMENTUM),
    _by_momentum,
    polynomial(_spike),
  ),
  'predicted_heavy_ball': Method(
    'heavy ball, `predict(horizon=tau)`',
    lambda eta, n: gsgd_jax.predict(optax.sgd(eta, momentum=MOMENTUM), n - 1),
    _by_momentum,
    polynomial(_predicted_heavy_ball),
  ),
  'dana': Method(
    '`dana`',
    lambda eta, n: gsgd_jax.dana(eta, n, MOMENTUM),
    _by_momentum,
    polynomial(_dana),
  ),
  'dana_slim': Method(
    'DANA-Slim',
    lambda eta, n: optax.sgd(eta),
    _by_momentum,
    polynomial(_dana),
    worker_transform=optax.trace(MOMENTUM, nesterov=True),
  ),
  'smega2': Method(
    '`smega2`',
    lambda eta, n: gsgd_jax.smega2(eta, n, MOMENTUM),
    _by_momentum,
    smega2,
  ),
  'delayed_nesterov': Method(
    '`delayed_nesterov`',
    lambda eta, n: gsgd_jax.delayed_nesterov(eta, n, MOMENTUM),
    lambda n: 1 / (n * (1 - MOMENTUM)),
    delayed_nesterov,
  ),
  'asynchronous_nesterov': Method(
    '`asynchronous_nesterov`, c = 0.99',
    lambda eta, n: gsgd_jax.asynchronous_nesterov(eta),
    _nominal,
    polynomial(_nesterov(0.99, 1 - 0.99)),
  ),
  'asynchronous_nesterov_09': Method(
    '`asynchronous_nesterov`, c = 0.9',
    lambda eta, n: gsgd_jax.asynchronous_nesterov(eta, 0.9),
    _nominal,
    polynomial(_nesterov(0.9, 1 - 0.9)),
  ),
  'delay_compensation': Method(
    'SGD, `delay_compensation(0.04)`',
    _corrected(lambda n: gsgd_jax.delay_compensation()),
    _nominal,
    None,
  ),
  'adaptive_compensation': Method(
    'SGD, `delay_compensation(2.0, adaptive=True)`',
    _corrected(lambda n: gsgd_jax.delay_compensation(adaptive=True)),
    _nominal,
    None,
  ),
  'dana_dc': Method(
    'DANA-DC, lam 2',
    lambda eta, n: optax.chain(
      gsgd_jax.delay_compensation(2.0), gsgd_jax.dana(eta, n, MOMENTUM)
    ),
    _by_momentum,
    None,
  ),
  'braking': Method(
    '`adaptive_braking(strength=0.5)`',
    lambda eta, n: gsgd_jax.adaptive_braking(eta, MOMENTUM, BRAKE),
    lambda n: (1 - BRAKE) / (1 - MOMENTUM),
    None,
  ),
}


def theory(method: Method, tau: int) -> float:
  """The largest stable nominal step of a linear method."""
  radius = method.radius
  assert radius is not None
  stable = lambda etas: np.array([radius(e, tau) < 1 for e in etas])
  return largest_stable(stable, 1e-6)


# Measured.


def call(tx, w, state):
  """One call of the library on w^2 / 2; its batch is the curvature."""
  curvature = jnp.ones([])
  gradient = jax.grad(_loss)(gsgd_jax.worker_params(w, state), curvature)
  updates, state = tx.update(gradient, state, w, batch=curvature)
  return optax.apply_updates(w, updates), state


def _begin(method, eta, workers, start):
  w = jnp.full([], start, float)
  return w, method.transformation(eta, workers).init(w)


def _calls(method, eta, workers, carry, length):
  tx = method.transformation(eta, workers)
  return jax.lax.scan(
    lambda carry, _: (call(tx, *carry), carry[0]), carry, length=length
  )


class _Numbers:
  """A carry's floating-point numbers as one vector, and all the rest."""

  def __init__(self, carry):
    leaves, self._tree = jax.tree.flatten(carry)
    self._like = [x if self._floating(x) else None for x in leaves]

  @staticmethod
  def _floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)

  def apart(self, carry):
    leaves = jax.tree.leaves(carry)
    vector = [x.ravel() for x in leaves if self._floating(x)]
    return jnp.concatenate(vector), [x for x in leaves if not self._floating(x)]

  def together(self, vector, rest):
    rest, leaves, at = list(rest), [], 0
    for like in self._like:
      if like is None:
        leaves.append(rest.pop(0))
        continue
      part = vector[at : at + like.size]
      leaves.append(part.reshape(like.shape).astype(like.dtype))
      at += like.size
    return jax.tree.unflatten(self._tree, leaves)


class Cycle:
  """A cycle of a linear method as a map of its numbers, for many steps eta."""

  def __init__(self, method: Method, tau: int):
    self._method, self._workers = method, tau + 1
    self._numbers = _Numbers(_begin(method, 1.0, self._workers, 0.0))
    several = jax.vmap(self._one, in_axes=(0, 0, None))
    self._several = jax.jit(several)

  def _one(self, eta, vector, rest):
    length = self._method.cycle(self._workers)
    carry = self._numbers.together(vector, rest)
    carry, _ = _calls(self._method, eta, self._workers, carry, length)
    return self._numbers.apart(carry)

  def _at(self, etas, vectors, rest):
    vectors, rests = self._several(etas, vectors, rest)
    # Counters: neither eta nor the numbers have a say in what they do.
    return np.asarray(vectors), [x[0] for x in rests]

  def spectral_radii(self, etas: np.ndarray) -> np.ndarray:
    """For each eta, on what a run from w_0 reaches; infinite if it overflows.

    What is not shaped like the parameters (an offset's scale) is as in the run
    from w_0 = 0, to which all is compared.
    """
    begin = lambda start: self._numbers.apart(
      _begin(self._method, 1.0, self._workers, start)
    )
    (zero, rest), (one, _) = begin(0.0), begin(1.0)
    zeros = np.tile(zero, [len(etas), 1])
    vectors = np.tile(one - zero, [len(etas), 1])
    finite = np.ones(len(etas), bool)

    def difference(vectors, zeros, rest, stayed):
      moved, _ = self._at(etas, zeros + _unit(vectors), rest)
      # Also of what would overflow in a norm.
      fine = np.all(np.abs(moved) < 1e150, axis=1)
      finite[~fine] = False
      return np.where(fine[:, None], moved - stayed, 0)

    for _ in range(3):  # Until all workers are as late as they will be.
      stayed, after = self._at(etas, zeros, rest)
      vectors = difference(vectors, zeros, rest, stayed)
      zeros, rest = stayed, after
    stayed, _ = self._at(etas, zeros, rest)
    product = lambda vectors: difference(vectors, zeros, rest, stayed)
    radii = krylov_radii(product, _unit(vectors))
    return np.where(finite, radii, np.inf)


def _unit(vectors):
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.where(norms > 0, norms, 1)


def krylov_radii(
  product: Callable[[np.ndarray], np.ndarray], start: np.ndarray
) -> np.ndarray:
  """Spectral radii on the smallest invariant subspaces that hold `start`.

  Arnoldi's method, orthogonalised twice, for many maps at a time.

  Args:
    product: Vectors, shape=(maps, size), to their images.
    start: shape=(maps, size).

  Returns:
    shape=(maps,)
  """
  maps, size = start.shape
  basis = np.zeros([maps, size + 1, size])
  small = np.zeros([maps, size + 1, size])
  basis[:, 0] = start
  for j in range(size):
    image = product(basis[:, j])
    norm = np.linalg.norm(image, axis=1)
    for _ in range(2):
      known = basis[:, : j + 1]
      part = np.einsum('mks,ms->mk', known, image)
      image = image - np.einsum('mks,mk->ms', known, part)
      small[:, : j + 1, j] += part
    rest = np.linalg.norm(image, axis=1)
    new = rest > _REDUNDANT * norm
    small[:, j + 1, j] = np.where(new, rest, 0)
    basis[:, j + 1] = np.where(new[:, None], _unit(image), 0)
    if not new.any():
      break
  # Left eigenvectors tell a mode's share in the start, the first unit vector.
  # Rounding lets in what a run never reaches, with shares of its size.
  transposed = small[:, : j + 1, : j + 1].transpose(0, 2, 1)
  eigenvalues, left = np.linalg.eig(transposed)
  reached = np.abs(left[:, 0]) > _SHARE
  return np.where(reached, np.abs(eigenvalues), 0).max(axis=1)


class Run:
  """A long run from w_0 = START, for many steps eta."""

  def __init__(self, method: Method, tau: int, cycles: int = CYCLES):
    self._method, self._workers = method, tau + 1
    self._length = cycles * self._workers  # Cycles: a multiple of four.
    self._several = jax.jit(jax.vmap(self._one))

  def _one(self, eta):
    carry = _begin(self._method, eta, self._workers, START)
    _, ws = _calls(self._method, eta, self._workers, carry, self._length)
    # XLA's maximum may lose a NaN.
    size = jnp.where(jnp.isfinite(ws), jnp.abs(ws), jnp.inf)
    return jnp.max(size.reshape(4, -1), axis=1)

  def sizes(self, etas: np.ndarray) -> np.ndarray:
    """The largest |w| / w_0 of every quarter, shape=(etas, 4)."""
    return np.asarray(self._several(etas)) / START

  def shrinks(self, etas: np.ndarray) -> np.ndarray:
    """Whether |w| is smaller in the last quarter than it was in the second."""
    sizes = self.sizes(etas)
    second, last = sizes[:, 1], sizes[:, 3]
    # A cycle is followed by none that is 1 % smaller.
    smaller = (last < 0.99 * second) | (last < GONE)
    return (sizes.max(axis=1) < ESCAPED) & smaller


def measured(method: Method, tau: int) -> float:
  """The largest stable nominal step, through the library (in float64)."""
  if method.radius is None:
    return largest_stable(Run(method, tau).shrinks, 1e-4)
  cycle = Cycle(method, tau)
  return largest_stable(lambda etas: cycle.spectral_radii(etas) < 1, 1e-4)


# Shown.


def largest_difference(values, expected):
  """Of the measured values from theory, relatively."""
  return np.max(np.abs(np.array(values) / expected - 1))


def markdown(head: list[str], rows: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  lines = [head, ['-' * w for w in widths], *rows]
  return '\n'.join(
    '| '
    + ' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))
    + ' |'
    for line in lines
  )


def full_table(found, expected):
  """Measured, theory and their relative difference."""
  rows = []
  for name, method in METHODS.items():
    rows.append([method.label, 'measured', *map(_four, found[name])])
    if name in expected:
      off = np.array(found[name]) / expected[name] - 1
      rows.append(['', 'theory', *map(_four, expected[name])])
      rows.append(['', 'difference, %', *(f'{100 * x:+.4f}' for x in off)])
  return markdown(['eta c', 'tau =', *map(str, TAUS)], rows)


def nominal_table(found, expected):
  rows = []
  for name, method in METHODS.items():
    off = '-'
    if name in expected:
      off = f'{100 * largest_difference(found[name], expected[name]):.4f}'
    rows.append([method.label, *map(_four, found[name]), off])
  head = [f'tau = {TAUS[0]}', *map(str, TAUS[1:]), 'off theory by at most, %']
  return markdown(['method', *head], rows)


def ratio_table(found):
  """Effective steps over SGD's."""
  sgd = effective(found, 'sgd')
  rows = [
    [label, *(f'{x:.2f}' for x in effective(found, name) / sgd)]
    for name, (label, *_) in {**_WITHOUT_MOMENTUM, **_WITH_MOMENTUM}.items()
  ]
  head = [f'tau = {TAUS[0]}', *map(str, TAUS[1:])]
  return markdown(["effective step over SGD's", *head], rows)


def effective(found, name):
  weights = [METHODS[name].weight(tau + 1) for tau in TAUS]
  return np.array(found[name]) * weights


def _four(value):
  return f'{value:#.4g}'


# Lines of the picture: what they are called, and how they look. What is missing
# lies on one of them.
_SGD = {'sgd': ('SGD, scale_by_staleness', '#000000', '-')}
_WITHOUT_MOMENTUM = {
  **_SGD,
  'exact': ('exact_delay_compensation', '#009e73', '--'),
  'delay_compensation': ('delay_compensation', '#56b4e9', '--'),
  'adaptive_compensation': (
    'delay_compensation, adaptive',
    '#e69f00',
    (0, (5, 1, 1, 1)),
  ),
  'drop_stale': ('drop_stale', '#cc79a7', (0, (1, 1))),
  'rennala': ('rennala', '#d55e00', '-.'),
  'predicted_sgd': ('SGD, predict', '#0072b2', '-'),
}
_WITH_MOMENTUM = {
  'dana': ('dana, DANA-Slim', '#009e73', '-'),
  'smega2': ('smega2', '#56b4e9', '--'),
  'delayed_nesterov': ('delayed_nesterov', '#d55e00', '-'),
  'spike': ('spike_compensation', '#cc79a7', '--'),
  'nesterov': ('Nesterov, asynchronous_nesterov 0.9', '#0072b2', '-'),
  'braking': ('adaptive_braking 0.5', '#e69f00', (0, (5, 1, 1, 1))),
  'heavy_ball': ('heavy ball', '#56b4e9', '-'),
  'asynchronous_nesterov': (
    'asynchronous_nesterov 0.99',
    '#0072b2',
    (0, (1, 1)),
  ),
  'predicted_heavy_ball': ('heavy ball, predict', '#d55e00', '--'),
}


def draw(path: pathlib.Path, found) -> None:
  """The largest stable effective steps, with and without momentum."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot, ticker

  figure, panels = pyplot.subplots(
    1, 2, figsize=(13, 6), layout='constrained', sharey=True
  )
  figures = (_WITHOUT_MOMENTUM, {**_SGD, **_WITH_MOMENTUM})
  for axes, lines in zip(panels, figures, strict=True):
    for name, (_, colour, dashes) in lines.items():
      axes.plot(
        np.array(TAUS) + 1,  # Zero has no place on a logarithmic axis.
        effective(found, name),
        color=colour,
        linestyle=dashes,
        # What lies on SGD's line is drawn on it.
        linewidth=3.5 if name == 'sgd' else 1.6,
      )
    axes.set(
      xlabel='staleness, updates (placed by the number of workers)',
      xscale='log',
      yscale='log',
    )
    axes.set_xticks(np.array(TAUS) + 1, map(str, TAUS))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f'{y:g}'))
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    axes.margins(x=0)
  for axes, lines in zip(panels, figures, strict=True):
    _label_ends(axes, lines, found)
  panels[0].set(
    title='without momentum',
    ylabel='largest stable effective step, times the curvature',
  )
  panels[1].set(
    title=f'with momentum {MOMENTUM} where no other is said, and SGD'
  )
  figure.savefig(path, dpi=130, bbox_inches='tight')
  pyplot.close(figure)


def _label_ends(axes, lines, found):
  """Labels to the right of the lines' ends, moved apart."""
  ends = {name: math.log10(effective(found, name)[-1]) for name in lines}
  names = sorted(ends, key=ends.__getitem__)
  low, high = np.log10(axes.get_ylim())
  height = 0.042 * (high - low)
  places = np.array([ends[name] for name in names])
  for _ in range(200):  # Neighbours that overlap part by equal steps.
    short = np.maximum(height - np.diff(places), 0)
    places[1:] += short / 2
    places[:-1] -= short / 2
  last = TAUS[-1] + 1
  for name, place in zip(names, places, strict=True):
    label, colour, dashes = lines[name]
    axes.plot(
      [last, 1.35 * last, 1.9 * last],
      10 ** np.array([ends[name], place, place]),
      color=colour,
      linestyle=dashes,
      linewidth=3.5 if name == 'sgd' else 1.6,
      clip_on=False,
      alpha=0.6,
    )
    axes.annotate(
      label, (2 * last, 10**place), va='center', annotation_clip=False
    )
  axes.set_xlim(1, last)


_TEXT = """# The largest stable step

How large may a step be when every gradient comes tau updates late? Here is the
answer for optimizers and corrections of this package in the simplest case there
is: one parameter w with the loss c w² / 2, no noise, and N = tau + 1
round-robin workers, so that after the first round every gradient is exactly tau
updates old. A step is *stable* if w goes to 0. What counts is the step times
the curvature c, which is 1 here.

```sh
python -m benchmarks.stability         # Prints measured and theory, all of it.
python -m benchmarks.stability --docs  # Writes this page and its picture.
```

## Effective steps

Momentum m applies a gradient again and again, so with it a *nominal* step eta
moves w by eta / (1 - m) in the end. To compare methods, the picture shows
*effective* steps: what an arriving gradient weighs in the end, on average.

| method | effective step |
| --- | --- |
| SGD, also with `predict` or a delay compensation | eta |
| `scale_by_staleness` | eta times the weight at staleness tau |
| heavy ball, Nesterov, and all momentum not named below | eta / (1 - m) |
| `delayed_nesterov` | eta / (N (1 - b)) |
| `asynchronous_nesterov` | eta |
| `adaptive_braking`, of gradients braked by r | eta (1 - r) / (1 - m) |
| `drop_stale`: R = tau // 2 + 1 of N gradients are applied | eta R / N |
| `rennala`: one update for 2 N - 1 gradients | eta / (2 N - 1) |

![The largest stable effective step, by staleness](images/stability.png)

{ratios}

What the figures show:

* For SGD the largest step is 2 sin(π / (2 (2 tau + 1))): {sgd} without delay,
  {late} at tau = 63. Weighing gradients by a constant staleness is another
  learning rate and nothing else.
* Without delay heavy ball allows an effective step {ball} times SGD's. At
  tau = 1 they are equal, and from tau = 3 on heavy ball's is smaller by 10 to
  25 %.
* Three methods keep an advantage at every tau shown. At tau = 63 `dana` allows
  {dana} times SGD's step, `smega2` {smega} and `delayed_nesterov` {dn} times.
* `spike_compensation` is ahead of SGD up to tau = 7, and within 2 % of it from
  15 on. Looking ahead along the last update (`predict`) helps heavy ball up to
  tau = 15; from 31 on it is worse than heavy ball alone. Around SGD it costs
  about 40 % at any delay.
* `asynchronous_nesterov` with c = 0.99 allows {an} times SGD's step at
  tau = 1 and {an_late} times at 63.
* Refusing stale gradients allows larger nominal steps, but fewer of them. By
  the arriving gradient, `drop_stale` with every other worker refused is between
  SGD's step and 12 % above it, and `rennala` about a third below.
* With the exact Hessian of the arriving batch the delay is gone.
  `delay_compensation(0.04)`, whose g² stands for that Hessian and vanishes
  where w does, has SGD's step.

A large stable step is not a fast method. This is one curvature without noise;
it tells which steps are out of the question, not which one is best.

## Nominal steps

The largest stable eta c, momentum {momentum} where no other is said:

{nominal}

## How it was found

*Measured* is the library itself, in float64: `asynchronous` around the method,
called with gradients taken at `worker_params`. All methods but the last four
are linear in w. One cycle of calls, after which every worker is where it was,
is then a linear map of the numbers in parameters and state; a step is stable
where every mode of that map in which a run from w_0 has a share is smaller
than 1 (the spectral radius, by Arnoldi's method). The border is found by
bisection. *Theory* is the characteristic polynomial of the published update
rule, or its matrix over a cycle where the rule changes within one, in plain
NumPy. They are to agree within 0.1 %; the last column says how well they do.

The last four are not linear, so they are run: {n} N calls from w_0 = {w_0}.
Stable is where |w| never passes {far} w_0, and its maximum over the last
quarter of the run is at least 1 % below that over the second. For these there
is no theory here, and they are good to half a percent: a longer run brings
`delay_compensation(0.04)` closer to SGD. `adaptive_braking` is the same at any
scale; the others depend on w_0. From w_0 = 30 `delay_compensation(0.04)` is
stable up to 0.039 only, at tau = 3.

* `delay_compensation(0.04)` above the border does not diverge at once: w goes
  round on a cycle that neither shrinks nor grows.
* The adaptive one's mean square starts at 0 without a bias correction, so that
  its first corrections are the strongest. At tau = 1 and 3 the run is decided
  early: w passes {far} w_0 at steps with which SGD is stable, and overflows at
  many of them.
* `adaptive_braking` has strength {brake} here. With one parameter a gradient
  either agrees with the momentum or opposes it, and at the default strength of
  1 one that agrees counts for nothing: w stops where the first gradients have
  brought it.
"""


def page(found, expected) -> str:
  """docs/stability.md."""
  sgd = effective(found, 'sgd')
  over_sgd = lambda name, i: effective(found, name)[i] / sgd[i]
  return _TEXT.format(
    ratios=ratio_table(found),
    nominal=nominal_table(found, expected),
    momentum=MOMENTUM,
    w_0=f'{START:g}',
    n=CYCLES,
    far=f'{ESCAPED:g}',
    brake=BRAKE,
    sgd=f'{sgd[0]:.3g}',
    late=f'{sgd[-1]:.3g}',
    ball=f'{over_sgd("heavy_ball", 0):.0f}',
    dana=f'{over_sgd("dana", -1):.1f}',
    smega=f'{over_sgd("smega2", -1):.1f}',
    dn=f'{over_sgd("delayed_nesterov", -1):.1f}',
    an=f'{over_sgd("asynchronous_nesterov", 1):.1f}',
    an_late=f'{over_sgd("asynchronous_nesterov", -1):.2f}',
  )


def main(argv):
  del argv
  jax.config.update('jax_enable_x64', True)
  found = {name: [] for name in METHODS}
  expected = {name: [] for name, m in METHODS.items() if m.radius is not None}
  pairs = [(name, tau) for name in METHODS for tau in TAUS]
  with tqdm.tqdm(pairs, leave=False) as bar:
    for name, tau in bar:
      bar.set_description(f'{name}, tau = {tau}')
      found[name].append(measured(METHODS[name], tau))
      if name in expected:
        expected[name].append(theory(METHODS[name], tau))
  print(full_table(found, expected))
  worst = max(largest_difference(found[n], expected[n]) for n in expected)
  print(f'\nlargest difference from theory: {100 * worst:.4f} %')
  if _DOCS.value:
    (DOCS / 'stability.md').write_text(page(found, expected))
    draw(DOCS / 'images' / 'stability.png', found)


if __name__ == '__main__':
  app.run(main)
