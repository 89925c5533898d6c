"""gsgd_jax: training with stale gradients, in JAX."""

from gsgd_jax import parallel
from gsgd_jax._protocol import worker_params
from gsgd_jax._version import __version__ as __version__
from gsgd_jax.acceptance import drop_stale, rennala
from gsgd_jax.arrivals import (
  ArrivalProcess,
  Outage,
  exponential_arrivals,
  failing,
  fixed_speeds,
  gamma_arrivals,
  round_robin,
  straggler,
  uniform_arrivals,
)
from gsgd_jax.clock import Time, simulated_time
from gsgd_jax.corrections import (
  delay_compensation,
  exact_delay_compensation,
  scale_by_staleness,
)
from gsgd_jax.diagnostics import (
  StalenessSummary,
  record_staleness,
  staleness_summary,
  worker_shares,
)
from gsgd_jax.guided import Window, guided
from gsgd_jax.memory import state_memory
from gsgd_jax.momenta import (
  adaptive_braking,
  asynchronous_nesterov,
  delayed_nesterov,
  spike_compensation,
)
from gsgd_jax.predictors import dana, predict, smega2
from gsgd_jax.presets import guided_sgd
from gsgd_jax.rounds import data_parallel, synchronous
from gsgd_jax.staleness import asynchronous, delayed
from gsgd_jax.traces import Trace, read_trace, recorded_arrivals

__all__ = [
  'ArrivalProcess',
  'Outage',
  'StalenessSummary',
  'Time',
  'Trace',
  'Window',
  'adaptive_braking',
  'asynchronous',
  'asynchronous_nesterov',
  'dana',
  'data_parallel',
  'delay_compensation',
  'delayed',
  'delayed_nesterov',
  'drop_stale',
  'exact_delay_compensation',
  'exponential_arrivals',
  'failing',
  'fixed_speeds',
  'gamma_arrivals',
  'guided',
  'guided_sgd',
  'parallel',
  'predict',
  'read_trace',
  'record_staleness',
  'recorded_arrivals',
  'rennala',
  'round_robin',
  'scale_by_staleness',
  'simulated_time',
  'smega2',
  'spike_compensation',
  'staleness_summary',
  'state_memory',
  'straggler',
  'synchronous',
  'uniform_arrivals',
  'worker_params',
  'worker_shares',
]
