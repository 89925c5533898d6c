"""How fast studies are computed.

  python -m benchmarks.study
  python -m benchmarks.study --datasets=breast_cancer,a.data,b.data,c.data

The paper's grid from a cold start, by `train.py` as a user runs it: 7
optimizers, 3 ways to run them, 3 guidances, 30 seeds, 50 epochs, on each data
set. Then part of the delay study, tuning included; and how the throughput of
one compiled program grows with the number of runs in its `vmap`.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import tqdm
from absl import app, flags

from benchmarks import timing
from configs import delay
from gsgd_jax import study, sweeps

_DATASETS = flags.DEFINE_list(
  'datasets', ['breast_cancer'], 'Those of the grid.'
)
_GRID = flags.DEFINE_list(
  'grid', [], "Further flags of the grid's `train.py`, to make it smaller."
)
_LANES = flags.DEFINE_list(
  'lanes', ['1', '4', '16', '32', '64'], 'Runs at once.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds that are timed.')
_UPDATES = flags.DEFINE_integer('updates', 840, 'Of the runs of one program.')
_PART = flags.DEFINE_string('part', delay.PART, 'Of the delay study.')
_TRAIN = pathlib.Path(__file__).parents[1] / 'train.py'


def computed(*arguments):
  """Runs a study; returns seconds, cells, and updates of all its runs."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch) / 'study'
    began = time.perf_counter()
    subprocess.run(
      [sys.executable, str(_TRAIN), f'--workdir={folder}', *arguments],
      check=True,
      stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - began
    text = (folder / 'cells.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  updates = 0
  for line in lines:
    longest = max(sum(b['updates']) for b in line['budgets'].values())
    tuned = len(line['tried']) * longest / len(line['seeds'])
    tuning = (
      len(next(iter(next(iter(line['tried'].values())).values())))
      if (line['tried'])
      else 0
    )
    updates += longest * len(line['curves']) + tuned * tuning
  return seconds, len(lines), updates


def lanes_table():
  """Updates of all runs per second, by how many there are at once."""
  config = delay.get_config()
  cells = {
    study.shown(c): c
    for c in study.cells(config)
    if c.values.get('workers', '64') == '64'
    and c.values.get('cluster', 'homogeneous') == 'homogeneous'
  }
  rows = []
  for name in ('sequential', 'ASGD', 'DANA', 'ASGD, guided'):
    cell = next(c for c in cells.values() if c.values['method'] == name)
    rates = [_rate(cell, int(n)) for n in tqdm.tqdm(_LANES.value, desc=name)]
    ratios = [f'{rate / rates[0]:.1f}' for rate in rates[1:]]
    rows.append([name, f'{rates[0]:,.0f}', *ratios])
  head = ['method', f'{_LANES.value[0]} at once, updates/s']
  timing.print_table(head + [f'{n}, over that' for n in _LANES.value[1:]], rows)


def _rate(cell, number):
  budgets = [sweeps.Budget('updates', 'updates', float(_UPDATES.value))]
  dataset = study.load(cell.config, 0)
  every = _UPDATES.value + cell.config.workers
  sweep = sweeps.Sweep(
    cell.config, cell.method, [dataset], budgets, number, every
  )
  lanes = [sweeps.Lane(dataset, seed, 0.01) for seed in range(number)]
  seconds = []
  for _ in range(_ROUNDS.value + 1):
    began = time.perf_counter()
    sweep.run(lanes, budgets, every, tested=False)
    seconds.append(time.perf_counter() - began)
  return number * _UPDATES.value / statistics.median(seconds[1:])


def main(argv):
  del argv
  print(f'on {jax.devices()[0].device_kind}\n')
  rows = []
  for name, arguments in {
    "the paper's grid": (
      '--config=configs/paper.py:author',
      f'--config.datasets={",".join(_DATASETS.value)}',
      *_GRID.value,
    ),
    'a part of the delay study': (
      '--config=configs/delay.py',
      f'--config.only={_PART.value}',
      *_GRID.value,
    ),
  }.items():
    seconds, cells, updates = computed(*arguments)
    rows.append(
      [
        name,
        str(cells),
        f'{seconds:.0f}',
        f'{60 * cells / seconds:.1f}',
        f'{updates / seconds:,.0f}',
      ]
    )
  head = ['study', 'cells', 'seconds', 'cells a minute', 'updates/s']
  timing.print_table(head, rows)
  print()
  lanes_table()


if __name__ == '__main__':
  app.run(main)
