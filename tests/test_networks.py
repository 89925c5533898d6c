"""Layers and networks against plain NumPy, and what the networks promise."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

import gsgd_jax
from gsgd_jax import layers, models, networks


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def numpy_convolution(x, kernel, stride=1):
  size = kernel.shape[0]
  out = [math.ceil(n / stride) for n in x.shape[1:3]]
  total = [
    max((o - 1) * stride + size - n, 0)
    for o, n in zip(out, x.shape[1:3], strict=True)
  ]
  x = np.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
  y = np.zeros((len(x), *out, kernel.shape[-1]))
  for i in range(out[0]):
    for j in range(out[1]):
      rows = slice(i * stride, i * stride + size)
      columns = slice(j * stride, j * stride + size)
      y[:, i, j] = np.einsum('bpqc,pqco->bo', x[:, rows, columns], kernel)
  return y


def numpy_pool(x):
  height, width = (n // 2 for n in x.shape[1:3])
  y = np.zeros((len(x), height, width, x.shape[-1]))
  for i in range(height):
    for j in range(width):
      block = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
      y[:, i, j] = block.max((1, 2))
  return y


def numpy_norm(x, axes, scale, bias):
  mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
  return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def numpy_group_norm(x, groups, scale, bias):
  size = x.shape[-1] // groups
  standard = [
    numpy_norm(x[..., i : i + size], (1, 2, 3), 1, 0)
    for i in range(0, x.shape[-1], size)
  ]
  return np.concatenate(standard, -1) * scale + bias


@hypothesis.settings(max_examples=8)
@hypothesis.given(
  height=st.integers(1, 6),
  width=st.integers(1, 6),
  channels=st.integers(1, 3),
  size=st.integers(1, 3),
  stride=st.integers(1, 2),
)
def test_convolution_against_numpy(height, width, channels, size, stride):
  x = normal(2, height, width, channels)
  kernel = normal(size, size, channels, 4, seed=1)
  convolve = jax.jit(layers.convolve, static_argnums=(2, 3))
  expected = numpy_convolution(x, kernel, stride)
  for method in ('patches', 'lax', None):
    y = convolve(x, kernel, stride, method)
    np.testing.assert_allclose(y, expected, atol=1e-12, err_msg=method)


@pytest.mark.parametrize('stride, shape', [(1, (5, 4)), (2, (5, 4))])
def test_gradients_of_patches_are_those_of_lax(stride, shape):
  x, kernel = normal(2, *shape, 3), normal(3, 3, 3, 4, seed=1)

  @functools.partial(jax.jit, static_argnums=2)
  def gradients(x, kernel, method):
    loss = lambda x, kernel: jnp.sum(
      jnp.sin(layers.convolve(x, kernel, stride, method))
    )
    return jax.grad(loss, (0, 1))(x, kernel)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-12),
    gradients(x, kernel, 'patches'),
    gradients(x, kernel, 'lax'),
  )


@pytest.mark.parametrize('shape', [(4, 6), (5, 7), (2, 3)])
def test_pooling_against_numpy(shape):
  x = normal(2, *shape, 3)
  np.testing.assert_array_equal(layers.max_pool(x), numpy_pool(x))


def with_affine(norm):
  """A norm whose scale and bias are not what they start as."""
  channels = norm.scale.shape[0]
  draw = lambda seed: jnp.asarray(normal(channels, seed=seed), jnp.float32)
  norm.scale[...], norm.bias[...] = 1 + draw(1), draw(2)
  return norm, np.asarray(norm.scale), np.asarray(norm.bias)


@pytest.mark.parametrize('groups', [1, 2, 6])
def test_group_norm_against_numpy(groups):
  x = 3 + 2 * normal(2, 3, 4, 6)
  norm, *affine = with_affine(layers.GroupNorm(6, groups))
  expected = numpy_group_norm(x, groups, *affine)
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-12)
  rounded = norm(jnp.asarray(x, jnp.bfloat16))
  assert rounded.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    rounded.astype(jnp.float32), expected, rtol=0.05, atol=0.05
  )


def test_layer_norm_against_numpy():
  x = 3 + 2 * normal(2, 3, 6)
  norm, *affine = with_affine(layers.LayerNorm(6))
  expected = numpy_norm(x, -1, *affine)
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-12)


def test_batch_norm_against_numpy():
  x = jnp.asarray(3 + 2 * normal(5, 3, 4, 6))
  norm, *affine = with_affine(layers.BatchNorm(6, jnp.float64))
  expected = numpy_norm(np.asarray(x), (0, 1, 2), *affine)
  np.testing.assert_allclose(norm(x), expected, atol=1e-12)
  norm.eval()
  np.testing.assert_allclose(norm(x[:2]), expected[:2], atol=1e-12)


def keys_of(number, seed=0):
  return jax.random.key_data(jax.random.split(jax.random.key(seed), number))


def test_dropout():
  x = jnp.ones([2, 50, 40])
  drop = jax.jit(layers.dropout, static_argnums=(1, 3))
  y = np.asarray(drop(x, 0.25, keys_of(2), 0))
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75])
  np.testing.assert_allclose((y == 0).mean((1, 2)), 0.25, atol=0.03)
  # Examples and sites draw on their own, and nothing else matters.
  other = np.asarray(drop(x, 0.25, keys_of(2), 1))
  for first, second in [(y[0], y[1]), (y[0], other[0])]:
    np.testing.assert_allclose((first == second).mean(), 0.625, atol=0.04)
  np.testing.assert_array_equal(drop(x[1:], 0.25, keys_of(2)[1:], 0)[0], y[1])
  np.testing.assert_array_equal(drop(x, 0.25, None, 0), x)


SHAPE = (9, 8, 3)
CNN = functools.partial(models.cnn, SHAPE, 4)
# Compiled sooner than patches.
RESNET = functools.partial(models.resnet20, SHAPE, 4, convolution='lax')
GPT = functools.partial(models.gpt, 7, 6, 2, 2, 8)
ALL = {
  'mlp': lambda: models.mlp(216, [5], 4),
  'cnn': CNN,
  'large cnn': lambda: CNN('large'),
  'resnet20': RESNET,
  'resnet20, batch': lambda: RESNET('batch'),
  'gpt': GPT,
}
SHALLOW = {'cnn': CNN, 'gpt': functools.partial(models.gpt, 7, 6, 1, 2, 8)}
WITH_DTYPE = {
  'cnn': CNN,
  'resnet20, batch': functools.partial(RESNET, 'batch'),
  'gpt': GPT,
}


def batch_for(name, size=4):
  rng = np.random.default_rng(5)
  if name == 'gpt':
    return tuple(jnp.asarray(rng.integers(0, 7, (2, size, 6)), jnp.int32))
  images = jnp.asarray(rng.normal(size=(size, *SHAPE)), jnp.float32)
  return images, jnp.asarray(rng.integers(0, 4, size), jnp.int32)


def params_of(model, seed=0):
  """Of He's size, with no scale at one and no bias at zero.

  By NumPy: to compile all draws of `init` takes longer than the network.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    around = 1 if 'scale' in jax.tree_util.keystr(path) else 0
    fan_in = math.prod(leaf.shape[:-1])
    deviation = 0.1 if len(leaf.shape) == 1 else np.sqrt(2 / fan_in)
    values = around + deviation * rng.normal(size=leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def plain(params):
  """Layers as nested dicts of NumPy arrays."""
  nested = lambda x: (
    {k: nested(v) for k, v in x.items()}
    if hasattr(x, 'items')
    else np.asarray(x[...], np.float64)
  )
  by_depth = params['layers']
  return [nested(by_depth[i]) for i in sorted(by_depth)]


def relu(x):
  return np.maximum(x, 0)


def dense(layer, x):
  return x @ layer['kernel'] + layer.get('bias', 0)


@pytest.mark.parametrize('size, pooled', [('small', (0, 1)), ('large', (1, 3))])
def test_cnn_against_numpy(size, pooled):
  model = CNN(size, dtype=jnp.float64)
  params = params_of(model)
  images = batch_for('cnn')[0]
  *hidden, last = plain(params)
  x = np.asarray(images, np.float64)
  for i, layer in enumerate(hidden):
    if layer['kernel'].ndim == 4:
      x = relu(numpy_convolution(x, layer['kernel']) + layer['bias'])
      x = numpy_pool(x) if i in pooled else x
    else:
      x = relu(dense(layer, x.reshape(len(x), -1)))
  expected = dense(last, x.reshape(len(x), -1))
  widths = [layer['kernel'].shape[-1] for layer in hidden]
  assert widths == {'small': [32, 64], 'large': [64, 64, 128, 128, 256]}[size]
  np.testing.assert_allclose(
    jax.jit(model.apply)(params, images), expected, rtol=1e-9, atol=1e-9
  )


def numpy_resnet20(every, x, norm):
  def unit(layer, x, stride=1):
    y = numpy_convolution(x, layer['convolution']['kernel'], stride)
    return norm(y, layer['norm']['scale'], layer['norm']['bias'])

  stem, *units, head = every
  x = relu(unit(stem, x))
  for i in range(9):
    stride = 2 if i in (3, 6) else 1
    y = relu(unit(units[2 * i], x, stride))
    y = unit(units[2 * i + 1], y)
    shortcut = np.zeros_like(y)
    shortcut[..., : x.shape[-1]] = x[:, ::stride, ::stride]
    x = relu(y + shortcut)
  return dense(head, x.mean((1, 2)))


@pytest.mark.parametrize('normalization', ['group', 'batch'])
def test_resnet20_against_numpy(normalization):
  model = RESNET(normalization, dtype=jnp.float64)
  params = params_of(model)
  images = batch_for('resnet20')[0]
  norm = (
    functools.partial(numpy_norm, axes=(0, 1, 2))
    if normalization == 'batch'
    else functools.partial(numpy_group_norm, groups=8)
  )
  expected = numpy_resnet20(
    plain(params),
    np.asarray(images, np.float64),
    lambda x, scale, bias: norm(x, scale=scale, bias=bias),
  )
  if normalization == 'group':
    logits = jax.jit(model.apply)(params, images)
  else:
    logits = jax.jit(model.train_apply)(params, images, None)
  np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)


