"""Compensations by name: what the application makes of each."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import gsgd_jax
from gsgd_jax import (
  batches,
  compensations,
  data,
  events,
  experiment,
  report,
  settings,
  tasks,
  transformation,
)
from tests.test_experiment import short

pytestmark = pytest.mark.usefixtures('as_users_run_it')
RATE, N, WINDOW = 0.05, 3, 5


def setting(**changes):
  changes = dict(learning_rate=RATE, workers=N, window=WINDOW) | changes
  return short(**changes)


def learned(config):
  """(loss, parameters, batches) of a config's first seed."""
  dataset = data.load(config.dataset, 0)
  task = tasks.make(config, dataset)
  rows = [
    batches.batch_rows(len(dataset.train.labels), config.batch_size, 0, t)
    for t in range(25)
  ]
  examples = [
    jax.tree.map(lambda x, r=r: jnp.asarray(x[r]), dataset.train) for r in rows
  ]
  return task.loss_fn, task.model.init(jax.random.key(0)), examples


def corrected(correction):
  return lambda loss_fn: optax.chain(
    correction(loss_fn) if callable(correction) else correction,
    optax.sgd(RATE),
  )


# Each by the library's own names; what is to be inside guided SGD.
BY_HAND = {
  'delay_compensation': corrected(gsgd_jax.delay_compensation()),
  'exact_delay_compensation': corrected(
    lambda loss_fn: gsgd_jax.exact_delay_compensation(loss_fn)
  ),
  'scale_by_staleness': corrected(gsgd_jax.scale_by_staleness()),
  'drop_stale': lambda loss_fn: optax.sgd(RATE),
  'rennala': lambda loss_fn: optax.sgd(RATE),
  'dana': lambda loss_fn: gsgd_jax.dana(RATE, N),
  'dana_slim': lambda loss_fn: optax.sgd(RATE),
  'dana_dc': lambda loss_fn: optax.chain(
    gsgd_jax.delay_compensation(2.0), gsgd_jax.dana(RATE, N)
  ),
  'smega2': lambda loss_fn: gsgd_jax.smega2(RATE, N),
  'predict': lambda loss_fn: gsgd_jax.predict(optax.sgd(RATE), N - 1),
  'spike_compensation': lambda loss_fn: gsgd_jax.spike_compensation(
    RATE, N - 1
  ),
  'adaptive_braking': lambda loss_fn: gsgd_jax.adaptive_braking(RATE),
  'asynchronous_nesterov': lambda loss_fn: gsgd_jax.asynchronous_nesterov(RATE),
  'delayed_nesterov': lambda loss_fn: gsgd_jax.delayed_nesterov(RATE, N),
}
ACCEPTANCE = {
  'drop_stale': lambda tx, like: gsgd_jax.drop_stale(tx, N - 1),
  'rennala': lambda tx, like: gsgd_jax.rennala(tx, N, batch_like=like),
}


def by_hand(name, guided, loss_fn, batch):
  tx = BY_HAND[name](loss_fn)
  if guided:
    joined = N if name == 'rennala' else 1
    like = jax.tree.map(lambda x: jnp.concatenate([x] * joined), batch)
    replays = None
    if name.startswith('dana'):
      replays = optax.sgd(RATE / (1 - 0.9))
    tx = gsgd_jax.guided(
      tx,
      loss_fn,
      window=WINDOW,
      revisit=None,
      replay_with=replays,
      batch_like=like,
    )
  if name in ACCEPTANCE:
    tx = ACCEPTANCE[name](tx, batch)
  momentum = optax.trace(0.9, nesterov=True)
  return gsgd_jax.asynchronous(
    tx,
    N,
    worker_transform=momentum if name == 'dana_slim' else None,
    keep_params=True,
    batch_like=batch,
  )


