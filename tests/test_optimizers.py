"""Optimizers and schedules by name, against optax and a plain loop."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import gsgd_jax
from gsgd_jax import models, optimizers
from tests import helpers, reference

NEEDY = {'dpsgd': 'l2_norm_clip', 'schedule_free': 'base_optimizer'}
NAMES = [name for name in optimizers.names() if name not in NEEDY]
MODEL = models.mlp(3, [4], 2)
LOSS_FN = models.cross_entropy(MODEL)

pytestmark = pytest.mark.usefixtures('as_users_run_it')

# Two of optax's optimizers warn that they will change.
ignore_optax = pytest.mark.filterwarnings(
  'ignore:.*is deprecated', 'ignore:Specifying a key will be required'
)


@functools.cache
def abstract_params():
  return jax.eval_shape(MODEL.init, jax.random.key(0))


def dry_run(tx, name, **changed):
  """As an experiment does it: nothing is there but shapes."""
  extra = dict(
    value=jax.ShapeDtypeStruct([], jnp.float32),
    batch=(np.ones([5, 3], np.float32), np.zeros([5], np.int32)),
    arrival=jax.ShapeDtypeStruct([], jnp.int32),
  )
  optimizers.dry_run(tx, abstract_params(), name, **(extra | changed))


# Every optimizer.


def test_names():
  assert set(optimizers.names()) > {*RATES, *NEEDY}
  assert optimizers.names() == sorted(optimizers.names())
  # No optimizer, no learning rate, or only a part of one.
  for name in ('chain', 'identity', 'scale_by_adam', 'adaptive_grad_clip'):
    assert name not in optimizers.names()


@ignore_optax
@pytest.mark.parametrize('name', NAMES)
def test_every_optimizer_can_be_made(name):
  rates = [0.1, optax.linear_schedule(0.1, 0.0, 10)]
  if name == 'rprop':
    rates.pop()  # It takes no schedule.
  for rate in rates:
    tx = optimizers.make(name, rate)
    dry_run(optimizers.with_value_fn(tx, LOSS_FN), name)


def factory_of(name):
  """What `name` stands for, as optax would be called directly."""
  aliases = {
    'momentum': functools.partial(optax.sgd, momentum=0.9),
    'nesterov': functools.partial(optax.sgd, momentum=0.9, nesterov=True),
  }
  module = optax if hasattr(optax, name) else optax.contrib
  return aliases.get(name) or getattr(module, name)


def program(tx):
  """`init` and `update` as the text of what they compute."""
  tx = optax.with_extra_args_support(tx)
  batch = (jnp.ones([5, 3]), jnp.zeros([5], jnp.int32))
  fn = lambda params, obj_fn=None: LOSS_FN(params, batch)

  def both(params, grads, value):
    extra = dict(value=value, grad=grads, value_fn=fn, obj_fn=fn)
    return tx.update(grads, tx.init(params), params, **extra)

  params = abstract_params()
  value = jax.ShapeDtypeStruct([], jnp.float32)
  text, out = jax.make_jaxpr(both, return_shape=True)(params, params, value)
  return re.sub(' at 0x[0-9a-f]+', '', str(text)), str(out)


@ignore_optax
@pytest.mark.parametrize('name', NAMES)
def test_with_a_number_it_is_the_program_of_optax(name):
  assert program(optimizers.make(name, 0.05)) == program(factory_of(name)(0.05))


@pytest.mark.parametrize('name', ['adadelta', 'adafactor', 'lbfgs', 'cocob'])
def test_without_a_rate_it_is_the_program_of_optax(name):
  assert program(optimizers.make(name, None)) == program(factory_of(name)())


def test_other_arguments_reach_optax():
  kwargs = dict(b1=0.5, nesterov=True)
  ours = program(optimizers.make('adam', 0.05, kwargs))
  assert ours == program(optax.adam(0.05, **kwargs))
  assert ours != program(optax.adam(0.05))
  assert program(
    optimizers.make('nesterov', 0.05, dict(momentum=0.5))
  ) == program(optax.sgd(0.05, momentum=0.5, nesterov=True))


def trajectory(tx, arrivals=7):
  """Updates and states over some steps, with gradients made up."""
  params = {'first': jnp.linspace(-1, 1, 12).reshape(4, 3), 'rest': jnp.ones(3)}
  tx = optax.with_extra_args_support(tx)
  rng = np.random.default_rng(0)
  grads = jax.tree.map(
    lambda p: rng.normal(size=(arrivals, *p.shape)).astype(np.float32), params
  )

  def step(carry, grads_and_arrival):
    params, state = carry
    grads, arrival = grads_and_arrival
    updates, state = tx.update(grads, state, params, arrival=arrival)
    return (optax.apply_updates(params, updates), state), (updates, state)

  xs = grads, np.arange(arrivals, dtype=np.int32)
  return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), xs)[1])()


@pytest.mark.parametrize(
  'name',
  ['sgd', 'momentum', 'nesterov', 'adam', 'schedule_free_sgd'],
)
def test_with_a_number_it_is_optax_to_the_bit(name):
  ours = trajectory(optimizers.make(name, 0.05))
  theirs = trajectory(factory_of(name)(0.05))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@pytest.mark.parametrize('name', ['momentum', 'adamw'])
def test_with_a_schedule_it_is_optax_where_nothing_is_replayed(name):
  schedule = optax.exponential_decay(0.1, 1, 0.5)
  ours, _ = trajectory(optimizers.make(name, schedule))
  theirs, _ = trajectory(factory_of(name)(schedule))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs
  )


def test_the_state_of_a_schedule_is_that_of_a_number():
  """No second count: the rate is the caller's."""
  init = lambda rate: optimizers.make('momentum', rate).init(jnp.ones(2))
  scheduled = init(optax.linear_schedule(0.1, 0.0, 10))
  assert jax.tree.structure(scheduled) == jax.tree.structure(init(0.1))


