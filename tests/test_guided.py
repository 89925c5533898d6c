"""guided against the oracle."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax
from tests import helpers, reference

SELECT = ['consistent', 'random', 'hardest', 'inconsistent', 'surprise']


def drawn(key, window):
  return jax.random.uniform(key, [window])


# Rules of one's own: of a window, and of the oracle's entries.
OWN = {
  'easy and surprising': (
    lambda window, **known: jnp.where(
      window.surprises > 0, window.surprises - window.losses, -jnp.inf
    ),
    lambda entry, number: (
      entry.surprise - entry.loss if entry.surprise > 0 else -math.inf
    ),
  ),
  'drawn by staleness and worker': (
    lambda window, *, key, params: (
      drawn(key, len(window.scores))
      * (1 + window.staleness + window.workers).astype(window.scores.dtype)
    ),
    lambda entry, number: (
      number * (1 + entry.packet.staleness + entry.packet.worker)
    ),
  ),
}


def draw_with(seed, window):
  """The numbers that `select='random'` ranks by, for the oracle."""

  def draw(number):
    key = jax.random.fold_in(jax.random.PRNGKey(seed), number)
    return np.asarray(drawn(key, window)).tolist()

  return draw


# The dial of `guided`: every setting is compared with the oracle.
DIAL = {
  'exact': dict(revisit=None, verified=True),
  'exact re-scoring, running mean': dict(revisit=None),
  'revisit 2': dict(revisit=2, verified=True),
  'convolutional': dict(revisit=2, verified=True, average_scores=True),
  'averaged, running mean': dict(average_scores=True),
  'verification, no re-scoring': dict(verified=True),
  'free scoring': dict(),
  'stored gradients': dict(stored=True),
}


# What is not on the dial.
SETTINGS = dict(
  window=[2, 3, 5, 7],
  replays=[None, 1, 2, 7],
  select=[*SELECT, *OWN],
  replay_with=[None, 'sgd', 'look ahead'],
  replay_model=['serial', 'parallel', 'shared'],
)


def setting_of(window, replays, select, replay_with, replay_model):
  return dict(
    window=window,
    replays=replays and min(replays, window),
    select=select,
    replay_with=replay_with,
    replay_model=replay_model,
  )


long_problems = helpers.problems_of(25, 30, 38, 45)


def build(problem, inner, dial, setting, seed, batch_like=None):
  """The same guided SGD for either side."""
  setting = dict(revisit=0) | DIAL[dial] | setting
  stored = setting.pop('stored', False)
  verified = setting.pop('verified', False)
  replay_with = setting.pop('replay_with')
  select = setting.pop('select')
  own, oracles_own = OWN.get(select, (select, select))
  if not stored and batch_like is None:
    batch_like = problem.batch_like

  def oracle(verification):
    return reference.Guided(
      helpers.INNERS[inner].oracle(),
      None if stored else problem.loss,
      None if stored else problem.gradient,
      replay_with=replay_with and helpers.INNERS[replay_with].oracle(),
      verification=(lambda t: verification[t]) if verified else None,
      draw=draw_with(seed, setting['window']),
      select=oracles_own,
      **setting,
    )

  library = gsgd_jax.guided(
    helpers.INNERS[inner].library,
    None if stored else problem.loss_fn,
    replay_with=replay_with and helpers.INNERS[replay_with].library,
    batch_like=None if stored else batch_like,
    seed=seed,
    select=own,
    **setting,
  )
  return oracle, library, verified


def assert_same_guidance(oracle, state, calls):
  """The selections, scores and evaluations, after `calls` arrivals."""
  if oracle.replays == 0:
    return
  state = jax.tree.map(lambda x: x[len(x) - calls :], state)
  window = oracle.window
  for number, replayed in enumerate(oracle.replayed):
    seen = state.replayed[(number + 1) * window - 1]
    assert seen[seen >= 0].tolist() == replayed
    assert np.all(seen[len(replayed) :] == -1)
  assert state.gradient_evaluations[-1] == oracle.gradient_evaluations
  replays = state.replays
  units = replays.serial[-1] + replays.parallel[-1].sum()
  assert units == oracle.replay_units
  assert replays.shared[-1] == oracle.shared_replays
  np.testing.assert_allclose(
    state.average_error[-1], oracle.previous, rtol=1e-8
  )
  np.testing.assert_allclose(
    state.window.scores[-1][: len(oracle.entries)],
    [entry.score for entry in oracle.entries],
    rtol=1e-8,
    atol=1e-9,
  )


def assert_no_ties(oracle):
  """Rounding may decide between scores that are nearly tied."""
  assert all(margin > 1e-7 for margin in oracle.margins)


@helpers.covering(
  16,
  dial=list(DIAL),
  problem=long_problems,
  inner=['sgd', 'heavy ball', 'nesterov', 'adam'],
  **SETTINGS,
  seed=[0, 1],
  mode=helpers.modes,
)
def test_guided(
  dial,
  problem,
  inner,
  window,
  replays,
  select,
  replay_with,
  replay_model,
  seed,
  mode,
):
  setting = setting_of(window, replays, select, replay_with, replay_model)
  oracle_of, tx, verified = build(problem, inner, dial, setting, seed)
  outs = helpers.run(
    tx, problem, mode, verification_at=(lambda t: t) if verified else None
  )
  for s, (flat, state) in enumerate(outs):
    start, batches, verification = problem.of_seed(s)
    oracle = oracle_of(verification)
    run = reference.asynchronous(
      start, oracle, problem.loss, problem.gradient, 1, batches
    )
    expected = run.trajectory
    assert_no_ties(oracle)
    assert any(oracle.replayed)
    helpers.assert_trajectory(flat, expected)
    assert_same_guidance(oracle, state, len(batches))


# How a transformation is made around `guided`; the number of the update that a
# call brings; the call of an update.
PARALLEL = {
  'asynchronous': (
    lambda tx, n, like: gsgd_jax.asynchronous(
      tx, n, batch_like=like, keep_params=True
    ),
    lambda t, n: t - (n - 1),
  ),
  'delayed': (
    lambda tx, n, like: gsgd_jax.delayed(
      tx, n - 1, batch_like=like, keep_params=True
    ),
    lambda t, n: t - (n - 1),
  ),
  'sequential': (
    lambda tx, n, like: gsgd_jax.synchronous(tx, n),
    lambda t, n: t,
  ),
  'mean': (
    lambda tx, n, like: gsgd_jax.synchronous(
      tx, n, combine='mean', batch_like=like
    ),
    lambda t, n: t // n,
  ),
}


def sensible(case):
  """Stored gradients know no `stale_params`, and `delayed` knows no workers."""
  if case['parallel'] == 'delayed' and (
    case['inner'] == 'scaled' or case['select'].endswith('worker')
  ):
    return False
  needs = helpers.INNERS[case['inner']].needs
  return case['dial'] != 'stored gradients' or 'stale_params' not in needs


@helpers.covering(
  32,
  sensible,
  dial=list(DIAL),
  parallel=sorted(PARALLEL),
  problem=long_problems,
  inner=helpers.inner_names,
  workers=[2, 3, 5],
  **SETTINGS,
  seed=[0, 1],
  mode=helpers.modes,
)
def test_guided_under_staleness(
  dial,
  parallel,
  problem,
  inner,
  workers,
  window,
  replays,
  select,
  replay_with,
  replay_model,
  seed,
  mode,
):
  setting = setting_of(window, replays, select, replay_with, replay_model)
  like = problem.batch_like
  if parallel == 'mean':
    like = jax.tree.map(lambda x: np.concatenate([x] * workers), like)
  oracle_of, guided, verified = build(
    problem, inner, dial, setting, seed, batch_like=like
  )
  make, update_of = PARALLEL[parallel]
  outs = helpers.run(
    make(guided, workers, problem.batch_like),
    problem,
    mode,
    verification_at=(lambda t: update_of(t, workers)) if verified else None,
  )
  for s, (flat, state) in enumerate(outs):
    start, batches, verification = problem.of_seed(s)
    oracle = oracle_of(verification)
    arguments = (start, oracle, problem.loss, problem.gradient, workers)
    if parallel in ('sequential', 'mean'):
      expected, packets, _ = reference.synchronous(
        *arguments, batches, combine=parallel
      )
      calls = slice(0, len(expected))  # The oracle plays whole rounds only.
    else:
      run = reference.asynchronous(*arguments, batches)
      expected, packets = run.trajectory, run.packets
      calls = slice(workers - 1, None)
    assert_no_ties(oracle)
    helpers.assert_trajectory(flat[calls], expected)
    state = jax.tree.map(lambda x, c=calls: x[c], state.inner_state)
    if parallel == 'mean':  # Guided SGD sees the last call of every round.
      state = jax.tree.map(lambda x: x[workers - 1 :: workers], state)
    assert_same_guidance(oracle, state, len(packets))


@pytest.mark.parametrize('replay_model', ['serial', 'parallel'])
@pytest.mark.parametrize('inner', sorted(helpers.INNERS))
def test_replays_through_every_inner(inner, replay_model):
  """Among them one that reads `stale_params`, predictor's offset included."""
  problem = helpers.make_problem('logistic', 4, 3, 40, seed=5)
  setting = dict(
    window=5,
    replays=3,
    select='consistent',
    replay_with=None,
    replay_model=replay_model,
  )
  oracle_of, guided, _ = build(problem, inner, 'exact', setting, seed=0)
  make, update_of = PARALLEL['asynchronous']
  ((flat, state),) = helpers.run(
    make(guided, 3, problem.batch_like),
    problem,
    'scan',
    verification_at=lambda t: update_of(t, 3),
  )
  start, batches, verification = problem.of_seed(0)
  oracle = oracle_of(verification)
  expected = reference.asynchronous(
    start, oracle, problem.loss, problem.gradient, 3, batches
  ).trajectory
  assert any(oracle.replayed)
  helpers.assert_trajectory(flat[2:], expected)
  assert_same_guidance(oracle, state.inner_state, len(expected))


