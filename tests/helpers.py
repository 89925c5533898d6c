"""Problems, and the two ways to run them: the oracle's and the library's.

And what runs the Python of a page.
"""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax
from gsgd_jax import _protocol, worker_params
from tests import reference

# Cases. Every combination would take hours, as each is compiled anew.


def combinations(number, where=lambda case: True, **choices):
  """So many cases of choices, in which values meet in as many pairs as can be.

  Args:
    number: How many; with fewer than some dimension has values it fails.
    where: Whether a case makes sense.
    **choices: The values of every dimension.

  Returns:
    A list of dicts; always the same. Every value is in one of them.
  """
  rng = np.random.default_rng(0)
  sizes = {name: len(values) for name, values in choices.items()}
  met, out = set(), []

  def worth(numbers):
    pairs = set(itertools.combinations(numbers.items(), 2))
    # A value that has not occurred yet is worth more than all pairs.
    return (
      len({*numbers.items()} - met),
      len(pairs - met),
    )

  def case_of(numbers):
    return {name: choices[name][i] for name, i in numbers.items()}

  for _ in range(number):
    tries = [
      {name: int(rng.integers(size)) for name, size in sizes.items()}
      for _ in range(100)
    ]
    best = max((t for t in tries if where(case_of(t))), key=worth)
    met |= {*best.items()} | {*itertools.combinations(best.items(), 2)}
    out.append(case_of(best))
  assert met >= {(name, i) for name, n in sizes.items() for i in range(n)}
  return out


def covering(number, where=lambda case: True, **choices):
  """A test of `combinations`."""
  cases = combinations(number, where, **choices)
  rows = [tuple(case.values()) for case in cases]
  return pytest.mark.parametrize(tuple(choices), rows)


# Parameters: the oracle's flat vector is the library's two-leaf tree.


def to_tree(flat):
  half = flat.shape[-1] // 2
  return {'first': flat[..., :half], 'rest': (flat[..., half:],)}


def to_flat(tree):
  return jnp.concatenate([tree['first'], tree['rest'][0]], axis=-1)


# Problems.


def quadratic_loss(params, batch):
  centres, curvatures = batch
  drift = to_flat(params)[None] - centres
  return jnp.mean(0.5 * curvatures * drift**2)


def logistic_loss(params, batch):
  inputs, labels = batch
  return jnp.mean(jnp.logaddexp(0.0, -labels * (inputs @ to_flat(params))))


@dataclasses.dataclass(frozen=True)
class Problem:
  """Batches of a problem, and its loss for either side."""

  kind: str
  start: np.ndarray  # (seeds, size)
  batches: tuple[np.ndarray, np.ndarray]  # Leaves (seeds, calls, examples, ..)
  verification: tuple[np.ndarray, np.ndarray]  # Likewise.

  @property
  def loss_fn(self):
    return {'quadratic': quadratic_loss, 'logistic': logistic_loss}[self.kind]

  @property
  def loss(self):
    return getattr(reference, f'{self.kind}_loss')

  @property
  def gradient(self):
    return getattr(reference, f'{self.kind}_gradient')

  @property
  def batch_like(self):
    return jax.tree.map(lambda x: x[0, 0], self.batches)

  def of_seed(self, seed):
    """Start, batches and verification batches, as the oracle takes them."""
    calls = self.batches[0].shape[1]
    pick = lambda pair: [
      (pair[0][seed, t], pair[1][seed, t]) for t in range(calls)
    ]
    return self.start[seed], pick(self.batches), pick(self.verification)


def make_problem(kind, size, examples, calls, seed, seeds=1):
  rng = np.random.default_rng(seed)

  def batches(examples):
    first = rng.normal(size=(seeds, calls, examples, size))
    if kind == 'quadratic':
      return first, rng.uniform(0.2, 2.0, size=first.shape)
    return first, rng.choice([-1.0, 1.0], size=first.shape[:-1])

  return Problem(
    kind, rng.normal(size=(seeds, size)), batches(examples), batches(5)
  )