# Training.

RATES = dict(
  sgd=1.0,
  momentum=0.2,
  nesterov=0.2,
  adagrad=0.5,
  adadelta=30.0,
  rmsprop=0.05,
  adam=0.1,
  adamw=0.1,
  muon=0.1,
  lion=0.05,
  schedule_free_sgd=2.0,
  polyak_sgd=1.0,
  momo=1.0,
  lbfgs=1.0,
  sophia=0.05,
)


def examples():
  """Eight batches of eight, told apart by a plane."""
  inputs = np.random.default_rng(1).normal(size=(8, 8, 3)).astype(np.float32)
  return inputs, (inputs.sum(axis=-1) > 0).astype(np.int32)


START = np.zeros([3, 2], np.float32)
BATCH_LIKE = jax.tree.map(lambda x: x[0], examples())


def small_loss_fn(params, batch):
  inputs, labels = batch
  return optax.softmax_cross_entropy_with_integer_labels(
    inputs @ params, labels
  ).mean()


def train(tx, calls=40):
  """Parameters and state after some calls."""

  def step(carry, call):
    params, state = carry
    batch = jax.tree.map(lambda x: jnp.asarray(x)[call % 8], examples())
    value, grads = jax.value_and_grad(small_loss_fn)(
      gsgd_jax.worker_params(params, state), batch
    )
    updates, state = tx.update(
      grads, state, params, value=value, batch=batch, arrival=call
    )
    return (optax.apply_updates(params, updates), state), None

  def run(params):
    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(calls))[0]

  return jax.jit(run)(START)


def loss_of(params):
  whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), examples())
  return float(small_loss_fn(params, whole))


def optimizer(name, rate, kwargs=None):
  tx = optimizers.make(name, rate, kwargs)
  return optimizers.with_value_fn(tx, small_loss_fn)


def guided_and_stale(tx):
  tx = gsgd_jax.guided(
    tx, small_loss_fn, window=4, select='random', batch_like=BATCH_LIKE
  )
  return gsgd_jax.asynchronous(tx, workers=3, batch_like=BATCH_LIKE)


@pytest.mark.parametrize('name', RATES)
def test_lowers_the_loss(name):
  params, state = train(optimizer(name, RATES[name]))
  params = optimizers.evaluation_params(params, state)
  assert loss_of(params) < 0.4 * loss_of(START)


@pytest.mark.parametrize('name', ['polyak_sgd', 'sophia'])
def test_lowers_the_loss_guided_and_stale(name):
  params, state = train(guided_and_stale(optimizer(name, RATES[name])))
  assert state.inner_state.gradient_evaluations > state.version
  assert loss_of(params) < 0.2 * loss_of(START)


@pytest.mark.parametrize('name', ['adam', 'polyak_sgd'])
def test_lowers_the_loss_with_a_schedule(name):
  rate = optimizers.make_schedule('cosine_decay', RATES[name], 40, warmup=5)
  params, _ = train(optimizer(name, rate))
  assert loss_of(params) < 0.4 * loss_of(START)