def one_window(**settings):
  """A window whose arithmetic fits on paper: losses are the batches."""
  loss_fn = lambda params, batch: batch + 0 * params
  tx = gsgd_jax.guided(
    optax.sgd(1.0), loss_fn, batch_like=jnp.zeros([]), **settings
  )
  params = jnp.zeros([])
  state = tx.init(params)

  def step(loss, verification):
    nonlocal state
    _, state = tx.update(
      jnp.ones([]),
      state,
      params,
      value=jnp.float64(loss),
      batch=jnp.float64(loss),
      verification=jnp.float64(verification),
    )
    return state

  return step


def test_scores_by_hand():
  step = one_window(window=4, replays=2, revisit=None)
  assert step(2.0, 5.0).window.scores[0] == 0  # No V yet, no score.
  # V falls from 5 to 4: +(5 - 2) for batch 0.
  assert step(6.0, 4.0).window.scores[:2].tolist() == [3, 0]
  # V rises from 4 to 7: -(4 - L): -2 for batch 0, +2 for batch 1.
  assert step(9.0, 7.0).window.scores[:3].tolist() == [1, 2, 0]
  # V falls from 7 to 6: +5, +1, -2.
  state = step(1.0, 6.0)
  assert state.window.scores.tolist() == [6, 3, -2, 0]
  assert state.replayed.tolist() == [0, 1]
  assert state.gradient_evaluations == 6
  # V survives the end of the window.
  state = step(1.0, 3.0)
  assert state.average_error == 3 and state.window.scores[0] == 0
  assert step(1.0, 2.0).window.scores[0] == 2
  # V stays at 2, which is no help: -(2 - 1) for both batches.
  assert step(1.0, 2.0).window.scores[:2].tolist() == [1, -1]