def numpy_gpt(every, tokens, heads):
  embedding, *blocks, head = every
  length = tokens.shape[1]
  x = embedding['tokens'][tokens] + embedding['positions'][:length]
  norm = lambda x, layer: numpy_norm(x, -1, layer['scale'], layer['bias'])
  for block in blocks:
    y = norm(x, block['norm1'])
    query, key, value = (
      np.split(dense(block[name], y), heads, axis=-1)
      for name in ('query', 'key', 'value')
    )
    mixed = []
    for q, k, v in zip(query, key, value, strict=True):
      scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
      weights = np.exp(scores) * np.tril(np.ones((length, length)))
      mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    x = x + dense(block['mix'], np.concatenate(mixed, -1))
    y = dense(block['expand'], norm(x, block['norm2']))
    gelu = (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2
    x = x + dense(block['contract'], gelu * y)
  return dense(head['logits'], norm(x, head['norm']))


@pytest.mark.parametrize('length', [6, 3])
def test_gpt_against_numpy(length):
  model = GPT(dtype=jnp.float64)
  params = params_of(model)
  tokens = batch_for('gpt')[0][:, :length]
  logits = jax.jit(model.apply)(params, tokens)
  assert logits.shape == (4, length, 7)
  expected = numpy_gpt(plain(params), np.asarray(tokens), heads=2)
  np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)