def test_evaluation_params():
  name = 'schedule_free_sgd'
  params, state = train(guided_and_stale(optimizer(name, RATES[name])))
  inner = state.inner_state.inner_state
  assert isinstance(inner, optax.contrib.ScheduleFreeState)
  expected = optax.contrib.schedule_free_eval_params(inner, params)
  actual = optimizers.evaluation_params(params, state)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  assert loss_of(actual) < 0.2 * loss_of(START)
  assert loss_of(actual) != loss_of(params)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lbfgs'])
def test_evaluation_params_are_the_parameters_elsewhere(name):
  state = guided_and_stale(optimizers.make(name, 0.1)).init(START)
  assert optimizers.evaluation_params(START, state) is START


# Where L-BFGS ends without a line search is decided by rounding.
@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.parametrize(
  'name, kwargs',
  [
    ('rprop', {}),
    ('prodigy', {}),
    ('lbfgs', dict(linesearch=None)),
  ],
)
def test_a_warmup_may_start_from_nothing(name, kwargs):
  """Or is refused."""
  rate = optimizers.make_schedule('constant', 0.5, 40, warmup=5)
  try:
    tx = optimizer(name, rate, kwargs)
  except ValueError:
    return
  params, _ = train(tx)
  assert loss_of(params) < loss_of(START)


def test_rprop_takes_no_schedule():
  """It would look at its first rate alone."""
  with pytest.raises(ValueError, match='rprop looks at its rate once'):
    optimizers.make('rprop', optax.linear_schedule(0.1, 0.0, 10))


# Schedules.

ETA, ARRIVALS = 0.3, 20
PIECES = ((5, 0.5), (9, 0.1))
CYCLES = [
  dict(init_value=0.0, peak_value=p, warmup_steps=2, decay_steps=9, end_value=0)
  for p in (0.3, 0.2)
]
# Arguments that must be given, and what the schedule then is.
SCHEDULES = {
  'constant_schedule': ({}, lambda n: optax.constant_schedule(ETA)),
  'cosine_decay_schedule': ({}, lambda n: optax.cosine_decay_schedule(ETA, n)),
  'cosine_onecycle_schedule': (
    {},
    lambda n: optax.cosine_onecycle_schedule(n, ETA),
  ),
  'exponential_decay': (
    dict(decay_rate=0.5),
    lambda n: optax.exponential_decay(ETA, n, 0.5),
  ),
  'linear_onecycle_schedule': (
    {},
    lambda n: optax.linear_onecycle_schedule(n, ETA),
  ),
  'linear_schedule': ({}, lambda n: optax.linear_schedule(ETA, 0.0, n)),
  'piecewise_constant_schedule': (
    {},
    lambda n: optax.piecewise_constant_schedule(ETA),
  ),
  'piecewise_interpolate_schedule': (
    dict(interpolate_type='linear', boundaries_and_scales=PIECES),
    lambda n: optax.piecewise_interpolate_schedule('linear', ETA, dict(PIECES)),
  ),
  'polynomial_schedule': (
    dict(power=2.0),
    lambda n: optax.polynomial_schedule(ETA, 0.0, 2.0, n),
  ),
  'sgdr_schedule': (
    dict(cosine_kwargs=CYCLES),
    lambda n: optax.sgdr_schedule(CYCLES),
  ),
  'warmup_constant_schedule': (
    dict(warmup_steps=4),
    lambda n: optax.warmup_constant_schedule(0.0, ETA, 4),
  ),
  'warmup_cosine_decay_schedule': (
    dict(warmup_steps=4),
    lambda n: optax.warmup_cosine_decay_schedule(0.0, ETA, 4, n),
  ),
  'warmup_exponential_decay_schedule': (
    dict(warmup_steps=4, decay_rate=0.5),
    lambda n: optax.warmup_exponential_decay_schedule(0.0, ETA, 4, n, 0.5),
  ),
}


def rates_of(*schedules, arrivals=ARRIVALS):
  """The rates of schedules, or of numbers."""

  def one(schedule, t):
    rate = schedule(t) if callable(schedule) else schedule
    return jnp.asarray(rate, jnp.float32)

  every = lambda t: [one(schedule, t) for schedule in schedules]
  return [np.asarray(r) for r in jax.jit(jax.vmap(every))(jnp.arange(arrivals))]


def test_schedule_names():
  assert optimizers.schedule_names() == sorted(SCHEDULES)


@pytest.mark.usefixtures('as_users_compile_it')  # Bits.
@pytest.mark.parametrize('name', SCHEDULES)
def test_a_schedule_is_that_of_optax(name):
  given, expected = SCHEDULES[name]
  short = name.removesuffix('_schedule')
  long = optimizers.make_schedule(name, ETA, ARRIVALS, given)
  by_short_name = optimizers.make_schedule(short, ETA, ARRIVALS, given)
  wanted, *both = rates_of(
    expected(ARRIVALS), long, by_short_name, arrivals=ARRIVALS + 5
  )
  for actual in both:
    np.testing.assert_array_equal(actual, wanted)
  optimizers.check_rates(name, long, ARRIVALS)


