"""Training as papers do it: decay, clipping, pieces, epochs, depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import flatten_util

from gsgd_jax import (
  accumulation,
  batches,
  data,
  events,
  experiment,
  models,
  optimizers,
  parallel,
  report,
  tasks,
  transformation,
)
from tests import helpers, reference
from tests.test_experiment import short

N, DECAY, NORM = 3, 0.2, 0.25


class Clipped(reference.Correction):
  """Gradients of at most so large a norm."""

  def correct(self, params, packet):
    size = np.linalg.norm(packet.gradient)
    return packet.gradient * min(1, NORM / size)


class Decayed(reference.Correction):
  """L2: the parameters are added to a gradient."""

  def correct(self, params, packet):
    return packet.gradient + DECAY * params


def arriving(correct, rate=0.05, momentum=0.8):
  return Clipped(correct(Decayed(reference.Sgd(rate, momentum))))


# Names, and what their servers are, plainly.
SERVERS = {
  None: lambda: arriving(lambda tx: tx),
  'delay_compensation': lambda: arriving(
    lambda tx: reference.DelayCompensation(tx, 0.04)
  ),
  'scale_by_staleness': lambda: arriving(
    lambda tx: reference.ScaleByStaleness(tx, 'inverse')
  ),
  'predict': lambda: reference.Predict(arriving(lambda tx: tx), N - 1),
  'drop_stale': lambda: reference.DropStale(arriving(lambda tx: tx), 1),
  'dana': lambda: Clipped(Decayed(reference.Dana(0.05, N, 0.9))),
  'smega2': lambda: Clipped(Decayed(reference.Smega2(0.05, N, 0.9))),
  'dana_dc': lambda: Clipped(
    reference.DelayCompensation(Decayed(reference.Dana(0.05, N, 0.9)), 2.0)
  ),
  'dana_slim': lambda: reference.Sgd(0.05),
}

UNGUIDED = ('scale_by_staleness', 'predict', 'smega2')


def treated(name, guidance, **changes):
  """A config with decay and clipping, and its method."""
  config = short(
    workers=N,
    window=4,
    revisit=0,
    weight_decay=DECAY,
    clip_norm=NORM,
    methods=('+'.join(filter(None, ('asynchronous', name, guidance))),),
    **changes,
  )
  if name not in ('dana', 'smega2', 'dana_slim', 'dana_dc'):
    config.optimizer_kwargs.momentum = 0.8
  if name == 'drop_stale':
    config.compensation_kwargs.max_staleness = 1
  return config, events.methods(config)[0]


def expected_of(name, guidance, problem):
  start, batches, _ = problem.of_seed(0)
  server, gradient, slim = SERVERS[name](), problem.gradient, None
  if name == 'dana_slim':  # A worker does it, where it has read.
    slim = 0.9

    def gradient(params, batch):
      packet = reference.Packet(problem.gradient(params, batch), 0.0, batch)
      clipped = Clipped(None).correct(params, packet)
      return clipped + DECAY * params

  if guidance is not None:
    replays = None
    if name in ('dana', 'dana_slim', 'dana_dc'):
      replays = Clipped(Decayed(reference.Sgd(0.05 / (1 - 0.9))))
    guided = lambda inner: reference.Guided(
      inner, problem.loss, problem.gradient, window=4, replay_with=replays
    )
    if name == 'drop_stale':
      server.inner = guided(server.inner)
    else:
      server = guided(server)
  run = reference.asynchronous(
    start,
    server,
    problem.loss,
    gradient,
    N,
    batches,
    worker_momentum=slim,
    worker_nesterov=slim is not None,
  )
  return run.trajectory


@pytest.mark.parametrize('name', SERVERS)
def test_decay_and_clipping(name):
  """Clip, correct, decay, then momentum: of arrivals and of replays."""
  guidance = None if name in UNGUIDED else 'consistent'
  problem = helpers.make_problem('logistic', 4, 3, 24, seed=1)
  config, method = treated(name, guidance)
  tx = transformation.make_transformation(
    config, method, problem.loss_fn, problem.batch_like
  )
  ((flat, _),) = helpers.run(tx, problem, 'scan')
  expected = expected_of(name, guidance, problem)
  helpers.assert_trajectory(flat[N - 1 :], expected)


def test_a_line_search_sees_the_decayed_loss():
  """Its slope along a direction is that of the gradient it is given."""
  seen = {}

  def update(updates, state, params=None, *, value, value_fn, grad, arrival):
    del params, arrival
    seen.update(value=value, slope=jax.grad(value_fn)(point), grad=grad)
    return updates, state

  point = jnp.array([1.0, -3.0])
  loss_fn = lambda params, batch: jnp.sum(params * batch)
  tx = optax.GradientTransformationExtraArgs(
    lambda params: (),
    lambda *args, obj_fn, **extra: update(*args, **extra),
  )
  tx = optax.chain(
    optax.add_decayed_weights(DECAY),
    optimizers.with_value_fn(tx, loss_fn, DECAY),
  )
  batch = jnp.array([0.5, 2.0])
  value, grads = jax.value_and_grad(loss_fn)(point, batch)
  tx.update(grads, tx.init(point), point, value=value, batch=batch)
  np.testing.assert_allclose(seen['slope'], seen['grad'], rtol=1e-12)
  np.testing.assert_allclose(seen['value'], -5.5 + DECAY / 2 * 10, rtol=1e-12)


# In pieces.


def mlp_task(examples, width=4):
  model = models.mlp(3, [width, width], 3)
  rng = np.random.default_rng(0)
  batch = (
    rng.normal(size=(examples, 3)),
    rng.integers(3, size=examples).astype(np.int32),
  )
  params = jax.tree.map(
    lambda x: x.astype(jnp.float64), model.init(jax.random.key(0))
  )
  return models.cross_entropy(model), params, batch


@pytest.mark.parametrize('pieces, taken', [(4, 4), (5, 4)])
def test_pieces_change_nothing(pieces, taken):
  loss_fn, params, batch = mlp_task(12)
  sizes = []

  def seen(params, batch):
    sizes.append(len(batch[1]))
    return loss_fn(params, batch)

  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    cut = accumulation.in_pieces(seen, pieces)
    tangent = jax.tree.map(jnp.ones_like, params)
    for derivative in (
      jax.value_and_grad,
      # What exact corrections take.
      lambda fn: (
        lambda w, b: jax.jvp(lambda w: jax.grad(fn)(w, b), (w,), (tangent,))
      ),
    ):
      expected = jax.jit(derivative(loss_fn))(params, batch)
      actual = jax.jit(derivative(cut))(params, batch)
      helpers.assert_close(actual, expected)
  assert set(sizes) == {12 // taken}
  assert accumulation.in_pieces(seen, 1) is seen


@pytest.mark.usefixtures('as_users_compile_it')
def test_pieces_take_less_memory():
  loss_fn, params, batch = mlp_task(1024, width=64)

  def bytes_of(fn):
    compiled = jax.jit(jax.grad(fn)).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    whole, cut = bytes_of(loss_fn), bytes_of(accumulation.in_pieces(loss_fn, 8))
  assert cut < whole / 3


def test_pieces_of_what_cannot_be_cut():
  cut = accumulation.in_pieces(lambda params, batch: params, 2)
  for batch in ((jnp.ones(4), jnp.ones(2)), jnp.ones([])):
    with pytest.raises(ValueError, match='must have the same leading axis'):
      cut(1.0, batch)


# Epochs: of breast cancer 341 examples train, 42 batches of 8.


@pytest.mark.usefixtures('as_users_run_it')
def test_a_run_in_epochs():
  config = short(methods=('sequential',), epochs=0.5, evaluate_epochs=0.2)
  (history,) = experiment.run(config).values()
  assert history.step.tolist() == [0, 8, 16, 21]  # Of 8.4 and 21.
  assert config.updates == 25  # Its own is left alone.
  resolved = experiment.resolved(config)
  assert experiment.resolved(resolved) == resolved
  assert (resolved.updates, resolved.evaluate_every) == (21, 8)


def test_nothing_in_epochs_needs_no_data():
  config = short(dataset='nowhere.csv', warmup=3)
  assert experiment.resolved(config) is config


@pytest.mark.usefixtures('as_users_run_it')
@pytest.mark.parametrize('schedule', ['constant', 'cosine_decay'])
def test_the_protocol_of_dana(schedule):
  """From a share over the first epochs; ten times less at some."""
  config = short(
    epochs=16,
    warmup_epochs=5,
    warmup_start=1 / 8,
    drop_epochs=(8, 12.5),
    drop_factor=0.2,
    learning_rate=0.4,
    schedule=schedule,
  )
  config = experiment.resolved(config)
  assert (config.updates, config.warmup, config.drops) == (672, 210, (336, 525))
  method = events.method_named('asynchronous')
  rates = jax.vmap(transformation.learning_rate(config, method))(
    jnp.arange(config.updates)
  )
  rate, expected = 0.4, []
  for epoch in range(16):
    for batch in range(42):
      t = 42 * epoch + batch
      share = 1.0
      if schedule == 'cosine_decay' and epoch >= 5:
        share = (1 + np.cos(np.pi * (t - 210) / (672 - 210))) / 2
      if epoch < 5:
        share = 1 / 8 + 7 / 8 * t / 209
      if t in (8 * 42, 12 * 42 + 21):
        rate *= 0.2
      expected.append(share * rate)
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures('as_users_run_it')
@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(epochs=1, warmup_epochs=1), 'warmup must be less than updates=42, '),
    (
      dict(epochs=2, drop_epochs=(2.5,)),
      'at most the 2 epochs of the run, got 2.5',
    ),
    (dict(epochs=1e9), 'updates must be below'),
    (
      dict(epochs=3, warmup=5, warmup_epochs=1),
      'warmup=5 and warmup_epochs, which is 42, are two lengths for one thing',
    ),
    (
      dict(epochs=3, drops=(5,), drop_epochs=(1,)),
      r'drops=\(5,\) and drop_epochs, which is \(42,\), are two lengths',
    ),
    (dict(drops=(5,), learning_rate=None), 'drops need a learning_rate'),
    (dict(epochs=2, batch_size=500), 'batch_size must be at most the 341'),
    (dict(accumulate=3), 'accumulate=3 pieces must divide batch_size=8'),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(ValueError, match=message):
    experiment.check(short(**changes))


def test_drops_at_the_end_are_within():
  experiment.resolved(short(epochs=2, drop_epochs=(2,)))


@pytest.mark.usefixtures('as_users_run_it')
def test_an_application_trains_in_pieces(monkeypatch):
  cross_entropy, sizes = models.cross_entropy, set()

  def seen(model, prepare):
    def loss_fn(params, batch):
      sizes.add(len(batch.labels))
      return cross_entropy(model, prepare)(params, batch)

    return loss_fn

  monkeypatch.setattr(models, 'cross_entropy', seen)
  config = short(methods=('sequential',), updates=2, accumulate=4)
  experiment.run(config)
  assert 2 in sizes and 8 not in sizes


# Every layer its own delay.


def by_depth(name='delayed', **changes):
  changes = dict(delay='by_depth', methods=(name,), seeds=1) | changes
  return short(model='mlp', hidden=(4, 4), **changes)


def plain_pipeline(config, server, elements):
  """The same run by the oracle, element by element."""
  dataset = data.load(config.dataset, 0)
  model = tasks.make_model(config, dataset)
  params, unflatten = flatten_util.ravel_pytree(model.init(jax.random.key(0)))
  loss_fn = models.cross_entropy(model)
  gradient = jax.jit(jax.grad(lambda w, batch: loss_fn(unflatten(w), batch)))
  examples = [
    jax.tree.map(
      lambda x, t=t: x[batches.batch_rows(len(dataset.train.labels), 8, 0, t)],
      dataset.train,
    )
    for t in range(config.updates)
  ]
  trajectory, stalenesses = reference.delayed_leaves(
    np.asarray(params, np.float64),
    server(elements),
    lambda w, batch: np.asarray(gradient(jnp.float32(w), batch), np.float64),
    elements,
    examples,
  )
  measured = jax.jit(lambda w: loss_fn(unflatten(w), dataset.test))
  losses = [measured(jnp.float32(w)) for w in (params, *trajectory)]
  return np.array(losses), stalenesses


def elements_of(config):
  """The delay of every element: 4, 2 and 0 of three linear layers."""
  features = data.load(config.dataset, 0).train.inputs.shape[1]
  # A layer's bias and kernel, in either order.
  return np.array([4] * (features + 1) * 4 + [2] * 20 + [0] * 10)


@pytest.mark.usefixtures('as_users_run_it')
@pytest.mark.parametrize(
  'name, server',
  [
    (None, lambda delays: Clipped(Decayed(reference.Sgd(0.05)))),
    (
      'spike_compensation',
      lambda delays: reference.SpikeCompensation(0.05, delays, 0.9),
    ),
    (
      'delay_compensation',
      lambda delays: reference.DelayCompensation(reference.Sgd(0.05), 0.04),
    ),
  ],
)
def test_delay_by_depth(name, server):
  """Losses along the run are those of the oracle's loop."""
  changes = {}
  if name is None:
    changes = dict(weight_decay=DECAY, clip_norm=NORM)
  method = '+'.join(filter(None, ('delayed', name)))
  config = by_depth(method, updates=12, evaluate_every=1, **changes)
  history = experiment.run(config)[method]
  losses, stalenesses = plain_pipeline(config, server, elements_of(config))
  np.testing.assert_allclose(history.test_loss[:, 0], losses, rtol=2e-5)
  largest = [0] + [max(s) for s in stalenesses]
  assert history.latest_staleness[:, 0].tolist() == largest
  assert largest[-1] == 4
  np.testing.assert_allclose(
    history.simulated_time[:, 0], np.arange(13) / 3, rtol=1e-8
  )
  said = 'delay by depth (0 to 4 updates)'
  assert said in report._title(config, {method: history})


