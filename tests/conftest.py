"""Strict by default: float64, no silent promotion, warnings are errors."""

import hypothesis
import jax

jax.config.update('jax_enable_x64', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')

hypothesis.settings.register_profile(
  'default',
  deadline=None,
  derandomize=True,
  max_examples=25,
  suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile('default')