@pytest.mark.usefixtures('as_users_compile_it')  # Bits.
@pytest.mark.parametrize('name', SCHEDULES)
def test_warmup(name):
  """A straight line from 0, then the schedule over what is left."""
  given, expected = SCHEDULES[name]
  warmup = 6
  actual, after = rates_of(
    optimizers.make_schedule(name, ETA, ARRIVALS, given, warmup),
    expected(ARRIVALS - warmup),
  )
  rise = ETA * (np.arange(warmup) + 1) / warmup
  np.testing.assert_allclose(actual[:warmup], rise, rtol=1e-6)
  np.testing.assert_array_equal(actual[warmup:], after[:-warmup])


@pytest.mark.parametrize(
  'name, given, expected',
  [
    (
      'linear',
      dict(init_value=0.5, end_value=0.1, transition_steps=7),
      optax.linear_schedule(0.5, 0.1, 7),
    ),
    (
      'linear',
      dict(transition_begin=3),
      optax.linear_schedule(ETA, 0.0, ARRIVALS, 3),
    ),
    (
      'warmup_cosine_decay',
      dict(init_value=0.1, warmup_steps=2, decay_steps=9),
      optax.warmup_cosine_decay_schedule(0.1, ETA, 2, 9),
    ),
    ('constant', dict(value=0.7), 0.7),
  ],
)
def test_what_is_given_comes_first(name, given, expected):
  actual = optimizers.make_schedule(name, ETA, ARRIVALS, given)
  np.testing.assert_array_equal(*rates_of(actual, expected))


def test_pieces_may_be_pairs():
  forms = [PIECES, list(PIECES), list(map(list, PIECES)), dict(PIECES)]
  schedules = []
  for pieces in forms:
    given = dict(boundaries_and_scales=pieces)
    schedules.append(
      optimizers.make_schedule('piecewise_constant', 1.0, 12, given)
    )
    assert given == dict(boundaries_and_scales=pieces)
  wanted, *actual = rates_of(
    optax.piecewise_constant_schedule(1.0, dict(PIECES)), *schedules
  )
  assert len(set(wanted.tolist())) == 3
  for rates in actual:
    np.testing.assert_array_equal(rates, wanted)


def test_a_constant_rate_is_a_number():
  for name in ('constant', 'constant_schedule'):
    for given in (None, {}):
      assert optimizers.make_schedule(name, ETA, ARRIVALS, given) is ETA


BAD_RATES = {
  'negative': (
    optax.linear_schedule(1.0, -1.0, 8),
    'schedule negative gives the learning rate -0.25 at arrival 5; it must be '
    'finite and not negative',
  ),
  'negative at once': (
    lambda t: -1.0,
    'schedule negative at once gives the learning rate -1 at arrival 0; it '
    'must be finite and not negative',
  ),
  'NaN': (
    lambda t: jnp.where(t == 3, jnp.nan, 1.0),
    'schedule NaN gives the learning rate nan at arrival 3; it must be finite '
    'and not negative',
  ),
  'infinite at last': (
    lambda t: jnp.where(t == ARRIVALS - 1, jnp.inf, 0.0),
    'schedule infinite at last gives the learning rate inf at arrival 19; it '
    'must be finite and not negative',
  ),
  'no number': (
    optimizers.make_schedule('cosine_decay', ETA, 9, dict(alpha='x')),
    'schedule no number refuses its arguments: unsupported operand type(s) '
    "for -: 'int' and 'str'",
  ),
}


@pytest.mark.parametrize('case', BAD_RATES)
def test_bad_rates(case):
  rate, message = BAD_RATES[case]
  with pytest.raises(ValueError) as error:
    optimizers.check_rates(case, rate, ARRIVALS)
  assert str(error.value) == message


def test_rates_that_may_be():
  optimizers.check_rates('constant', 0.1, ARRIVALS)
  optimizers.check_rates('zero', lambda t: 0.0, ARRIVALS)
  # After the run a rate may be anything.
  later = lambda t: jnp.where(t == ARRIVALS, jnp.nan, 0.1)
  optimizers.check_rates('later', later, ARRIVALS)


