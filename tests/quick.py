"""How tests compile what they need not compile as users do.

Most of the time of the tests is compilation. XLA leaves out its costly
optimisations; what it fuses it compiles by its older emitters, and a program in
one piece, which takes less than half the time.

`JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles everything as users do.
"""

import functools
import inspect
import os

import jax

try:
  from jax._src import compiler
except ImportError:
  compiler = None

# Private to JAX; one that has it no longer compiles slower, and tests pass.
HOOK, ITS_ARGUMENT = 'get_compile_options', 'env_options_overrides'
WITHOUT = 'jax_disable_most_optimizations'
OPTIONS = {
  'xla_cpu_use_fusion_emitters': False,
  'xla_cpu_parallel_codegen_split_count': 1,
}


def install():
  """From now on what is compiled without optimisations has the options too."""
  original = getattr(compiler, HOOK, None)
  if not original or ITS_ARGUMENT not in inspect.signature(original).parameters:
    return
  ours = known()

  def get_compile_options(*args, **options):
    overrides = options.pop(ITS_ARGUMENT, None) or {}
    if jax.config.values[WITHOUT]:
      overrides = ours | overrides
    return original(*args, **options, **{ITS_ARGUMENT: overrides})

  setattr(compiler, HOOK, get_compile_options)


def environment(**changes):
  """That of a process that compiles like this, with changes to our own."""
  flags = [f'--{name}={value}'.lower() for name, value in known().items()]
  ours = {WITHOUT.upper(): '1'} | os.environ | changes
  if ours[WITHOUT.upper()] == '1':
    ours['XLA_FLAGS'] = ' '.join([ours.get('XLA_FLAGS', ''), *flags]).strip()
  return ours


@functools.cache
def known():
  """Options of XLA that it knows: none of them is promised to stay."""

  def is_known(option):
    try:
      jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
    except jax.errors.JaxRuntimeError:
      return False
    return True

  return dict(filter(is_known, OPTIONS.items()))