def trained(tx, loss_fn, params, batches, calls):
  state = tx.init(params)

  @jax.jit
  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss_fn)(
      gsgd_jax.worker_params(params, state), batch
    )
    updates, state = tx.update(
      grads, state, params, value=value, batch=batch, arrival=jnp.int32(0)
    )
    return optax.apply_updates(params, updates), state

  for batch in batches[:calls]:
    params, state = step(params, state, batch)
  return params


@pytest.mark.parametrize('guided', [False, True])
@pytest.mark.parametrize('name', compensations.NAMES)
def test_what_a_name_makes(name, guided):
  # Guided ones are compared until the first replays: later ones may be tied.
  config = setting()
  loss_fn, params, batches = learned(config)
  method = events.method_named(
    f'asynchronous+{name}' + ('+consistent' if guided else '')
  )
  tx = transformation.make_transformation(config, method, loss_fn, batches[0])
  expected = by_hand(name, guided, loss_fn, batches[0])
  calls = 25 if name == 'rennala' or not guided else N - 1 + WINDOW
  actual, expected = (
    trained(t, loss_fn, params, batches, calls) for t in (tx, expected)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
    actual,
    expected,
  )
  moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), actual, params)
  assert max(jax.tree.leaves(moved)) > 1e-4


def test_every_name_is_known_everywhere():
  assert set(compensations.NAMES) == set(settings.COMPENSATIONS)
  assert set(settings.COMPENSATIONS) == set(settings.COMPENSATIONS)
  given = settings.default_config().compensation_kwargs
  assert set(given) == set(settings.COMPENSATIONS)
  assert not set(settings.COMPENSATIONS) & set(events.GUIDANCE)


IMPOSSIBLE = {
  'delayed': {'dana', 'dana_slim', 'dana_dc'},
  'synchronous': {'dana_slim'},
}


@pytest.mark.parametrize(
  'parallel, combine',
  [
    ('sequential', 'sequential'),
    ('delayed', 'sequential'),
    ('synchronous', 'sequential'),
    ('synchronous', 'mean'),
    ('data_parallel', 'sequential'),
  ],
)
@pytest.mark.parametrize('name', compensations.NAMES)
def test_every_method_has_every_compensation_it_can(name, parallel, combine):
  config = setting(
    methods=(f'{parallel}+{name}', f'{parallel}+{name}+random'),
    combine=combine,
    updates=250,
  )
  refused = IMPOSSIBLE.get(parallel, set()) if combine == 'sequential' else {}
  if name in refused:
    with pytest.raises(ValueError, match=f'^{parallel}.{name}: .* use ') as e:
      experiment.check(config)
    assert '\n' not in str(e.value)
  else:
    experiment.check(config)


def test_where_nothing_is_stale_it_is_the_limit():
  """Sequential training is the compensation's own, with one worker."""
  config = setting()
  loss_fn, params, batches = learned(config)
  for name in ('dana_slim', 'delayed_nesterov'):
    method = events.method_named(f'sequential+{name}')
    tx = transformation.make_transformation(config, method, loss_fn, batches[0])
    nesterov = gsgd_jax.asynchronous(
      optax.sgd(RATE, momentum=0.9, nesterov=True), 1
    )
    one, other = (
      trained(t, loss_fn, params, batches, 10) for t in (tx, nesterov)
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      one,
      other,
    )


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({}, ['sequential', 'asynchronous', 'asynchronous+dana']),
    (dict(methods=('asynchronous+random',)), ['asynchronous+dana+random']),
    (
      dict(methods=('asynchronous+smega2', 'asynchronous+dana,asynchronous')),
      ['asynchronous+smega2', 'asynchronous+dana', 'asynchronous'],
    ),
    (
      dict(methods=('synchronous', 'data_parallel')),
      ['synchronous', 'synchronous+dana', 'data_parallel'],
    ),
    (dict(parallel='asynchronous'), ['asynchronous+dana']),
    (
      dict(parallel='synchronous', guidance='random'),
      ['synchronous+dana+random'],
    ),
  ],
)
def test_a_compensation_for_all(changes, expected):
  """Of stale methods, beside the plain ones; one alone stays alone."""
  base = dict(methods=('sequential', 'asynchronous'), compensation='dana')
  config = setting(**(base | changes))
  assert [m.name for m in events.methods(config)] == expected


