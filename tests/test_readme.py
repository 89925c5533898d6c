"""The README's code runs, and its commands are the two it promises."""

import contextlib
import io
import pathlib
import re
import tempfile

import jax
import pytest

import gsgd_jax
from gsgd_jax import parallel, settings

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
COMPENSATION = (ROOT / 'docs' / 'compensation.md').read_text()
DEVICES = (ROOT / 'docs' / 'devices.md').read_text()
CLUSTERS = (ROOT / 'docs' / 'clusters.md').read_text()


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


def test_the_guide_to_clusters_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  blocks = re.findall(r'```python\n(.*?)```', CLUSTERS, flags=re.DOTALL)
  printed = io.StringIO()
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    contextlib.redirect_stdout(printed),
  ):
    exec(compile('\n'.join(blocks), 'clusters.md', 'exec'), {})
  lines = printed.getvalue().splitlines()
  assert len(lines) == 3 and lines[0].startswith('staleness 6.')


def test_the_guide_to_compensations_runs():
  blocks = re.findall(r'```python\n(.*?)```', COMPENSATION, flags=re.DOTALL)
  printed = io.StringIO()
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    contextlib.redirect_stdout(printed),
  ):
    exec(compile('\n'.join(blocks), 'compensation.md', 'exec'), {})
  losses = re.findall(r'(.*): loss (\S+)\n', printed.getvalue())
  assert len(losses) == 5
  for name, loss in losses:
    assert float(loss) < 0.5, name  # From 5.25.


@pytest.mark.parametrize('number', [1, 8])
def test_the_guide_to_devices_runs(number, monkeypatch):
  monkeypatch.setattr(parallel, 'device_count', lambda: number)
  blocks = re.findall(r'```python\n(.*?)```', DEVICES, flags=re.DOTALL)
  printed = io.StringIO()
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    contextlib.redirect_stdout(printed),
  ):
    exec(compile('\n'.join(blocks), 'devices.md', 'exec'), {})
  losses = re.findall(r'(.*): loss (\S+)\n', printed.getvalue())
  assert len(losses) == 4
  for name, loss in losses:
    assert float(loss) < 0.1, name  # From 5.25.


def test_every_compensation_has_its_line():
  for name in settings.COMPENSATIONS:
    assert re.search(rf'^\| `--config\.[^|]*\b{name}\b', README, re.MULTILINE)
    if name not in ('dana_slim', 'dana_dc'):  # Compositions.
      assert f'`{name}' in COMPENSATION
  assert '11,631,035' in README


def test_the_guide_knows_every_process_and_flag():
  for name in gsgd_jax.__all__:
    if 'arrivals' in name or name in ('straggler', 'failing', 'fixed_speeds'):
      assert f'`{name}(' in CLUSTERS
  for name in settings.ARRIVALS:
    assert f'arrivals={name}' in CLUSTERS


def test_two_commands_each_with_its_own_environment():
  commands = [
    line for line in README.splitlines() if line.startswith('python3 -m venv')
  ]
  assert len(commands) == 2
  assert all('.venv/bin/pip install' in command for command in commands)