def test_gpt_is_causal():
  model = GPT()
  params = params_of(model)
  apply = jax.jit(model.apply)
  tokens = batch_for('gpt')[0]
  before = apply(params, tokens)
  after = apply(params, tokens.at[:, 4:].set((tokens[:, 4:] + 1) % 7))
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert np.all(np.any(before[:, 4:] != after[:, 4:], -1))


def test_gpt_starts_as_gpt2_does():
  params = models.gpt(50, 40, layers=2, width=64).init(jax.random.key(0))
  embedding, *blocks, head = plain(params)
  spread = lambda name: np.std([block[name]['kernel'] for block in blocks])
  for found in (
    embedding['tokens'].std(),
    embedding['positions'].std(),
    head['logits']['kernel'].std(),
    *map(spread, ('query', 'key', 'value', 'expand')),
  ):
    np.testing.assert_allclose(found, 0.02, rtol=0.05)
  for name in ('mix', 'contract'):
    np.testing.assert_allclose(spread(name), 0.02 / 2, rtol=0.05)
  shapes = {leaf.ndim for leaf in jax.tree.leaves(params)}
  assert shapes == {1, 2}


def test_he_initialisation():
  network = networks.CNN(
    (8, 8, 16),
    [[32]],
    [16],
    2,
    dropout=0.0,
    dtype=jnp.float32,
    convolution=None,
    rngs=nnx.Rngs(0),
  )
  convolution, hidden, _ = network.layers
  for layer, inputs in ((convolution, 144), (hidden, 512)):
    np.testing.assert_allclose(
      np.std(layer.kernel[...]), np.sqrt(2 / inputs), rtol=0.05
    )