def kwargs(**given):
  config = setting(methods=('asynchronous+dana', 'asynchronous+smega2'))
  config.compensation_kwargs.update(given)
  return config


def test_arguments():
  config = kwargs(
    dana=dict(momentum=0.5, learning_rate=0.25), smega2=dict(momentum=0.75)
  )
  arguments = compensations.arguments_of
  assert arguments(config, 'dana') == dict(momentum=0.5, learning_rate=0.25)
  assert arguments(config, 'smega2') == dict(momentum=0.75)
  dana, smega2 = events.methods(config)
  assert transformation.learning_rate(config, dana) == 0.25
  assert transformation.learning_rate(config, smega2) == RATE
  config = kwargs(momentum=0.5)
  config.methods = ('asynchronous', 'asynchronous+dana')
  assert arguments(config, 'dana') == dict(momentum=0.5)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(momentum=0.5), 'write compensation_kwargs.dana.momentum'),
    (dict(dana=dict(mom=3)), 'no argument mom; .* did you mean momentum'),
    (dict(dana=dict(momentum=3)), '^compensation dana: momentum must be'),
    (dict(dana=dict(learning_rate=-1.0)), 'learning_rate of compensation dana'),
    (dict(dana=dict(learning_rate='x')), 'learning_rate of compensation dana'),
    (dict(dana=dict(workers=2)), 'no argument workers; it has momentum'),
    (dict(rennala=dict(size=2)), 'compensation_kwargs.rennala belongs to'),
    (dict(rennala=dict(sise=2)), 'compensation_kwargs.rennala belongs to'),
    (dict(smega2=dict(workers=2**31)), 'workers must be below 2'),
    (dict(dana=dict(momentum=None)), 'compensation dana'),
    (dict(smega2=dict(loss_fn=2)), 'no argument loss_fn'),
  ],
)
def test_wrong_arguments(changes, message):
  config = kwargs(**changes)
  with pytest.raises(ValueError, match=message) as e:
    experiment.check(config)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(compensation='dnaa'), 'compensation must be one of .*mean dana'),
    (dict(methods=('asynchronous+dnaa',)), 'what follows .*did you mean dana'),
    (dict(methods=('asynchronous+dana+smega2',)), 'must be one of consistent'),
    (dict(methods=('asynchronous+random+dana',)), r'PARALLEL\[\+COMPENSATION'),
    (dict(methods=('asynchronous+dana+random+random',)), 'a method is'),
    (
      dict(methods=('asynchronous+dana', 'asynchronous+dana')),
      'methods must differ, got asynchronous.dana twice',
    ),
    (
      dict(methods=('sequential',), compensation='dana'),
      'compensation=dana changes nothing.*methods=sequential.dana',
    ),
    (
      dict(compensation='dana_slim', compensation_kwargs=dict(momentum=1.0)),
      'compensation dana_slim: momentum must be at least 0 and below 1',
    ),
    (
      dict(compensation='dana_slim', compensation_kwargs=dict(momentum='a')),
      'compensation dana_slim: momentum must be a number',
    ),
    (
      dict(compensation='rennala', compensation_kwargs=dict(size=26)),
      'means of 26 gradients, and there are only updates=25',
    ),
    (
      dict(compensation='rennala', compensation_kwargs=dict(size=9)),
      "window must be at most the server's 2 updates, got 5",
    ),
    (
      dict(
        compensation='delay_compensation',
        compensation_kwargs=dict(adaptive='yes'),
      ),
      'adaptive must be True or False',
    ),
    (
      dict(
        compensation='spike_compensation',
        compensation_kwargs=dict(delay=None),
      ),
      'delay must be a number',
    ),
    (dict(compensation='dana', optimizer='adam'), 'an optimizer of its own'),
    (
      dict(compensation='dana', optimizer_kwargs=dict(momentum=0.9)),
      'an optimizer of its own',
    ),
    (
      dict(
        compensation='dana',
        compensation_kwargs=dict(dana=3),
      ),
      'compensation_kwargs.dana must be a dict',
    ),
    (
      dict(compensation='dana_dc', stored_gradients=True, revisit=0),
      'needs to know where a gradient was taken',
    ),
    (
      dict(compensation_kwargs=dict(momentum=0.9)),
      'compensation_kwargs.momentum belongs to a compensation, and no method',
    ),
  ],
)
def test_wrong_settings(changes, message):
  config = setting(methods=('asynchronous', 'asynchronous+consistent'))
  for name, value in changes.items():
    if isinstance(value, dict):
      value = ml_collections.ConfigDict(value)
    setattr(config, name, value)
  with pytest.raises(ValueError, match=message) as e:
    experiment.check(config)
  assert '\n' not in str(e.value)


