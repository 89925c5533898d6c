"""Every mistake is answered at once: what was given, what is allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax

SGD = optax.sgd(0.1)
PARAMS = {'first': np.ones([3]), 'rest': np.ones([])}
BATCH = {'inputs': np.ones([2, 3]), 'labels': np.zeros([2], np.int32)}


def loss_fn(params, batch):
  drift = batch['inputs'] - params['first'][None]
  return jnp.mean(drift**2) + params['rest'] ** 2


def make(wrapper, **options):
  """A transformation around SGD, with what it cannot do without."""
  required = {
    'asynchronous': dict(workers=2),
    'delayed': dict(delay=1),
    'synchronous': dict(workers=2),
    'guided': {},
  }
  options = required[wrapper] | options
  return getattr(gsgd_jax, wrapper)(options.pop('inner', SGD), **options)


def update(tx, params=PARAMS, **extra_args):
  return tx.update(PARAMS, tx.init(PARAMS), params, **extra_args)


# Arguments of the transformations.

NUMBERS = [
  ('asynchronous', 'workers', 1),
  ('synchronous', 'workers', 1),
  ('guided', 'window', 1),
  ('guided', 'replays', 0),
  ('guided', 'revisit', 0),
  ('delayed', 'delay', 0),
]


@pytest.mark.parametrize('wrapper, name, least', NUMBERS)
def test_number_too_small(wrapper, name, least):
  for given in (least - 1, np.int64(least - 1)):
    with pytest.raises(
      ValueError, match=f'^{name} must be at least {least}, got {least - 1}$'
    ):
      make(wrapper, **{name: given})


@pytest.mark.parametrize('given', [1.5, True, '3', 2.0, np.array([3])])
@pytest.mark.parametrize('wrapper, name, least', NUMBERS)
def test_number_is_no_int(wrapper, name, least, given):
  del least
  with pytest.raises(ValueError) as error:
    make(wrapper, **{name: given})
  assert str(error.value) == f'{name} must be an int, got {given!r}'


@pytest.mark.parametrize('wrapper, name, least', NUMBERS)
def test_the_least_number_is_allowed(wrapper, name, least):
  more = dict(loss_fn=loss_fn, batch_like=BATCH) if name == 'revisit' else {}
  update(make(wrapper, **{name: least}, **more), value=1.0, batch=BATCH)


ARGUMENTS = {
  'replays': (
    lambda: make('guided', window=2, replays=3),
    'replays must be at most window, got replays=3 and window=2',
  ),
  'replays beyond the default window': (
    lambda: make('guided', replays=11),
    'replays must be at most window, got replays=11 and window=10',
  ),
  'select': (
    lambda: make('guided', select='best'),
    "select must be one of 'consistent', 'random', 'hardest', 'inconsistent', "
    "'surprise', or a function, got 'best'",
  ),
  'combine': (
    lambda: make('synchronous', combine='sum'),
    "combine must be one of 'sequential', 'mean', got 'sum'",
  ),
  'combine of one worker': (
    lambda: make('synchronous', workers=1, combine='sum'),
    "combine must be one of 'sequential', 'mean', got 'sum'",
  ),
  'loss_fn without batch_like': (
    lambda: make('guided', loss_fn=loss_fn),
    'needs batch_like, got None; pass a batch, or its jax.ShapeDtypeStruct',
  ),
  'revisit without loss_fn': (
    lambda: make('guided', revisit=2),
    'revisit=2 .* needs a loss_fn, got none; pass loss_fn, or revisit=0',
  ),
  'revisit of all without loss_fn': (
    lambda: make('guided', revisit=None),
    'revisit=None .* needs a loss_fn, got none; pass loss_fn, or revisit=0',
  ),
  'negative delay of a leaf': (
    lambda: make('delayed', delay={'first': 1, 'rest': -1}),
    'delay must be at least 0, got -1',
  ),
  'fractional delay of a leaf': (
    lambda: make('delayed', delay={'first': 1.5, 'rest': 1}),
    'delay must be an int, got 1.5',
  ),
  'no delay': (
    lambda: make('delayed', delay=None),
    'delay must be an int or a tree of ints, got None',
  ),
  'empty tree of delays': (
    lambda: make('delayed', delay={'first': None, 'rest': ()}),
    r"delay must be an int or a tree of ints, got \{'first': None",
  ),
  'batch_like with a tree of delays': (
    lambda: make('delayed', delay={'first': 1, 'rest': 0}, batch_like=BATCH),
    'no single batch .* got batch_like; leave it out, or give delay as one int',
  ),
}


@pytest.mark.parametrize('given', [gsgd_jax.round_robin, 'trace.csv', None])
@pytest.mark.parametrize(
  'make',
  [
    lambda given: gsgd_jax.asynchronous(SGD, 2, arrivals=given),
    lambda given: gsgd_jax.synchronous(SGD, 2, arrivals=given),
    lambda given: gsgd_jax.data_parallel(SGD, 2, 8, arrivals=given),
  ],
)
def test_no_arrival_process(make, given):
  with pytest.raises(ValueError, match=r'^arrivals must be an ArrivalProcess'):
    make(given)


@pytest.mark.parametrize('call, message', ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  'delay',
  [
    {'first': 1},
    {'first': 1, 'last': 2},
    {'first': 1, 'rest': {'inner': 2}},
    {'first': 1, 'rest': None},
    [1, 2],
  ],
)
def test_tree_of_delays_that_does_not_fit(delay):
  tx = make('delayed', delay=delay)
  with pytest.raises(ValueError) as error:
    tx.init(PARAMS)
  assert str(error.value) == (
    'delay must have the structure of the parameters or a prefix of it, got '
    f'{jax.tree.structure(delay)} for {jax.tree.structure(PARAMS)}'
  )


# What update is given.

VALUES = {
  'shape': (np.ones([3]), r'shape \(3,\) and dtype float64; pass value='),
  'shape of one': (np.ones([1]), r'shape \(1,\) and dtype float64'),
  'complex array': (np.array(1j), r'shape \(\) and dtype complex'),
  'complex': (1j, r'shape \(\) and dtype complex'),
  'bool': (True, r'shape \(\) and dtype bool'),
  'string': ('0.5', "'0.5'; pass value=loss to update"),
  'array of strings': (np.array('x'), "array.'x'"),
  'list': ([0.5, 0.6], r'shape \(2,\) and dtype float64; pass value=loss'),
  'function': (loss_fn, '<function loss_fn'),
}
# All that read `value`; trees of delays do not.
READ_VALUE = {
  'guided': lambda **k: make('guided', **k),
  'asynchronous': lambda **k: make('asynchronous', **k),
  'one worker': lambda **k: make('asynchronous', workers=1, **k),
  'delayed': lambda **k: make('delayed', **k),
  'no delay': lambda **k: make('delayed', delay=0, **k),
  'sequential': lambda **k: make('synchronous', **k),
  'mean': lambda **k: make('synchronous', combine='mean', **k),
}
WHO = {
  'one worker': 'asynchronous',
  'no delay': 'delayed',
  'sequential': 'synchronous',
  'mean': 'synchronous',
}


@pytest.mark.parametrize('value, message', VALUES.values(), ids=VALUES)
@pytest.mark.parametrize('wrapper', READ_VALUE)
def test_value(wrapper, value, message):
  who = WHO.get(wrapper, wrapper)
  needs = rf'^{who} needs `value` to be a real scalar .*, got {message}'
  with pytest.raises(ValueError, match=needs):
    update(READ_VALUE[wrapper](), value=value)


@pytest.mark.parametrize(
  'value',
  [1, 0.5, np.float32(0.5), np.ones([]), jnp.ones([], jnp.bfloat16)],
)
@pytest.mark.parametrize('wrapper', READ_VALUE)
def test_real_scalars_are_values(wrapper, value):
  update(READ_VALUE[wrapper](), value=value)


BATCHES = {
  'missing': (
    None,
    'needs the extra argument `batch`, .* pass batch=.* batch_like=',
  ),
  'structure': (
    {'inputs': BATCH['inputs']},
    r"structure PyTreeDef\(\{'inputs': \*, 'labels': \*\}\), but a `batch` "
    r"with structure PyTreeDef\(\{'inputs': \*\}\); pass batches like",
  ),
  'shape': (
    BATCH | {'inputs': np.ones([4, 3])},
    r"batch_like\['inputs'\] of shape \(2, 3\) and dtype float64, but a "
    r'`batch` whose leaf has shape \(4, 3\) and dtype float64; pass batches',
  ),
  'strings': (
    BATCH | {'labels': 'ab'},
    'a batch must be a pytree of arrays, got',
  ),
  'dtype': (
    BATCH | {'labels': np.zeros([2], np.int64)},
    r"batch_like\['labels'\] of shape \(2,\) and dtype int32, but a "
    r'`batch` whose leaf has shape \(2,\) and dtype int64; pass batches like',
  ),
}


def with_batch_like(wrapper, abstract):
  like = BATCH
  if abstract:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
  return READ_VALUE[wrapper](batch_like=like)


@pytest.mark.parametrize('wrapper', READ_VALUE)
@pytest.mark.parametrize('abstract', [False, True])
def test_batches_like_batch_like(wrapper, abstract):
  update(with_batch_like(wrapper, abstract), value=1.0, batch=BATCH)


@pytest.mark.parametrize('batch, message', BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize('wrapper', READ_VALUE)
@pytest.mark.parametrize('abstract', [False, True])
def test_batch(wrapper, batch, message, abstract):
  tx = with_batch_like(wrapper, abstract)
  extra = {} if batch is None else {'batch': batch}
  with pytest.raises(ValueError, match=message) as error:
    update(tx, value=1.0, **extra)
  assert str(error.value).startswith((WHO.get(wrapper, wrapper), 'a batch'))


def test_guided_needs_values():
  for tx in (make('guided'), make('asynchronous', inner=make('guided'))):
    with pytest.raises(
      ValueError,
      match=r'^guided needs the extra argument `value`, .* pass value=loss',
    ):
      update(tx)


KEEP = dict(keep_params=True)
NEED_PARAMS = {
  'guided': lambda: make('guided', loss_fn=loss_fn, batch_like=BATCH),
  'asynchronous': lambda: make('asynchronous', **KEEP),
  'one worker': lambda: make('asynchronous', workers=1, **KEEP),
  'delayed': lambda: make('delayed', **KEEP),
  'no delay': lambda: make('delayed', delay=0, **KEEP),
  'delayed leaves': lambda: make(
    'delayed', delay={'first': 1, 'rest': 0}, **KEEP
  ),
  'sequential': lambda: make('synchronous'),
}


@pytest.mark.parametrize('wrapper', NEED_PARAMS)
def test_params_are_missing(wrapper):
  who = {'delayed leaves': 'delayed', **WHO}.get(wrapper, wrapper)
  with pytest.raises(
    ValueError,
    match=f'^{who} needs the parameters, .* call update.grads, state, params',
  ):
    update(NEED_PARAMS[wrapper](), None, value=1.0, batch=BATCH)


NEED_NO_PARAMS = READ_VALUE | {
  'delayed leaves': lambda: make('delayed', delay={'first': 1, 'rest': 0}),
  'one in turn': lambda: make('synchronous', workers=1),
}
del NEED_NO_PARAMS['sequential']


@pytest.mark.parametrize('wrapper', NEED_NO_PARAMS)
def test_params_may_be_missing(wrapper):
  update(NEED_NO_PARAMS[wrapper](), None, value=1.0)


AROUND = {
  'asynchronous': functools.partial(make, 'asynchronous'),
  'delayed': functools.partial(make, 'delayed'),
  'mean': functools.partial(make, 'synchronous', combine='mean'),
}


@pytest.mark.parametrize('around', AROUND)
def test_batches_do_not_arrive_without_batch_like(around):
  guided = make('guided', loss_fn=loss_fn, batch_like=BATCH)
  with pytest.raises(
    ValueError,
    match=r'^guided needs .*`batch`.* batch_like=.* around this one that delay',
  ):
    update(AROUND[around](inner=guided), value=1.0, batch=BATCH)


# Injected hyperparameters.

INJECTED = [
  ('asynchronous', 'workers', ()),
  ('synchronous', 'workers', ()),
  ('delayed', 'delay', ()),
  ('guided', 'window', ('replays', 'revisit')),
  ('guided', 'replays', ('window', 'revisit')),
  ('guided', 'revisit', ('window', 'replays')),
]


def injected_update(wrapper, name, static_args):
  options = {name: 3} if name != 'revisit' else dict(revisit=0)
  tx = optax.inject_hyperparams(
    getattr(gsgd_jax, wrapper), static_args=static_args
  )(SGD, **options)

  @jax.jit
  def both(params):
    return tx.update(params, tx.init(params), params, value=1.0)

  with jax.numpy_dtype_promotion('standard'):  # optax's own.
    return both(PARAMS)


@pytest.mark.parametrize('wrapper, name, others', INJECTED)
def test_injected_shape(wrapper, name, others):
  with pytest.raises(
    ValueError,
    match=f'^{name} decides the shapes .* a Python int, got a traced array; '
    'with optax.inject_hyperparams name it in static_args',
  ):
    injected_update(wrapper, name, others)


@pytest.mark.parametrize('wrapper, name, others', INJECTED)
def test_injected_with_static_args(wrapper, name, others):
  _, state = injected_update(wrapper, name, (name, *others))
  assert name not in state.hyperparams


def test_injected_loss_fn_with_static_args():
  """Otherwise optax would take it for a schedule."""
  static_args = ('loss_fn', 'window', 'replays', 'revisit')
  tx = optax.inject_hyperparams(gsgd_jax.guided, static_args=static_args)(
    SGD, loss_fn, batch_like=BATCH
  )
  with jax.numpy_dtype_promotion('standard'):  # optax's own.
    updates, state = update(tx, value=1.0, batch=BATCH)
  assert list(state.hyperparams) == ['seed']
  np.testing.assert_allclose(updates['first'], -0.1)


# Extra arguments that nobody here knows.


def spy(seen):
  """SGD that records every call's extra arguments."""

  def spying(updates, state, params=None, **extra_args):
    seen.append(extra_args)
    return SGD.update(updates, state, params)

  return optax.GradientTransformationExtraArgs(SGD.init, spying)