@pytest.mark.usefixtures('as_users_run_it')
def test_delay_by_depth_on_two_devices(monkeypatch):
  config = by_depth(updates=10, evaluate_every=5)
  (one,) = experiment.run(config).values()
  monkeypatch.setattr(parallel, 'device_count', lambda: 2)
  (two,) = experiment.run(config).values()
  np.testing.assert_allclose(one.train_loss, two.train_loss, rtol=1e-5)
  assert two.latest_staleness[-1] == 4


@pytest.mark.usefixtures('as_users_run_it')
@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('delayed+consistent', {}, 'replays whole batches, and with delay=by_dep'),
    ('delayed+dana', {}, 'no whole gradient arrives, which dana needs; delay_'),
    ('delayed+drop_stale', {}, 'which drop_stale needs'),
    (
      'delayed',
      dict(optimizer='polyak_sgd'),
      'optimizer polyak_sgd in delayed with delay=by_depth cannot be used here',
    ),
    ('delayed', dict(delay='depth'), "an integer or by_depth, got 'depth'"),
  ],
)
def test_what_delays_by_depth_cannot(name, changes, message):
  with pytest.raises(ValueError, match=message):
    experiment.check(by_depth(name, **changes))


@pytest.mark.usefixtures('as_users_run_it')
def test_a_model_without_stages(monkeypatch):
  mlp = models.mlp
  flat = lambda *args, **kwargs: mlp(*args, **kwargs)._replace(stages=None)
  monkeypatch.setattr(models, 'mlp', flat)
  with pytest.raises(ValueError, match='delay=by_depth needs a model that'):
    experiment.check(by_depth())