def test_scores_by_hand_in_the_convolutional_variant():
  step = one_window(window=3, replays=1, revisit=1, average_scores=True)
  step(2.0, 5.0)
  # Batch 0 collects 5 - 2; batch 1 enters with its own 5 - 4.
  assert step(6.0, 4.0).window.scores[:2].tolist() == [3, 1]
  # Only batch 1 is scored anew: mean of 1 and -(4 - 6); batch 2 enters -3.
  state = step(9.0, 7.0)
  np.testing.assert_allclose(state.window.scores, [3, 1.5, -3])
  assert state.replayed.tolist() == [0]


def test_scores_by_hand_with_free_scoring():
  tx = gsgd_jax.guided(optax.sgd(1.0), window=3, replays=1)
  params = jnp.zeros([])
  state = tx.init(params)
  for value in (4.0, 2.0, 8.0):
    _, state = tx.update(jnp.ones([]), state, params, value=value)
  # V: 4, 3.8, 4.22. Batch 0: 4 - 4, then -(3.8 - 4); batch 1: -(3.8 - 2).
  np.testing.assert_allclose(state.window.scores, [0.2, -1.8, 0], atol=1e-12)
  np.testing.assert_allclose(state.average_error, 4.22)
  # The arriving batch's distance from the average before it.
  np.testing.assert_allclose(state.window.surprises, [0, 2, 4.2])