def test_schedules_drive_them_by_arrivals():
  """A rate of zero from the first arrival on moves nothing, replays neither."""
  config = setting(
    methods=('asynchronous+dana+consistent',),
    schedule='piecewise_constant_schedule',
    updates=12,
    evaluate_every=6,
    seeds=1,
  )
  config.schedule_kwargs.boundaries_and_scales = ((6, 0.0),)
  (history,) = experiment.run(config).values()
  assert history.train_loss[0] != history.train_loss[1]
  assert history.train_loss[1] == history.train_loss[2]


def test_a_run_side_by_side():
  config = setting(
    methods=(
      'asynchronous',
      'asynchronous+drop_stale',
      'asynchronous+rennala+consistent',
      'asynchronous+exact_delay_compensation',
    ),
    window=2,
    updates=30,
  )
  config.compensation_kwargs.drop_stale.max_staleness = 1
  config.compensation_kwargs.rennala.size = 4
  histories = experiment.run(config)
  plain, ringmaster, rennala, exact = histories.values()
  assert [h.status for h in histories.values()] == ['completed'] * 4
  np.testing.assert_array_equal(plain.refused, 0)
  # Two of three workers are heard; the first round has nobody late.
  assert ringmaster.refused[-1].tolist() == [10, 10]
  assert ringmaster.applied[-1].tolist() == [20, 20]
  assert ringmaster.maximal_staleness[-1].max() == 1
  # Four of six are kept, and applied as one.
  assert rennala.refused[-1].tolist() == [10, 10]
  assert rennala.applied[-1].tolist() == [5, 5]
  # A replay's batch is of four workers' batches, and so is its price.
  replays = (rennala.gradient_evaluations[-1] - 32) / 4
  assert (replays > 0).any() and (replays % 1 == 0).all()
  np.testing.assert_allclose(
    rennala.simulated_time[-1], plain.simulated_time[-1] + 4 * replays
  )
  # The first one of all is fresh; all others cost two gradients more.
  gradients = 2 * 29 + 32
  assert exact.gradient_evaluations[-1].tolist() == [gradients] * 2
  np.testing.assert_allclose(
    exact.simulated_time[-1], plain.simulated_time[-1] + 2 * 29
  )
  said = ' '.join(report.sentences(config, histories))
  assert 'asynchronous, Ringmaster: 33 % of the gradients were refused' in said
  assert 'asynchronous, Rennala, guided: 33 % of the gradients were' in said
  assert 'Exact DC changes the accuracy of asynchronous training by' in said


def test_what_is_said_of_a_compensation():
  config = setting(
    methods=('sequential', 'asynchronous', 'asynchronous+random'),
    compensation='dana',
    updates=10,
  )
  said = ' '.join(report.sentences(config, experiment.run(config)))
  assert 'The delay of 3 workers changes test accuracy by' in said
  assert 'DANA changes the accuracy of asynchronous training by' in said
  assert 'change the accuracy of asynchronous training with DANA by' in said