def problems_of(*calls):
  """Problems of two seeds with so many calls."""
  cases = combinations(
    max(len(calls), 5),
    kind=['quadratic', 'logistic'],
    size=[2, 3, 4, 5, 6],
    examples=[1, 2, 3, 4],
    calls=calls,
  )
  return [
    make_problem(seed=seed, seeds=2, **case) for seed, case in enumerate(cases)
  ]


problems = problems_of(1, 2, 5, 12, 20, 33, 45)
modes = ['jit', 'scan', 'vmap']


# Transformations that exist to see what a packet carries.


class LookAheadState(NamedTuple):
  offset: _protocol.ReadOffset


def look_ahead(learning_rate, horizon):
  """SGD whose workers read `horizon` updates ahead of the server."""

  def init(params):
    return LookAheadState(
      _protocol.ReadOffset(
        jnp.asarray(horizon, jnp.float64), optax.tree.zeros_like(params)
      )
    )

  def update(updates, state, params=None):
    del params
    step = optax.tree.scale(-learning_rate, updates)
    return step, LookAheadState(state.offset._replace(tree=step))

  return optax.GradientTransformation(init, update)


def staleness_scaled(inner):
  """Reads `staleness` and, where it is given, `worker`."""

  def update(updates, state, params=None, *, staleness, worker=None, **extra):
    worker = jnp.zeros([], jnp.int32) if worker is None else worker
    scale = (1 + staleness + worker).astype(jnp.float64)
    updates = jax.tree.map(lambda g: g / scale, updates)
    extra.update(staleness=staleness, worker=worker)
    return inner.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(inner.init, update)


class Inner(NamedTuple):
  """An inner optimizer for either side."""

  oracle: object  # () -> a server
  library: optax.GradientTransformation
  needs: frozenset = frozenset()


def _extra(tx):
  return optax.with_extra_args_support(tx)


def lenient(tx):
  """optax's bias correction mixes dtypes, which these tests forbid."""

  def update(updates, state, params=None):
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


INNERS = {
  'sgd': Inner(lambda: reference.Sgd(0.1), optax.sgd(0.1)),
  'heavy ball': Inner(
    lambda: reference.Sgd(0.03, 0.9), optax.sgd(0.03, momentum=0.9)
  ),
  'nesterov': Inner(
    lambda: reference.Sgd(0.03, 0.8, True),
    optax.sgd(0.03, momentum=0.8, nesterov=True),
  ),
  'adam': Inner(lambda: reference.Adam(0.01), lenient(optax.adam(0.01))),
  'look ahead': Inner(
    lambda: reference.LookAhead(0.05, 3.0), look_ahead(0.05, 3.0)
  ),
  'compensated': Inner(
    lambda: reference.DelayCompensation(reference.LookAhead(0.05, 2.0), 0.3),
    optax.chain(gsgd_jax.delay_compensation(0.3), look_ahead(0.05, 2.0)),
    frozenset({'stale_params'}),
  ),
  'scaled': Inner(
    lambda: reference.StalenessScaled(reference.Sgd(0.2, 0.5)),
    staleness_scaled(_extra(optax.sgd(0.2, momentum=0.5))),
    frozenset({'staleness'}),
  ),
}
inner_names = sorted(INNERS)


# Compensations: what makes one for a problem and a number of workers.


class Compensation(NamedTuple):
  """A compensation for either side; functions of (problem, workers)."""

  oracle: Callable  # -> a server
  library: Callable  # -> a transformation
  slim: float | None = None  # Nesterov momentum that each worker has itself.


def _product(problem):
  return getattr(reference, f'{problem.kind}_hessian_product')


def _corrected(oracle, library, rate=0.02, momentum=0.5):
  """A correction in front of heavy-ball momentum."""
  return Compensation(
    lambda problem, n: oracle(problem, n, reference.Sgd(rate, momentum)),
    lambda problem, n: optax.chain(
      library(problem, n), optax.sgd(rate, momentum=momentum)
    ),
  )