def everything(inner):
  """All of them, around one another."""
  inner = GUIDED['guided with loss_fn'](inner)
  inner = make('delayed', inner=inner, batch_like=BATCH)
  inner = make('synchronous', inner=inner, batch_like=BATCH)
  return make('asynchronous', inner=inner, batch_like=BATCH)


SHORT = dict(window=2, replays=1)
GUIDED = {
  'guided': lambda tx: make('guided', inner=tx, **SHORT),
  'guided with loss_fn': lambda tx: make(
    'guided', inner=tx, loss_fn=loss_fn, batch_like=BATCH, **SHORT
  ),
}
FORWARD = GUIDED | {
  'no replays': lambda tx: make('guided', inner=tx, replays=0),
  'asynchronous': lambda tx: make('asynchronous', inner=tx),
  'one worker': lambda tx: make('asynchronous', inner=tx, workers=1),
  'delayed': lambda tx: make('delayed', inner=tx),
  'no delay': lambda tx: make('delayed', inner=tx, delay=0),
  'delayed leaves': lambda tx: make(
    'delayed', inner=tx, delay={'first': 2, 'rest': 1}
  ),
  'sequential': lambda tx: make('synchronous', inner=tx),
  'mean': lambda tx: make('synchronous', inner=tx, combine='mean'),
  'guided inside asynchronous': lambda tx: make(
    'asynchronous', inner=make('guided', inner=tx, **SHORT)
  ),
  'everything': everything,
}
FOREIGN = dict(
  value_fn=loss_fn,
  note='a string',
  nothing=None,
  counts={'seen': np.arange(3)},
)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('wrapper', FORWARD)
def test_foreign_extra_arguments_are_forwarded(wrapper, compiled):
  seen = []
  tx = FORWARD[wrapper](spy(seen))
  step = lambda grads, state: tx.update(
    grads, state, grads, value=1.0, batch=BATCH, **FOREIGN
  )
  state = tx.init(PARAMS)
  for _ in range(2):
    _, state = (jax.jit(step) if compiled else step)(PARAMS, state)
  assert seen
  for extra_args in seen:
    assert {name: extra_args[name] for name in FOREIGN} == FOREIGN


@pytest.mark.parametrize('wrapper', FORWARD)
def test_foreign_extra_arguments_are_ignored(wrapper):
  """Also where the innermost transformation takes none."""
  tx = FORWARD[wrapper](optax.GradientTransformation(*SGD))
  extra = dict(value=1.0, batch=BATCH)

  def total(**foreign):
    step = jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, **extra, **foreign))
    state, updates = tx.init(PARAMS), []
    for _ in range(6):
      update, state = step(state)
      updates.append(update['first'])
    return sum(updates)

  assert np.all(total() < 0)
  np.testing.assert_array_equal(total(), total(**FOREIGN))


OTHERS = {
  'replay_with': lambda tx: make('guided', replay_with=tx, **SHORT),
  'worker_transform': lambda tx: make('asynchronous', worker_transform=tx),
  'worker_transform of one': lambda tx: make(
    'asynchronous', workers=1, worker_transform=tx
  ),
}


@pytest.mark.parametrize('where', OTHERS)
def test_foreign_extra_arguments_reach_other_transformations(where):
  seen = []
  update(OTHERS[where](spy(seen)), value=1.0, **FOREIGN)
  assert len(seen) == 1
  assert {name: seen[0][name] for name in FOREIGN} == FOREIGN