# Muon.


def labels_of(params, stages=None):
  """Whether Muon has a momentum of a parameter of its own, or Adam."""
  tx = optimizers.make('muon', 0.1, stages=stages)
  state = jax.eval_shape(tx.init, params)
  moments = state.inner_states['muon'].inner_state[0].mu
  masked = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(lambda m: not masked(m), moments, is_leaf=masked)


BLOCK = ('query', 'key', 'value', 'mix', 'expand', 'contract')
# Models, and the layers whose kernels are Muon's: all but the last.
INSIDE = {
  'softmax_regression': (lambda: models.softmax_regression(4, 2), []),
  'mlp': (lambda: models.mlp(4, [5, 5], 2), ['0', '1']),
  'cnn_small': (lambda: models.cnn((4, 4, 1), 2), ['0', '1']),
  'cnn_large': (lambda: models.cnn((4, 4, 3), 2, 'large'), [*'01234']),
  'resnet20': (
    lambda: models.resnet20((4, 4, 3), 2),
    [f'{i}.convolution' for i in range(19)],
  ),
  'gpt': (
    lambda: models.gpt(11, 4, layers=2, heads=2, width=4),
    [f'{i}.{name}' for i in '12' for name in BLOCK],
  ),
}


@pytest.mark.parametrize('name', INSIDE)
@pytest.mark.usefixtures('as_users_run_it')
def test_muon_takes_the_matrices_inside(name):
  make, layers = INSIDE[name]
  model = make()
  params = jax.eval_shape(model.init, jax.random.key(0))
  labels = labels_of(params, model.stages)
  found = [
    '.'.join(str(getattr(k, 'key', getattr(k, 'name', ''))) for k in path)
    for path, is_muon in jax.tree_util.tree_flatten_with_path(labels)[0]
    if is_muon
  ]
  assert sorted(found) == sorted(f'layers.{x}.kernel.value' for x in layers)