def _exact(trust):
  return _corrected(
    lambda problem, n, inner: reference.ExactDelayCompensation(
      inner, _product(problem), trust
    ),
    lambda problem, n: gsgd_jax.exact_delay_compensation(
      problem.loss_fn, trust=trust
    ),
  )


def _scaled(rule, **options):
  workers = lambda n: {'workers': n // 2 + 1} if rule == 'adaptive' else {}
  return _corrected(
    lambda problem, n, inner: reference.ScaleByStaleness(
      inner, rule, **workers(n), **options
    ),
    lambda problem, n: gsgd_jax.scale_by_staleness(
      rule, **workers(n), **options
    ),
    rate=0.1,
  )


# One that wants no packet but `worker`, with the same arguments on both sides.
def _momentum(oracle, library, *arguments):
  return Compensation(
    lambda problem, n: oracle(*(a(n) if callable(a) else a for a in arguments)),
    lambda problem, n: library(
      *(a(n) if callable(a) else a for a in arguments)
    ),
  )


def _workers(n):
  return n


def _delay(n):
  return n - 1


COMPENSATIONS = {
  'DC-ASGD-c': _corrected(
    lambda problem, n, inner: reference.DelayCompensation(inner, 0.4),
    lambda problem, n: gsgd_jax.delay_compensation(0.4),
  ),
  'DC-ASGD-a': _corrected(
    lambda problem, n, inner: reference.AdaptiveDelayCompensation(
      inner, 0.5, 0.9
    ),
    lambda problem, n: gsgd_jax.delay_compensation(
      0.5, adaptive=True, decay=0.9
    ),
  ),
  'batch-scaled': _corrected(
    lambda problem, n, inner: reference.DelayCompensation(inner, 0.2, 3),
    lambda problem, n: gsgd_jax.delay_compensation(0.2, batch_size=3),
  ),
  'exact': _exact(None),
  'exact, clipped': _exact(0.3),
  'staleness-aware': _scaled('inverse'),
  'delay-adaptive': _scaled('adaptive'),
  'polynomial': _scaled('polynomial', exponent=0.7),
  'spike': _momentum(
    reference.SpikeCompensation,
    gsgd_jax.spike_compensation,
    0.005,
    _delay,
    0.9,
  ),
  'braking': _momentum(
    reference.AdaptiveBraking, gsgd_jax.adaptive_braking, 0.005, 0.9, 0.8
  ),
  'DANA': _momentum(reference.Dana, gsgd_jax.dana, 0.005, _workers, 0.9),
  'DANA-DC': Compensation(
    lambda problem, n: reference.DelayCompensation(
      reference.Dana(0.005, n, 0.9), 0.4
    ),
    lambda problem, n: optax.chain(
      gsgd_jax.delay_compensation(0.4), gsgd_jax.dana(0.005, n, 0.9)
    ),
  ),
  'DANA-Slim': Compensation(
    lambda problem, n: reference.Sgd(0.005),
    lambda problem, n: optax.sgd(0.005),
    slim=0.9,
  ),
  'SMEGA2': _momentum(reference.Smega2, gsgd_jax.smega2, 0.005, _workers, 0.9),
  'predict': Compensation(
    lambda problem, n: reference.Predict(reference.Sgd(0.005, 0.8), n - 1),
    lambda problem, n: gsgd_jax.predict(optax.sgd(0.005, momentum=0.8), n - 1),
  ),
  'delayed Nesterov': _momentum(
    reference.DelayedNesterov, gsgd_jax.delayed_nesterov, 0.05, _workers, 0.9
  ),
  'Ringmaster': Compensation(
    lambda problem, n: reference.DropStale(reference.Sgd(0.02, 0.8), n // 2),
    lambda problem, n: gsgd_jax.drop_stale(
      optax.sgd(0.02, momentum=0.8), n // 2
    ),
  ),
  'Rennala': Compensation(
    lambda problem, n: reference.Rennala(reference.Sgd(0.02, 0.8), 3),
    lambda problem, n: gsgd_jax.rennala(optax.sgd(0.02, momentum=0.8), 3),
  ),
}


# The library's run.


def run(tx, problem, mode, *, verification_at=None):
  """Runs `tx` on every seed of a problem.

  Args:
    tx: A transformation.
    problem: A `Problem`.
    mode: 'jit' (a jitted call per step), 'scan', or 'vmap' (of a scan).
    verification_at: A function from a call's number to the number of the
      verification batch that it is given, or None to give none.

  Returns:
    For every seed, the flat parameters after every call, the states after
    every call (stacked), both as NumPy arrays.
  """
  loss_fn = problem.loss_fn

  def step(carry, t_and_batch):
    params, state = carry
    t, batch, verification = t_and_batch
    del t
    value, grads = jax.value_and_grad(loss_fn)(
      worker_params(params, state), batch
    )
    extra = {} if verification is None else {'verification': verification}
    updates, state = tx.update(
      grads, state, params, value=value, batch=batch, **extra
    )
    params = optax.apply_updates(params, updates)
    return (params, state), (to_flat(params), state)

  def inputs(seed):
    batches = jax.tree.map(lambda x: x[seed], problem.batches)
    calls = batches[0].shape[0]
    verification = None
    if verification_at is not None:
      numbers = [verification_at(t) % calls for t in range(calls)]
      verification = jax.tree.map(
        lambda x: x[seed][numbers], problem.verification
      )
    return np.arange(calls), batches, verification

  def scanned(start, xs):
    params = to_tree(start)
    return jax.lax.scan(step, (params, tx.init(params)), xs)[1]

  seeds = range(len(problem.start))
  if mode == 'vmap':
    stacked = jax.tree.map(lambda *x: np.stack(x), *map(inputs, seeds))
    out = jax.jit(jax.vmap(scanned))(problem.start, stacked)
    outs = [jax.tree.map(lambda x, s=s: np.asarray(x[s]), out) for s in seeds]
  elif mode == 'scan':
    outs = [jax.jit(scanned)(problem.start[s], inputs(s)) for s in seeds]
  else:
    outs = [_per_call(step, tx, problem.start[s], inputs(s)) for s in seeds]
  return [jax.tree.map(np.asarray, out) for out in outs]


def _per_call(step, tx, start, xs):
  step = jax.jit(step, donate_argnums=0)
  params = to_tree(jnp.array(start))
  carry = (params, _apart(tx.init, params))
  trajectory = []
  for t in range(len(xs[0])):
    carry, (flat, state) = step(carry, jax.tree.map(lambda x, t=t: x[t], xs))
    trajectory.append(jax.tree.map(np.asarray, (flat, state)))
  return jax.tree.map(lambda *x: np.stack(x), *trajectory)


def _apart(init, params):
  """A state; it and the parameters share no buffer, so all can be donated.

  Compiled as one, which takes less time than operation by operation. That
  would hide a leaf given twice, so the program is looked at.
  """
  traced = jax.jit(init).trace(params)
  jaxpr = traced.jaxpr.jaxpr
  ends = (*jaxpr.invars, *jaxpr.outvars)
  leaves = [v for v in ends if isinstance(v, jax.extend.core.Var)]
  assert len({*leaves}) == len(leaves)
  return traced.lower().compile()(params)


def assert_close(actual, expected, tolerance=1e-9):
  """Two trees of the same numbers."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, tolerance, tolerance),
    actual,
    expected,
  )


def assert_trajectory(actual, expected, tolerance=1e-9):
  """The library's parameters after each update against the oracle's."""
  assert len(actual) == len(expected)
  if expected:
    np.testing.assert_allclose(
      actual, np.stack(expected), rtol=tolerance, atol=tolerance
    )


# Pages of documentation.


def printed_by(text, name, given=None, of_a_run=False):
  """What the Python of a text prints, but for blocks that need a run's folder.

  Or what these print.
  """
  blocks = re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
  blocks = [b for b in blocks if ('runs/mine' in b) == of_a_run]
  printed = io.StringIO()
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    contextlib.redirect_stdout(printed),
  ):
    exec(compile('\n'.join(blocks), name, 'exec'), given or {})
  return printed.getvalue()