@pytest.mark.parametrize(
  'model, number',
  [
    (models.cnn((28, 28, 1), 10), 50_186),
    (models.cnn((32, 32, 3), 10, 'large'), 2_360_138),
    (models.resnet20((32, 32, 3), 10), 269_722),
    (models.resnet20((32, 32, 3), 10, 'batch'), 269_722),
    (models.gpt(65, 128), 1_024_640),
  ],
)
def test_numbers_of_parameters(model, number):
  params = jax.eval_shape(model.init, jax.random.key(0))
  leaves = jax.tree.leaves(params)
  assert sum(leaf.size for leaf in leaves) == number
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}


@pytest.mark.parametrize('name', ALL)
def test_stages(name):
  model = ALL[name]()
  params = jax.eval_shape(model.init, jax.random.key(0))
  shapes = jax.tree.map(lambda s, p: (s, p.shape), model.stages, params)
  assert jax.tree.structure(model.stages) == jax.tree.structure(params)
  stages = jax.tree.leaves(model.stages)
  depth = {'mlp': 2, 'cnn': 3, 'large cnn': 6, 'gpt': 4}.get(name, 20)
  assert sorted(set(stages)) == list(range(depth))
  assert all(type(stage) is int for stage in stages)
  # The head is last, what reads the input first.
  layers = shapes['layers']
  last = jax.tree.leaves(layers[depth - 1])
  assert (7 if name == 'gpt' else 4) in last and depth - 1 in last
  assert 0 in jax.tree.leaves(layers[0])


def test_stages_are_delays_of_a_pipeline():
  """What enters first comes out last: stage i of 3 is 2 - i calls late."""
  model = models.mlp(4, [3, 3], 2)
  params = params_of(model)
  delays = jax.tree.map(lambda stage: 2 - stage, model.stages)
  tx = gsgd_jax.delayed(optax.sgd(1.0), delays)
  state = tx.init(params)
  moved = []
  for _ in range(3):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state)
    moved.append([np.any(layer['kernel']) for layer in plain(updates)])
  assert moved == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]


def numpy_cross_entropy(logits, labels):
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)[..., None]
  right = np.take_along_axis(logits, labels, -1)[..., 0]
  return np.mean(np.log(np.exp(logits).sum(-1)) - right)


@pytest.mark.parametrize('name', WITH_DTYPE)
def test_bfloat16(name):
  batch = batch_for(name)
  losses = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    model = WITH_DTYPE[name](dtype=dtype)
    params = params_of(model)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    apply = (
      model.apply
      if model.train_apply is None
      else functools.partial(model.train_apply, keys=None)
    )
    traced = jax.jit(apply).trace(params, batch[0])
    assert ('bf16' in str(traced.jaxpr)) == (dtype == jnp.bfloat16)
    logits = traced.lower().compile()(params, batch[0])
    assert logits.dtype == jnp.float32
    losses[dtype] = numpy_cross_entropy(logits, batch[1])
    loss_fn = models.cross_entropy(model)
    grads = jax.eval_shape(jax.grad(loss_fn), params, batch)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  near, exact = losses[jnp.bfloat16], losses[jnp.float32]
  np.testing.assert_allclose(near, exact, rtol=0.05)
  assert near != exact


def trained(model, batch):
  """`params -> losses` of ten steps in scan."""
  loss_fn = models.cross_entropy(model)

  def step(params, _):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), loss

  return lambda params: jax.lax.scan(step, params, length=10)[1]