@pytest.mark.parametrize(
  'method',
  [
    dict(parallel='sequential'),
    dict(parallel='asynchronous', guidance='consistent'),
    dict(parallel='delayed', delay='by_depth'),
  ],
)
@pytest.mark.parametrize('number', [1, 2])
@pytest.mark.usefixtures('as_users_run_it')
def test_muon_knows_the_output_layer_of_every_method(method, number):
  config = short(model='mlp', hidden=[3], optimizer='muon', workers=2, **method)
  (method,) = events.methods(config)
  dataset = data.load(config.dataset, 0)
  task = tasks.make(config, dataset)
  params = jax.eval_shape(task.model.init, jax.random.key(0))
  where = (
    config,
    method,
    task.loss_fn,
    transformation.batch_like_of(config, method, dataset),
  )
  if number == 1:
    made = transformation.make_transformation(*where, stages=task.model.stages)
    init = made.init
  else:
    devices = parallel.Devices('devices', number)
    made = transformation.make_parallel(
      *where, devices, stages=task.model.stages
    )
    init = made.local_init
  is_muon = lambda x: isinstance(x, optax.contrib.MuonState)
  states = jax.tree.leaves(jax.eval_shape(init, params), is_leaf=is_muon)
  (state,) = filter(is_muon, states)
  assert len(jax.tree.leaves(state.mu)) == 1