@pytest.mark.parametrize('value', [(0.1, 0.2), [-1.0, 1.0], None])
def test_a_rate_must_be_one_number(value):
  with pytest.raises(ValueError, match='schedule constant'):
    rate = optimizers.make_schedule('constant', ETA, 20, dict(value=value))
    optimizers.check_rates('constant', rate, 20)


# Arrivals, not calls of the optimizer, drive a schedule.

WORKERS, WINDOW = 3, 4
SERVERS = {
  'nesterov': lambda: reference.Sgd(0.0, 0.9, True),
  'adam': lambda: reference.Adam(0.0),
}


class Given(NamedTuple):
  """What an optimizer is given with one gradient."""

  arrival: float
  value: float  # Where the gradient was taken.
  here: float  # The loss of its batch at the server's parameters,
  there: float  # and elsewhere.
  gradient: float


def digest(gradient, size):
  """One number that tells gradients apart."""
  return gradient @ np.arange(1.0, size + 1)


def plainly(problem, server, schedule, replayed, own_count=False):
  """Trajectory, and what arrives, of a queue with the replays of a record.

  `replayed` holds for every arrival the positions that the library replayed.
  With `own_count` the optimizer counts replays as well: what must not be.
  """
  params, batches, _ = problem.of_seed(0)
  waiting, window, after, given = [], [], [], []

  def apply(params, gradient, value, batch, arrival):
    here, there = (problem.loss(p, batch) for p in (params, params + 1))
    given.append(
      Given(arrival, value, here, there, digest(gradient, len(params)))
    )
    rate = schedule(len(given) - 1 if own_count else arrival)
    server.learning_rate = float(np.float32(rate))
    return server.apply(params, reference.Packet(gradient, value, batch))

  for batch in batches:
    waiting.append((problem.gradient(params, batch), params, batch))
    if len(waiting) < WORKERS:
      continue
    arrival = len(after)
    gradient, read, batch = waiting.pop(0)
    params = apply(params, gradient, problem.loss(read, batch), batch, arrival)
    window.append(batch)
    if len(window) == WINDOW:
      for position in replayed[arrival]:
        batch = window[position]
        gradient = problem.gradient(params, batch)
        value = problem.loss(params, batch)
        params = apply(params, gradient, value, batch, arrival)
      window = []
    after.append(params)
  return np.stack(after), given


class Log(NamedTuple):
  calls: jax.Array
  given: Given
  inner_state: optax.OptState