def test_equal_ones_go_to_the_earlier_batch():
  step = one_window(window=4, replays=3, select='surprise', revisit=None)
  for verification in (5.0, 4.0, 4.0, 3.0):
    state = step(2.0 if verification > 3 else 1.0, verification)
  # |V - value|: 0, 3, 2, 3: positions 1 and 3 are tied.
  assert state.window.surprises.tolist() == [0, 3, 2, 3]
  assert state.replayed[0] == 1


@pytest.mark.parametrize('select', SELECT)
def test_every_selection_replays_as_many_as_consistent(select):
  problem = helpers.make_problem('logistic', 5, 3, 60, seed=1)

  def replayed(select):
    tx = gsgd_jax.guided(
      optax.sgd(0.1),
      problem.loss_fn,
      window=6,
      revisit=None,
      select=select,
      batch_like=problem.batch_like,
    )
    # The parameters do not move, so all selections see the same scores.
    frozen = optax.GradientTransformationExtraArgs(
      tx.init,
      lambda *args, **kwargs: (
        optax.tree.zeros_like(args[0]),
        tx.update(*args, **kwargs)[1],
      ),
    )
    ((_, state),) = helpers.run(
      frozen, problem, 'scan', verification_at=lambda t: t
    )
    return state.replayed[5::6]

  chosen, consistent = replayed(select), replayed('consistent')
  assert (consistent >= 0).sum() > 5
  np.testing.assert_array_equal(chosen >= 0, consistent >= 0)
  for row in chosen:
    row = row[row >= 0]
    assert len(set(row.tolist())) == len(row)
  if select != 'consistent':
    assert not np.array_equal(chosen, consistent)


def test_a_replay_is_a_packet():
  """What `inner` is told about arrivals and about replays."""
  seen = []

  def spy(updates, state, params=None, **extra):
    seen.append({k: np.shape(v) for k, v in extra.items()})
    del params
    return optax.tree.scale(-0.1, updates), jax.tree.map(
      lambda x, y: jnp.asarray(y, x.dtype),
      state,
      {k: extra[k] for k in state},
    )

  inner = optax.GradientTransformationExtraArgs(
    lambda params: dict(
      staleness=jnp.int32(-1),
      worker=jnp.int32(-1),
      value=jnp.float64(-1),
      stale_params=params * 0,
    ),
    spy,
  )
  loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2)
  tx = gsgd_jax.guided(
    inner,
    loss_fn,
    window=2,
    replays=1,
    batch_like=jnp.zeros([]),
    revisit=None,
  )
  params = jnp.array([1.0])
  state = tx.init(params)
  for batch, verification in ((0.5, 0.0), (3.0, 0.0)):
    before = params
    updates, state = tx.update(
      jnp.array([1.0]),
      state,
      params,
      value=9.0,
      batch=jnp.float64(batch),
      verification=jnp.float64(verification),
      staleness=jnp.int32(7),
      worker=jnp.int32(5 if batch == 0.5 else 6),
      stale_params=params,
      someone_elses=3,
    )
    params = optax.apply_updates(params, updates)
  assert state.replayed.tolist() == [0]
  at = before - 0.1
  told = state.inner_state
  assert told['staleness'] == 0 and told['worker'] == 5
  np.testing.assert_allclose(told['value'], np.sum((at - 0.5) ** 2))
  np.testing.assert_allclose(told['stale_params'], at)
  assert all(extra['someone_elses'] == () for extra in seen)