def numpy_muon(gradient, rate):
  """The first update: five steps of Newton and Schulz, at a matrix's size."""
  rows, columns = gradient.shape
  x = gradient.T if rows > columns else gradient
  x = x / np.linalg.norm(x)
  for _ in range(5):
    square = x @ x.T
    x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
  x = x.T if rows > columns else x
  return -rate * np.sqrt(max(1, columns / rows)) * x


@pytest.mark.parametrize('shape', [(3, 3, 2, 4), (2, 2, 1, 8)])
@pytest.mark.usefixtures('as_users_run_it')
def test_muon_of_a_convolution_is_that_of_its_matrix(shape):
  gradient = np.random.default_rng(0).normal(size=shape)
  params = {'kernel': jnp.asarray(gradient, jnp.float32)}
  tx = optimizers.make('muon', 0.1)
  updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  expected = numpy_muon(gradient.reshape(-1, shape[-1]), 0.1).reshape(shape)
  np.testing.assert_allclose(updates['kernel'], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  'path, orthogonalised',
  [
    ('wte', False),
    ('Embed_0', False),
    ('token_embedding', False),
    ('lm_head', False),
    ('Head_0', False),
    ('logits', False),
    ('attention_heads', True),
    ('multi_head_attention', True),
    ('Dense_0', True),
  ],
)
def test_the_ends_by_name(path, orthogonalised):
  params = {'params': {path: {'kernel': jnp.ones([2, 3]), 'bias': jnp.ones(3)}}}
  labels = labels_of(params)['params'][path]
  assert labels == {'kernel': orthogonalised, 'bias': False}


@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.usefixtures('as_users_run_it')
def test_muon_and_its_adam_are_those_of_optax():
  """All but the output layer is Muon's; where nothing is known, all."""
  model = models.mlp(3, [4], 3)
  params = model.init(jax.random.key(0))
  muon, ours, known, nadam = (
    jax.jit(lambda p, tx=tx: tx.update(p, tx.init(p), p)[0])(params)['layers']
    for tx in (
      optax.contrib.muon(0.1),
      optimizers.make('muon', 0.1),
      optimizers.make('muon', 0.1, stages=model.stages),
      optax.nadam(0.1),
    )
  )
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
  jax.tree.map(np.testing.assert_array_equal, ours, muon)
  jax.tree.map(near, known[0], muon[0])
  jax.tree.map(near, known[1], nadam[1])