@pytest.mark.parametrize('name', ['cnn', 'gpt'])
def test_trains_in_scan_under_vmap(name):
  model, batch = SHALLOW[name](), batch_for(name)
  seeds = [params_of(model, seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *p: np.stack(p), *seeds)
  losses = np.asarray(jax.jit(jax.vmap(trained(model, batch)))(stacked))
  assert losses.shape == (2, 10) and losses[0, 0] != losses[1, 0]
  assert np.all(losses[:, -1] < losses[:, 0])
  first = jax.jit(models.cross_entropy(model))(seeds[1], batch)
  np.testing.assert_allclose(losses[1, 0], first, rtol=1e-5)


@pytest.mark.parametrize('name', ALL)
def test_init_and_training_trace_under_vmap(name):
  model = ALL[name]()
  run = lambda key: trained(model, batch_for(name))(model.init(key))
  keys = jax.random.split(jax.random.key(0), 3)
  assert jax.eval_shape(jax.vmap(run), keys).shape == (3, 10)


def test_batch_norm_is_evaluated_by_what_calibration_measured():
  model = RESNET('batch')
  params = params_of(model)
  sample = batch_for('resnet20')[0]
  other = 2 * sample + 1
  apply = jax.jit(model.apply)
  of = jax.jit(
    lambda x: (model.calibrate(params, x), model.train_apply(params, x, None))
  )
  evaluated, trained = of(sample)
  logits = apply(evaluated, sample)
  np.testing.assert_allclose(logits, trained, rtol=1e-5, atol=1e-5)
  # An image's logits do not depend on those beside it, unlike in training.
  beside = jnp.concatenate([sample[:2], other[2:]])
  np.testing.assert_allclose(
    apply(evaluated, beside)[:2], logits[:2], rtol=1e-5, atol=1e-5
  )
  assert not np.allclose(of(beside)[1][:2], logits[:2], rtol=1e-2)
  # Nothing is remembered: other samples in between change nothing.
  apply(of(other)[0], sample)
  jax.tree.map(np.testing.assert_array_equal, of(sample)[0], evaluated)
  with pytest.raises(ValueError, match='what calibrate'):
    model.apply(params, sample)


@pytest.mark.parametrize('name', ['cnn', 'gpt'])
def test_masks_do_not_depend_on_how_a_batch_is_split(name):
  model = SHALLOW[name](dropout=0.5)
  params = params_of(model)
  inputs, keys = batch_for(name)[0], keys_of(4)
  apply = jax.jit(model.train_apply)
  whole = apply(params, inputs, keys)
  halves = [apply(params, inputs[i:j], keys[i:j]) for i, j in ((0, 2), (2, 4))]
  np.testing.assert_allclose(
    whole, np.concatenate(halves), rtol=1e-4, atol=1e-6
  )
  evaluated = jax.jit(model.apply)(params, inputs)
  for other in (apply(params, inputs, keys_of(4, seed=1)), evaluated):
    assert not np.allclose(whole, other, rtol=1e-2)
  assert model.needs_keys and not ALL[name]().needs_keys
  loss_fn = models.cross_entropy(model)
  with pytest.raises(ValueError, match='a key for each example'):
    loss_fn(params, batch_for(name))
  assert not jax.eval_shape(loss_fn, params, (*batch_for(name), keys)).shape


def test_every_layer_of_gpt_drops():
  """Each site is seen: without the others, its mask moves the logits."""
  tokens = batch_for('gpt')[0]
  model = GPT(dropout=0.5)
  params = params_of(model)
  jaxpr = str(jax.make_jaxpr(model.train_apply)(params, tokens, keys_of(4)))
  assert jaxpr.count('random_fold_in') == 1 + 2 * 2


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: models.cnn((3, 8, 1), 2), 'cnn .* at least 4 by 4 .*3, 8, 1'),
    (lambda: models.resnet20((8, 2, 1), 2), 'resnet20 .* 4 by 4 .*8, 2, 1'),
    (lambda: models.cnn((8, 8), 2), r'\(height, width, channels\)'),
    (lambda: CNN('medium'), "'small' or 'large', got 'medium'"),
    (lambda: CNN(convolution='fft'), "'lax' or None, got 'fft'"),
    (lambda: RESNET(convolution='fft'), "'lax' or None, got 'fft'"),
    (lambda: RESNET('layer'), "'group' or 'batch', got 'layer'"),
    (lambda: RESNET(groups=3), 'groups must be 1, 2, 4, 8 or 16, got 3'),
    (lambda: CNN(dropout=1), 'below 1, got 1'),
    (lambda: GPT(dropout=-0.1), 'at least 0 and below 1, got -0.1'),
    (lambda: models.gpt(5, 5, heads=3, width=8), 'heads=3 and width=8'),
    (lambda: models.gpt(0, 5), 'vocabulary must be at least 1, got 0'),
    (
      lambda: GPT().apply(params_of(GPT()), jnp.ones([1, 7], int)),
      'at most context=6 tokens, got 7',
    ),
  ],
)
def test_errors(make, message):
  with pytest.raises(ValueError, match=message):
    make()
