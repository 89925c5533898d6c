"""The README's code runs, and its commands are the two it promises."""

import contextlib
import io
import pathlib
import re

import jax

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def test_the_example_runs_as_printed():
  (code,) = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)
  printed = io.StringIO()
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    contextlib.redirect_stdout(printed),
  ):
    exec(compile(code, 'README.md', 'exec'), {})
  loss = float(re.match(r'loss (\S+), last replayed', printed.getvalue())[1])
  assert loss < 0.1  # From 5.25.


def test_two_commands_each_with_its_own_environment():
  commands = [
    line for line in README.splitlines() if line.startswith('python3 -m venv')
  ]
  assert len(commands) == 2
  assert all('.venv/bin/pip install' in command for command in commands)
