"""The README keeps its promises, and the guides' code runs."""

import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

import gsgd_jax
from gsgd_jax import images, parallel, settings, sources
from tests.helpers import printed_by

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
COMPENSATION = (ROOT / 'docs' / 'compensation.md').read_text()
DEVICES = (ROOT / 'docs' / 'devices.md').read_text()
CHECKPOINTS = (ROOT / 'docs' / 'checkpoints.md').read_text()
NETWORKS = (ROOT / 'docs' / 'networks.md').read_text()
CLUSTERS = (ROOT / 'docs' / 'clusters.md').read_text()
EVIDENCE = (ROOT / 'docs' / 'evidence.md').read_text()
TRAINING = (ROOT / 'docs' / 'training.md').read_text()


def test_it_fits_on_three_screens():
  assert len(README.splitlines()) <= 120
  pictures = re.findall(r'!\[.*?\]\((?!https:)|<img ', README)
  assert len(pictures) == 1


def test_its_five_lines_are_those_of_the_guide():
  """Which runs (see `test_docs.py`)."""
  (lines,) = re.findall(r'```diff\n.*?```', README, re.DOTALL)
  assert lines in (ROOT / 'docs' / 'optax_loop.md').read_text()


def test_its_results_are_those_of_the_guides():
  told = ' '.join(f'{TRAINING} {EVIDENCE}'.split())
  figures = re.findall(r'[+-]?\d+\.\d\d ± \d\.\d\d', README)
  assert len(figures) > 30
  for figure in figures:
    assert figure in told
  by_default = re.findall(
    r'^\| (?:sequ|asyn).*\d,\d{3}.*$', README, re.MULTILINE
  )
  assert len(by_default) == 4
  for row in by_default:
    assert row in TRAINING


def test_its_table_is_that_of_the_evidence():
  """Method by method: at equal gradients and time, on either cluster."""
  as_told = {
    'adaptive braking (published)': 'adaptive braking, the best published',
    'ASGD, guided': '**ASGD, guided** (`guided_sgd`)',
    'adaptive braking, guided': '**adaptive braking, guided**',
    'data parallel, batches of 64': 'batches of 64, split (data parallel)',
  }
  rows_of = lambda text: [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in text.splitlines()
    if line.startswith('|')
  ]
  tuned = README.partition('uneven, by time |\n')[2].partition('\n\n')[0]
  _, *tuned = rows_of(tuned)
  assert len(tuned) == 7
  section = EVIDENCE.partition('## 64 workers')[2].partition('\n## ')[0]
  section = section.partition('Machines whose speeds')
  alike, uneven = ({row[0]: row for row in rows_of(t)} for t in section[::2])
  for method, *cells in tuned:
    told = as_told.get(method, method)
    expected = [by[told][i] for by in (alike, uneven) for i in (1, 3)]
    assert cells == expected, method


def test_its_links_lead_somewhere():
  links = re.findall(r'\]\((?!https:)(.*?)\)|src="(.*?)"', README)
  assert len(links) > 15
  for link in map(''.join, links):
    name, _, anchor = link.partition('#')
    assert (ROOT / name).is_file()
    if anchor:
      headings = re.findall(r'^#+ (.*)$', (ROOT / name).read_text(), re.M)
      slugs = [re.sub(r'[^\w -]', '', h).lower() for h in headings]
      assert anchor in [slug.replace(' ', '-') for slug in slugs]


def test_the_guide_to_clusters_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  printed = printed_by(CLUSTERS, 'clusters.md')
  lines = printed.splitlines()
  assert len(lines) == 3 and lines[0].startswith('staleness 6.')


def test_the_guide_to_compensations_runs():
  printed = printed_by(COMPENSATION, 'compensation.md')
  losses = re.findall(r'(.*): loss (\S+)\n', printed)
  assert len(losses) == 5
  for name, loss in losses:
    assert float(loss) < 0.5, name  # From 5.25.


def test_the_guide_to_networks_runs():
  printed = printed_by(NETWORKS, 'networks.md')
  loss = re.fullmatch(r'batch norm under delay: loss (\S+)\n', printed)[1]
  assert float(loss) < 0.5  # From 5.25.


def test_the_guide_to_checkpoints_runs(tmp_path, monkeypatch):
  """And what it loads is what the run says it is."""
  train = [sys.executable, ROOT / 'train.py', '--workdir=runs/mine']
  train += ['--config.methods=asynchronous,asynchronous+consistent']
  train += ['--config.updates=60', '--config.evaluate_every=20']
  subprocess.run(train, cwd=tmp_path, check=True, capture_output=True)
  monkeypatch.chdir(tmp_path)
  result = json.loads(pathlib.Path('runs/mine/result.json').read_text())
  of_method = result['methods']['asynchronous+consistent']
  chosen = of_method['test_accuracy']['validation_chosen']
  printed = printed_by(CHECKPOINTS, 'checkpoints.md', of_a_run=True)
  assert printed == (
    f'{chosen["values"][0]:.2%} of seed 0, after {chosen["steps"][0]} updates\n'
  )


def test_the_guide_knows_every_model():
  for name in settings.MODELS:
    assert f'`{name}`' in NETWORKS


def test_the_guide_prepares_images(tmp_path):
  """Its command, and that training finds what it leaves."""
  (command,) = re.findall(
    r'^python (examples/\S+) (\S+)$', NETWORKS, re.MULTILINE
  )
  assert command[1] == '--data_dir=prepared'
  for _ in range(2):  # What is prepared stays.
    done = subprocess.run(
      [sys.executable, ROOT / command[0], command[1]],
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    assert (done.returncode, done.stderr) == (0, '')
  read = images.read('tfds:digits', str(tmp_path / 'prepared'))
  assert (read.train.examples, read.test.examples) == (1400, 397)
  assert read.classes[3] == '3'


def test_the_guide_writes_a_text(tmp_path):
  assert 'python examples/write_text.py > text.txt' in NETWORKS
  program = ROOT / 'examples' / 'write_text.py'
  text = subprocess.run([sys.executable, program], capture_output=True).stdout
  path = tmp_path / 'text.txt'
  path.write_bytes(text)
  tokens, characters = sources.read_text(str(path))
  assert 500_000 <= len(tokens) < 501_000 and len(characters) < 64
  # The text of which figures are said.
  assert hashlib.md5(text).hexdigest() == '96274be45cfa62778f226fd82b919fea'
  refused = subprocess.run([sys.executable, program, 'x'], capture_output=True)
  assert refused.returncode == 2 and b'unexpected argument' in refused.stderr


@pytest.mark.parametrize('number', [1, 8])
def test_the_guide_to_devices_runs(number, monkeypatch):
  monkeypatch.setattr(parallel, 'device_count', lambda: number)
  printed = printed_by(DEVICES, 'devices.md')
  losses = re.findall(r'(.*): loss (\S+)\n', printed)
  assert len(losses) == 4
  for name, loss in losses:
    assert float(loss) < 0.1, name  # From 5.25.


def test_every_compensation_has_its_line():
  for name in settings.COMPENSATIONS:
    command = rf'^python train.py --config\.compensation={name}\b'
    assert re.search(command, COMPENSATION, re.MULTILINE)
    if name not in ('dana_slim', 'dana_dc'):  # Compositions.
      assert f'`{name}' in COMPENSATION
  assert '11,631,035' in COMPENSATION


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