def test_a_stored_gradient_carries_its_age():
  def spy(updates, state, params=None, *, staleness, **extra):
    assert 'batch' not in extra
    replaying = 'stale_params' not in extra
    seen = jnp.where(replaying, staleness, state)
    return optax.tree.scale(-0.1, updates), seen

  inner = optax.GradientTransformationExtraArgs(
    lambda params: jnp.int32(-1), spy
  )
  tx = gsgd_jax.guided(inner, window=4, replays=1)
  state = tx.init(jnp.zeros([]))
  for value in (4.0, 2.0, 1.0, 0.5):
    _, state = tx.update(
      jnp.ones([]),
      state,
      jnp.zeros([]),
      value=value,
      staleness=jnp.int32(10),
      stale_params=jnp.zeros([]),
    )
  # Replayed at the window's end, after its own update and the later ones.
  position = int(state.replayed[0])
  assert position == 1
  assert state.inner_state == 10 + 4 - position


def test_seed_may_be_traced():
  problem = helpers.make_problem('logistic', 4, 2, 30, seed=2)

  @jax.jit
  @jax.vmap
  def selections(seed):
    tx = gsgd_jax.guided(
      optax.sgd(0.1),
      problem.loss_fn,
      select='random',
      batch_like=problem.batch_like,
      seed=seed,
    )
    start, batches, _ = problem.of_seed(0)
    params = helpers.to_tree(start)
    state = tx.init(params)
    for batch in batches:
      value, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
      updates, state = tx.update(grads, state, params, value=value, batch=batch)
      params = optax.apply_updates(params, updates)
    return state.replayed

  first, second = selections(jnp.arange(2))
  assert first.tolist() != second.tolist()


@pytest.mark.parametrize('replays', [1, 3, 6])
def test_a_rule_says_how_many(replays):
  """All at most, but for those at -inf, and those that are NaN."""
  preferences = jnp.array([-jnp.inf, 2.0, 3.0, math.nan, 3.0, -jnp.inf])
  tx = gsgd_jax.guided(
    optax.sgd(0.1),
    window=6,
    replays=replays,
    select=lambda window, **known: preferences,
  )
  state = tx.init(jnp.zeros([]))
  for _ in range(6):
    _, state = tx.update(jnp.zeros([]), state, jnp.zeros([]), value=1.0)
  expected = [2, 4, 1, -1, -1, -1][:replays]
  assert state.replayed.tolist() == expected


@pytest.mark.parametrize(
  'rule, reason',
  [
    (lambda window, **_: window.scores[:2], r'shape \(4,\), got .*shape=\(2,'),
    (lambda window, **_: window.scores > 0, 'floats.*got .*bool.*a mask is'),
    (lambda window, **_: window.workers, 'floats.*got .*int32'),
    (lambda window, **_: jnp.zeros(4, complex), 'floats.*got .*complex'),
    (lambda window, **_: None, 'floats.*got None'),
    (lambda window, **_: {'a': window.scores}, "floats.*got {'a': "),
    (lambda window, **_: 1.0, r'floats.*got .*shape=\(\)'),
    (
      lambda window: window.scores,
      r'of \(window, \*, key, params\), but: .*key',
    ),
  ],
)
def test_rules_that_cannot_be(rule, reason):
  tx = gsgd_jax.guided(optax.sgd(0.1), window=4, select=rule)
  with pytest.raises(ValueError, match=f'select must .*{reason}'):
    tx.init(jnp.zeros([]))


