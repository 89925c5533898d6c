"""gsgd_jax: training with stale gradients, in JAX."""

from gsgd_jax._protocol import worker_params
from gsgd_jax._version import __version__ as __version__
from gsgd_jax.arrivals import ArrivalProcess, round_robin
from gsgd_jax.guided import guided
from gsgd_jax.memory import state_memory
from gsgd_jax.staleness import asynchronous, delayed, synchronous

__all__ = [
  'ArrivalProcess',
  'asynchronous',
  'delayed',
  'guided',
  'round_robin',
  'state_memory',
  'synchronous',
  'worker_params',
]