def logged(inner, size):
  """Writes down what the optimizer is given."""

  def init(params):
    blank = Given(*(jnp.full(150, jnp.nan) for _ in Given._fields))
    return Log(jnp.zeros([], jnp.int32), blank, inner.init(params))

  def update(grads, state, params, *, arrival, value, value_fn, obj_fn, grad):
    assert arrival.dtype == jnp.int32 and arrival.shape == ()
    further = jax.tree.map(lambda p: p + 1, params)
    given = Given(
      arrival,
      value,
      value_fn(params),
      obj_fn(further),
      digest(helpers.to_flat(grad), size),
    )
    log = jax.tree.map(
      lambda log, x: log.at[state.calls].set(x), state.given, given
    )
    updates, inner_state = inner.update(
      grads, state.inner_state, params, arrival=arrival
    )
    return updates, Log(state.calls + 1, log, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def guided_run(problem, name, schedule, select):
  """Parameters and states after every arrival; `WORKERS - 1` calls fill."""
  loss_fn = problem.loss_fn
  inner = logged(optimizers.make(name, schedule), problem.start.shape[1])
  tx = gsgd_jax.asynchronous(
    gsgd_jax.guided(
      optimizers.with_value_fn(inner, loss_fn),
      loss_fn,
      window=WINDOW,
      replays=3,
      select=select,
      batch_like=problem.batch_like,
    ),
    WORKERS,
    batch_like=problem.batch_like,
  )

  def step(carry, batch):
    params, state = carry
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(
      grads, state, params, value=value, batch=batch, arrival=state.version
    )
    params = optax.apply_updates(params, updates)
    return (params, state), (helpers.to_flat(params), state.inner_state)

  @jax.jit
  def run(start, batches):
    params = helpers.to_tree(start)
    return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

  out = run(problem.start[0], jax.tree.map(lambda x: x[0], problem.batches))
  return jax.tree.map(lambda x: np.asarray(x)[WORKERS - 1 :], out)


@pytest.mark.parametrize(
  'name, select', [('nesterov', 'hardest'), ('adam', 'random')]
)
def test_replays_share_the_rate_of_their_arrival(name, select):
  problem = helpers.make_problem('logistic', 4, 3, calls=50, seed=7)
  # It rises and falls so fast that a rate out of step would show.
  schedule = optimizers.make_schedule(
    'exponential_decay', 0.2, 10, dict(decay_rate=0.3), warmup=5
  )
  with jax.enable_x64(True):
    actual, state = guided_run(problem, name, schedule, select)
    replayed = [[p for p in row if p >= 0] for row in state.replayed.tolist()]
    run = functools.partial(plainly, problem, schedule=schedule)
    expected, given = run(server=SERVERS[name](), replayed=replayed)
    other, _ = run(server=SERVERS[name](), replayed=replayed, own_count=True)
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
  assert np.abs(other - expected).max() > 1e-2

  arrivals, replays = len(actual), len(given) - len(actual)
  assert arrivals == 50 - WORKERS + 1 and replays >= 10
  # The optimizer was given every arrival, and its replays with its number.
  log = state.inner_state
  assert log.calls[-1] == arrivals + replays
  for field, seen, wanted in zip(
    Given._fields, log.given, np.transpose(given), strict=True
  ):
    np.testing.assert_allclose(
      seen[-1][: len(given)], wanted, rtol=1e-5, atol=1e-6, err_msg=field
    )
  # Not the loss of the batch that the caller passed in the same call.
  _, first = np.unique([g.arrival for g in given], return_index=True)
  batches = problem.of_seed(0)[1][WORKERS:]
  passed = [
    problem.loss(*call) for call in zip(actual[:-1], batches, strict=True)
  ]
  assert not np.isclose(log.given.here[-1][first[1:]], passed).any()


# Around an optimizer, how far a call's number travels. A gradient arrives in
# the calls that are listed.
WRAPPERS = {
  'nothing': (lambda tx: tx, range(6)),
  'chain': (lambda tx: optax.chain(optax.identity(), tx), range(6)),
  'with_value_fn': (
    lambda tx: optimizers.with_value_fn(tx, lambda params, batch: 0.0),
    range(6),
  ),
  'asynchronous': (lambda tx: gsgd_jax.asynchronous(tx, 3), range(2, 6)),
  'one worker': (lambda tx: gsgd_jax.asynchronous(tx, 1), range(6)),
  'delayed': (lambda tx: gsgd_jax.delayed(tx, 4), range(4, 6)),
  'delayed by leaf': (lambda tx: gsgd_jax.delayed(tx, {'w': 1}), range(1, 6)),
  'synchronous': (lambda tx: gsgd_jax.synchronous(tx, 3), range(6)),
  'synchronous mean': (
    lambda tx: gsgd_jax.synchronous(tx, 3, combine='mean'),
    (2, 5),
  ),
  'guided': (lambda tx: gsgd_jax.guided(tx, window=9), range(6)),
  'guided without replays': (
    lambda tx: gsgd_jax.guided(tx, replays=0),
    range(6),
  ),
  'all of them': (
    lambda tx: gsgd_jax.synchronous(
      gsgd_jax.asynchronous(
        gsgd_jax.delayed(gsgd_jax.guided(tx, window=9), 1), 2
      ),
      2,
      combine='mean',
    ),
    (5,),
  ),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_the_number_of_the_arrival_is_handed_on(wrapper):
  wrap, arrive = WRAPPERS[wrapper]
  tx = wrap(optimizers.make('sgd', lambda arrival: arrival + 1.0))
  tx = optax.with_extra_args_support(tx)
  params = {'w': jnp.zeros(2)}
  ones = {'w': jnp.ones(2)}

  def step(state, call):
    extra = dict(arrival=call, value=1.0, batch=jnp.zeros(3))
    updates, state = tx.update(ones, state, params, **extra)
    return state, updates['w'][0]

  run = jax.jit(lambda: jax.lax.scan(step, tx.init(params), jnp.arange(6))[1])
  expected = [-(call + 1.0) if call in arrive else 0.0 for call in range(6)]
  np.testing.assert_array_equal(run(), expected)


def test_value_fn_drops_what_line_searches_refuse():
  seen = {}

  def update(updates, state, params=None, **extra_args):
    del params
    seen.update(extra_args)
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
  tx = optimizers.with_value_fn(inner, lambda params, batch: params + batch)
  extra = dict(staleness=3, worker=1, verification=0, stale_params=0)
  tx.update(1.0, (), 2.0, value=5.0, batch=30.0, arrival=7, **extra)
  assert sorted(seen) == ['arrival', 'grad', 'obj_fn', 'value', 'value_fn']
  assert (seen['value'], seen['grad'], seen['arrival']) == (5.0, 1.0, 7)
  assert seen['value_fn'](4.0) == seen['obj_fn'](4.0) == 34.0
  tx.update(1.0, (), 2.0, value=5.0, batch=30.0)
  assert seen['arrival'] is None


# Mistakes.

SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


def scheduled_update(wrap, **extra_args):
  tx = wrap(optimizers.make('adam', SCHEDULE))
  return tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), **extra_args)