def test_a_rule_is_called_at_the_ends_of_windows():
  seen = []

  def rule(window, **_):
    jax.debug.callback(lambda scores: seen.append(scores), window.scores)
    return window.scores

  tx = gsgd_jax.guided(optax.sgd(0.1), window=5, select=rule)
  zero = jnp.zeros([])
  step = jax.jit(lambda state: tx.update(zero, state, zero, value=1.0)[1])
  state = tx.init(zero)
  for _ in range(17):
    state = step(state)
  jax.effects_barrier()
  assert len(seen) == 3


def test_a_rule_knows_the_window_and_the_parameters():
  """Its batches and the parameters: every loss is taken anew."""
  problem = helpers.make_problem('logistic', 4, 3, 40, seed=6)

  def run(select, **settings):
    tx = gsgd_jax.guided(
      optax.sgd(0.1),
      problem.loss_fn,
      window=5,
      select=select,
      batch_like=problem.batch_like,
      **settings,
    )
    ((flat, state),) = helpers.run(
      gsgd_jax.asynchronous(tx, 3, batch_like=problem.batch_like),
      problem,
      'scan',
    )
    return flat, state.inner_state.replayed

  def hardest_now(window, *, params, **_):
    losses = jax.vmap(lambda batch: problem.loss_fn(params, batch))
    return jnp.where(window.scores > 0, losses(window.batches), -jnp.inf)

  # That of `'hardest'` with all losses taken anew, but for the arriving batch,
  # whose score is 0.
  flat, replayed = run(hardest_now, revisit=None)
  named = lambda window, **_: jnp.where(
    window.scores > 0, window.losses, -jnp.inf
  )
  expected, expected_replayed = run(named, revisit=None)
  assert (replayed >= 0).sum() > 5
  np.testing.assert_array_equal(replayed, expected_replayed)
  np.testing.assert_allclose(flat, expected, rtol=1e-9)


def test_a_diverged_run_does_not_replay():
  tx = gsgd_jax.guided(optax.sgd(0.1), window=4)
  params = jnp.zeros([])
  state = tx.init(params)
  for _ in range(8):
    _, state = tx.update(params, state, params, value=math.nan)
  assert np.all(state.replayed == -1) and state.gradient_evaluations == 8


def test_guided_state_can_be_donated():
  problem = helpers.make_problem('quadratic', 4, 2, 8, seed=0)
  for options in (
    dict(loss_fn=problem.loss_fn, batch_like=problem.batch_like),
    dict(average_scores=True, select='random'),
  ):
    tx = gsgd_jax.guided(optax.sgd(0.1), window=2, **options)
    helpers.run(tx, problem, 'jit')  # Donates both from the first call.


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg', None])
def test_randomness_travels_as_a_key_in_the_batch(impl):
  key = jax.random.PRNGKey(3) if impl is None else jax.random.key(3, impl=impl)
  batch = {'x': jnp.ones([3]), 'key': key}

  def loss_fn(params, batch):
    noise = jax.random.normal(batch['key'], (3,))
    return jnp.mean((params[None] - batch['x'] - noise) ** 2)

  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  tx = gsgd_jax.asynchronous(
    gsgd_jax.guided(
      optax.sgd(0.1), loss_fn, window=2, revisit=None, batch_like=batch
    ),
    2,
    batch_like=like,
  )
  params = jnp.zeros([])
  state = tx.init(params)
  for _ in range(6):
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = jax.jit(tx.update)(
      grads, state, params, value=value, batch=batch
    )
    params = optax.apply_updates(params, updates)
  assert state.inner_state.gradient_evaluations > state.inner_state.count
  with pytest.raises(ValueError, match='key'):
    tx.update(
      grads, state, params, value=value, batch=batch | {'key': jnp.ones([3])}
    )
