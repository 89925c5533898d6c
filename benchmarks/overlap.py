"""May the collective overlap with computation? Read from compiled programs.

  python -m benchmarks.overlap
  python -m benchmarks.overlap --targets=cpu,tpu7x:2x2x1,v5e:2x4,h100
  python -m benchmarks.overlap --targets=v5e:2x4,v6e:2x4 --async_all_reduce

It compiles the steps of `parallel.data_parallel` and `delayed_all_reduce`, for
an MLP with 4 layers of 2048 and a batch of 8192, for 8 devices that need not be
there: a CPU's, a topology of TPUs by its name, 8 H100 of one host. By then XLA
has decided in which order instructions begin. Of the collectives that sum
gradients the table says how many are asynchronous (one instruction begins them,
another waits for them); on how many products of matrices of their own step they
depend, the least and the most; and how many of the step's products, with what
share of its FLOPs, lie between the start and the done of any of them.

These are schedules, not timings. Where no product lies in between, none hides
the communication; where all do, they may, as far as they take as long and the
device can do both at once: that is to be measured. A synchronous collective is
waited for, whatever it depends on, save on a CPU, whose instructions may run as
soon as their operands are there. And it is this network, this version of XLA.

`--async_all_reduce` compiles for TPUs v5e, v5p and v6e once more, with options
that let their all-reduces be asynchronous: one by one, in steps that are fused
with products.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import hlo, timing
from gsgd_jax import parallel

_TARGETS = flags.DEFINE_list(
  'targets', ['cpu'], 'cpu, h100, or topologies of TPUs, such as v5e:2x4.'
)
_ASYNC_ALL_REDUCE = flags.DEFINE_bool(
  'async_all_reduce', False, 'Also with options for TPUs v5e, v5p, v6e.'
)

WIDTH, LAYERS, BATCH = 2048, 4, 8192
DELAYS = {'data_parallel': 0, 'delayed_all_reduce': 1}
ASYNC_ALL_REDUCE = {
  'xla_jf_crs_combiner_threshold_count': 1,
  'xla_enable_async_all_reduce': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
}
# What the compiler would otherwise ask the GPU.
H100 = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 } dnn_version_info { major: 9 minor: 10 }
gpu_device_info { cuda_compute_capability { major: 9 }
core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
threads_per_block_limit: 1024 threads_per_core_limit: 2048
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
registers_per_core_limit: 65536 registers_per_block_limit: 65536
shared_memory_per_core: 233472 shared_memory_per_block: 49152
shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
device_memory_size: 84942979072 memory_bandwidth: 3352320000000 }
"""


def loss_fn(params, batch):
  x, y = batch
  for weights in params[:-1]:
    x = jax.nn.relu(x @ weights)
  return jnp.mean((x @ params[-1] - y) ** 2)


def to_install(target):
  """The packages that a target needs; None if they are there."""
  version = jax.__version__
  plugin, packages = 'libtpu', f"'jax[tpu]=={version}'"
  if target == 'h100':
    plugin, pjrt = 'jax_cuda13_plugin', f'jax-cuda13-pjrt=={version}'
    packages = f'jax-cuda13-plugin=={version} {pjrt} nvidia-cuda-nvcc'
  there = target == 'cpu' or importlib.util.find_spec(plugin)
  return None if there else packages


def devices_of(target):
  if target == 'cpu':
    return jax.devices()
  if target == 'h100':
    shape = '1x1x8'  # Partitions, hosts of each, devices of each host.
    gpus = {'topology': shape, 'target_config': H100}
    return topologies.get_topology_desc(shape, 'cuda', **gpus).devices
  return topologies.get_topology_desc(target, 'tpu').devices


def compiled(devices, delay, options):
  """The text of a step, for devices that cannot run anything."""
  mesh = parallel.make_mesh(devices)
  program = parallel.delayed_all_reduce(  # Without a delay: `data_parallel`.
    optax.sgd(1e-3), loss_fn, delay, mesh=mesh
  )
  array = lambda rows, sharding=None: jax.ShapeDtypeStruct(
    (rows, WIDTH), jnp.float32, sharding=sharding
  )
  there = program.batch_sharding([array(BATCH)] * 2)
  batch = [array(BATCH, sharding) for sharding in there]
  params = [array(WIDTH, NamedSharding(mesh, PartitionSpec()))] * LAYERS
  # What `init` would return: its shapes and shardings.
  params, state = jax.jit(program.init).lower(params).compile().out_info
  step = jax.jit(program.step, donate_argnums=(0, 1))
  lowered = step.lower(params, state, batch)
  return lowered.compile(compiler_options=options).as_text()


def cells(text):
  """What the table says of a program."""
  does, collectives = hlo.schedule(text)
  _, done, needs = zip(*collectives, strict=True)
  between = set()
  for start, end, _ in collectives:
    between |= set(range(start + 1, end or 0))
  products = sum(one.products for one in does)
  flops = sum(one.flops for one in does)
  inside = sum(does[x].products for x in between)
  share = sum(does[x].flops for x in between) / flops
  return [
    f'{done.count(None)} / {len(done) - done.count(None)}',
    f'{min(needs)}..{max(needs)}',
    f'{inside}/{products} ({share:.0%})',
  ]


def main(argv):
  del argv
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # There is no TPU to ask.
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  rows = []
  for target in _TARGETS.value:
    if packages := to_install(target):
      print(f'{target} needs a plugin: pip install {packages}\n')
      continue
    devices = devices_of(target)
    name = f'{target}, {len(devices)} x {devices[0].device_kind}'
    variants = {name: {}}
    if _ASYNC_ALL_REDUCE.value and target.startswith(('v5e', 'v5p', 'v6e')):
      variants[f'{name}, async_all_reduce'] = ASYNC_ALL_REDUCE
    for variant, options in variants.items():
      for step, delay in DELAYS.items():
        rows.append([variant, step, *cells(compiled(devices, delay, options))])
  head = 'target|step|collectives, sync / async|products each depends on'
  head += '|products between start and done (FLOPs)'
  print(f'jax {jax.__version__}: schedules, not timings\n')
  timing.print_table(head.split('|'), rows)


if __name__ == '__main__':
  app.run(main)