def made(name, kwargs):
  """Made and tried out."""
  tx = optimizers.make(name, 0.1, kwargs)
  dry_run(optimizers.with_value_fn(tx, LOSS_FN), name)


def tried(update):
  """A dry run of an optimizer of one's own."""
  update_fn = lambda updates, state, params=None, **extra: update(updates)
  dry_run(optax.GradientTransformationExtraArgs(lambda _: (), update_fn), 'own')


def raising(error):
  def update(updates):
    raise error

  return update


ALL = ', '.join(optimizers.names())
ALL_SCHEDULES = ', '.join(optimizers.schedule_names())
MISTAKES = {
  'unknown optimizer': (
    lambda: optimizers.make('adamm', 0.1),
    f"optimizer must be one of {ALL}, got 'adamm'; did you mean adam?",
  ),
  'unknown optimizer, nothing near': (
    lambda: optimizers.make('xyz', 0.1),
    f"optimizer must be one of {ALL}, got 'xyz'",
  ),
  'no optimizer': (
    lambda: optimizers.make('chain', 0.1),
    f"optimizer must be one of {ALL}, got 'chain'",
  ),
  'no name': (
    lambda: optimizers.make(None, 0.1),
    f'optimizer must be one of {ALL}, got None',
  ),
  'unknown argument': (
    lambda: optimizers.make('sgd', 0.1, dict(momentun=0.9)),
    'optimizer sgd has no argument momentun; it has momentum, nesterov, '
    'accumulator_dtype; did you mean momentum?',
  ),
  'unknown argument, nothing near': (
    lambda: optimizers.make('rprop', 0.1, dict(xyz=0.9)),
    'optimizer rprop has no argument xyz; it has eta_minus, eta_plus, '
    'min_step_size, max_step_size',
  ),
  'unknown argument of an alias': (
    lambda: optimizers.make('nesterov', 0.1, dict(b1=0.9)),
    'optimizer nesterov has no argument b1; it has momentum, nesterov, '
    'accumulator_dtype',
  ),
  'the rate among the arguments': (
    lambda: optimizers.make('adam', 0.1, dict(learning_rate=0.2)),
    'optimizer adam: its rate is the setting learning_rate',
  ),
  'the greatest rate among the arguments': (
    lambda: optimizers.make('polyak_sgd', 0.1, dict(max_learning_rate=0.2)),
    'optimizer polyak_sgd: its rate is the setting learning_rate',
  ),
  'no rate': (
    lambda: optimizers.make('sgd', None),
    'optimizer sgd needs the argument learning_rate',
  ),
  'missing argument': (
    lambda: optimizers.make('dpsgd', 0.1),
    'optimizer dpsgd needs the argument l2_norm_clip',
  ),
  'second missing argument': (
    lambda: optimizers.make('dpsgd', SCHEDULE, dict(l2_norm_clip=1.0)),
    'optimizer dpsgd needs the argument noise_multiplier',
  ),
  'missing optimizer inside': (
    lambda: optimizers.make('schedule_free', 0.1),
    'optimizer schedule_free needs the argument base_optimizer',
  ),
  'value refused at once': (
    lambda: optimizers.make('lbfgs', 0.1, dict(memory_size=0)),
    'optimizer lbfgs refuses its arguments: memory_size must be >= 1',
  ),
  'type refused at once': (
    lambda: optimizers.make('adam', 0.1, dict(mu_dtype='abc')),
    "optimizer adam refuses its arguments: data type 'abc' not understood",
  ),
  'refused at once, with a schedule': (
    lambda: optimizers.make('galore', SCHEDULE, dict(rank=0)),
    'optimizer galore refuses its arguments: `rank` must be positive, got 0',
  ),
  'value refused in a step': (
    lambda: made('adam', dict(b1='abc')),
    'optimizer adam cannot be used here: unsupported operand type(s) for -: '
    "'int' and 'str'",
  ),
  'value of a wrong shape': (
    lambda: made('muon', dict(ns_coeffs=(1, 2))),
    'optimizer muon cannot be used here: ns_coeffs must have shape (3,) or '
    '(n, 3), got (2,)',
  ),
  'unknown schedule': (
    lambda: optimizers.make_schedule('cosine_deca', 0.1, 10),
    f"schedule must be one of {ALL_SCHEDULES}, got 'cosine_deca'; did you mean "
    'cosine_decay_schedule?',
  ),
  'unknown schedule, nothing near': (
    lambda: optimizers.make_schedule('xyz', 0.1, 10),
    f"schedule must be one of {ALL_SCHEDULES}, got 'xyz'",
  ),
  'no name of a schedule': (
    lambda: optimizers.make_schedule('', 0.1, 10),
    f"schedule must be one of {ALL_SCHEDULES}, got ''",
  ),
  'unknown schedule argument': (
    lambda: optimizers.make_schedule('cosine_decay', 0.1, 10, dict(alpah=1)),
    'schedule cosine_decay_schedule has no argument alpah; it has init_value, '
    'decay_steps, alpha, exponent; did you mean alpha?',
  ),
  'unknown argument of a constant': (
    lambda: optimizers.make_schedule('constant', 0.1, 10, dict(xyz=1)),
    'schedule constant_schedule has no argument xyz; it has value',
  ),
  'missing schedule argument': (
    lambda: optimizers.make_schedule('exponential_decay', 0.1, 10),
    'schedule exponential_decay needs the argument decay_rate',
  ),
  'missing kind of interpolation': (
    lambda: optimizers.make_schedule('piecewise_interpolate', 0.1, 10),
    'schedule piecewise_interpolate_schedule needs the argument '
    'interpolate_type',
  ),
  'schedule refuses a value': (
    lambda: optimizers.make_schedule(
      'cosine_decay', 1, 10, dict(decay_steps=0)
    ),
    'schedule cosine_decay_schedule refuses its arguments: The '
    'cosine_decay_schedule requires positive decay_steps, got decay_steps=0.',
  ),
  'schedule refuses a type': (
    lambda: optimizers.make_schedule(
      'piecewise_constant', 0.1, 10, dict(boundaries_and_scales=3)
    ),
    'schedule piecewise_constant_schedule refuses its arguments: '
    "'int' object has no attribute 'values'",
  ),
  'no arrivals after the warm-up': (
    lambda: optimizers.make_schedule('cosine_decay', 0.1, 10, warmup=10),
    'schedule cosine_decay_schedule refuses its arguments: The '
    'cosine_decay_schedule requires positive decay_steps, got decay_steps=0.',
  ),
  'no arrival': (
    lambda: scheduled_update(lambda tx: tx),
    'optimizer adam with a schedule needs arrival=...',
  ),
  'no arrival, through a wrapper': (
    lambda: scheduled_update(lambda tx: gsgd_jax.guided(tx), value=0.0),
    'optimizer adam with a schedule needs arrival=...',
  ),
  'no arrival, with a loss': (
    lambda: scheduled_update(
      lambda tx: optimizers.with_value_fn(tx, LOSS_FN), value=0.0, batch=None
    ),
    'optimizer adam with a schedule needs arrival=...',
  ),
  'no arrival in a dry run': (
    lambda: dry_run(optimizers.make('adam', SCHEDULE), 'adam', arrival=None),
    'optimizer adam cannot be used here: optimizer adam with a schedule needs '
    'arrival=...',
  ),
  'other shapes': (
    lambda: tried(lambda u: (jax.tree.map(lambda x: x[None], u), ())),
    'optimizer own cannot be used here: it changes the shapes of updates',
  ),
  'one other shape': (
    lambda: tried(lambda u: (jax.tree.map(lambda x: x[:3], u), ())),
    'optimizer own cannot be used here: it changes the shapes of updates',
  ),
  'fails in several lines': (
    lambda: tried(raising(RuntimeError('\nnot here\nnor there'))),
    'optimizer own cannot be used here: not here',
  ),
  'fails without a word': (
    lambda: tried(raising(NotImplementedError())),
    'optimizer own cannot be used here: NotImplementedError',
  ),
  'fails at the start': (
    lambda: dry_run(
      optax.GradientTransformation(raising(TypeError('no state')), None), 'own'
    ),
    'optimizer own cannot be used here: no state',
  ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistake(mistake):
  attempt, message = MISTAKES[mistake]
  with pytest.raises(ValueError) as error:
    attempt()
  assert str(error.value) == message


@pytest.mark.parametrize('pieces', [(1, 2), ((1, 2, 3),)])
def test_pieces_that_are_no_pairs(pieces):
  given = dict(boundaries_and_scales=pieces)
  with pytest.raises(ValueError, match='boundaries_and_scales must hold pairs'):
    optimizers.make_schedule('piecewise_constant', 0.1, 10, given)
