"""Recorded arrivals: against the oracle, replayed, and read from files."""

import csv
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax
from tests import helpers, reference
from tests.test_arrivals import assert_agrees, complaint_of

SGD = optax.sgd(0.1)


# Against the oracle.


def trace_in_ticks(order, times, workers, unit):
  """When the oracle's workers arrive: strictly one after another."""
  if times is None:
    times, unit = np.arange(1, len(order) + 1), workers
  elif unit is None:
    own = [
      [t for w, t in zip(order, times, strict=True) if w == i] for i in order
    ]
    unit = np.mean(
      [own[order.index(i)][-1] / order.count(i) for i in sorted(set(order))]
    )
  ticks = []
  for time in times:
    ticks.append(reference.ticks(time / unit))
    if len(ticks) > 1:
      ticks[-1] = max(ticks[-1], ticks[-2] + 1)
  return ticks


@helpers.covering(
  8,
  calls=[1, 10, 25, 40],
  inner=helpers.inner_names,
  workers=[1, 2, 5],
  length=[1, 12, 30, 50],
  timed=[False, True],
  unit=[None, 1.0, 0.7],
  seed=[0, 1, 2],
  overwrite_within=[None, None, 0.0, 0.3],
  mode=helpers.modes,
)
def test_recorded_arrivals(
  calls, inner, workers, length, timed, unit, seed, overwrite_within, mode
):
  rng = np.random.default_rng(seed)
  order = rng.integers(workers, size=length).tolist()
  times = None
  if timed:  # Often equal, and perhaps 0.
    times = np.cumsum(rng.integers(3, size=length) / 4)
    times[-1] += 0.5
    times = times.tolist()
  assert_agrees(
    helpers.make_problem(
      'quadratic', 4, 2, calls, seed, seeds=2 if mode == 'vmap' else 1
    ),
    inner,
    workers,
    gsgd_jax.recorded_arrivals(order, times, unit=unit),
    reference.Recorded(order, trace_in_ticks(order, times, workers, unit)),
    mode,
    overwrite_within=overwrite_within,
  )


# By hand.


def clocks_and_workers(process, workers, calls):
  """The clock and who arrived, at every call from the first arrival on."""
  tx = gsgd_jax.asynchronous(SGD, workers, arrivals=process)
  state = tx.init(jnp.zeros([1]))

  def step(state, _):
    _, state = tx.update(jnp.ones([1]), state)
    return state, (state.clock, state.worker)

  length = workers - 1 + calls
  _, (now, order) = jax.lax.scan(step, state, length=length)
  times = gsgd_jax.simulated_time([now])
  return times[workers - 1 :], order[workers - 1 :].tolist()


def test_arrivals_without_times_are_evenly_spread():
  order = [2, 0, 0, 1, 2, 0, 3, 3]
  process = gsgd_jax.recorded_arrivals(order)
  now, workers = clocks_and_workers(process, 4, len(order))
  assert workers == order
  assert now.tolist() == [(i + 1) / 4 for i in range(len(order))]


@pytest.mark.parametrize(
  'order, times, unit',
  [
    # Worker 0 takes 2.9 / 3, worker 1 takes 1.4.
    ([0, 1, 0, 0], [0.9, 1.4, 1.8, 2.9], (2.9 / 3 + 1.4) / 2),
    # Of three workers one never arrives; nothing is known of it.
    ([2, 0, 2], [1.0, 3.0, 4.0], (3 + 2) / 2),
    ([0, 0], [0.0, 6.0], 3.0),
  ],
)
def test_the_unit_is_the_mean_time_of_a_task(order, times, unit):
  process = gsgd_jax.recorded_arrivals(order, times)
  now, workers = clocks_and_workers(process, 3, len(order))
  assert workers == order
  np.testing.assert_allclose(now, np.array(times) / unit, 1e-8, 1e-9)
  given = gsgd_jax.recorded_arrivals(order, times, unit=unit)
  np.testing.assert_allclose(clocks_and_workers(given, 3, len(order))[0], now)


def test_of_equal_times_the_earlier_entry_comes_first():
  order = [2, 0, 2, 1, 1, 0, 0]
  times = [0.0, 0.0, 0.0, 1.5, 1.5, 1.5, 2.0]
  process = gsgd_jax.recorded_arrivals(order, times, unit=1.0)
  now, workers = clocks_and_workers(process, 3, len(order))
  assert workers == order
  tick = 2.0**-30
  expected = [0, tick, 2 * tick, 1.5, 1.5 + tick, 1.5 + 2 * tick, 2]
  assert now.tolist() == expected


@pytest.mark.parametrize('workers', [1, 3])
@pytest.mark.parametrize('times', [None, [0.5, 0.5, 2.0, 3.0, 3.5]])
def test_after_the_last_arrival_nothing_happens(workers, times):
  order = [0, min(1, workers - 1), 0, 0, 0]
  tx = gsgd_jax.asynchronous(
    optax.sgd(0.1, momentum=0.9),
    workers,
    arrivals=gsgd_jax.recorded_arrivals(order, times, unit=1.0),
    overwrite_within=0.0 if workers > 1 else None,
  )
  params = jnp.ones([2])
  state = tx.init(params)
  step = jax.jit(tx.update)
  for _ in range(workers - 1 + len(order)):
    updates, state = step(params, state, params)
    before = state
  assert np.all(updates != 0) and state.version == len(order)
  for _ in range(4):
    updates, state = step(params, state, params)
    assert not updates.any()
  for name in ('version', 'overwritten', 'applied', 'clock', 'inner_state'):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(state, name),
      getattr(before, name),
    )
  np.testing.assert_array_equal(state.cluster.tasks, before.cluster.tasks)
  assert state.count == before.count + 4


# Replays.

WORKERS, CALLS = 8, 160
PROBLEM = helpers.make_problem('quadratic', 6, 2, CALLS, seed=0)


def replay(process):
  """The trajectory, the clock and who arrived, at every call."""
  tx = gsgd_jax.asynchronous(
    helpers.INNERS['scaled'].library, WORKERS, arrivals=process
  )
  ((flat, state),) = helpers.run(tx, PROBLEM, 'scan')
  return flat, gsgd_jax.simulated_time(state), state.worker


@functools.cache
def original():
  return replay(gsgd_jax.gamma_arrivals(0.3, 0.6))


def as_it_was(rows, path):
  del path
  return [worker for worker, _ in rows], [time for _, time in rows]


def through_csv(rows, path):
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([('worker', 'time'), *rows])
  return (gsgd_jax.read_trace(path),)


def through_headless_csv(rows, path):
  path.write_text(''.join(f'{worker},{time!r}\n' for worker, time in rows))
  return (str(path),)  # recorded_arrivals reads it.


def through_json_lines(rows, path):
  lines = (json.dumps(dict(worker=w, time=t, epoch=0)) for w, t in rows)
  path.write_text('\n'.join(lines))
  return (gsgd_jax.read_trace(path),)


@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.parametrize(
  'through',
  [as_it_was, through_csv, through_headless_csv, through_json_lines],
)
def test_a_recorded_run_is_the_run(through, tmp_path):
  """Bit for bit: the trajectory, the clock and the order."""
  _, now, order = original()
  arrived = slice(WORKERS - 1, None)
  rows = list(zip(order[arrived].tolist(), now[arrived].tolist(), strict=True))
  process = gsgd_jax.recorded_arrivals(
    *through(rows, tmp_path / 'trace'), unit=1.0
  )
  assert process.length == len(rows)
  for one, other in zip(replay(process), original(), strict=True):
    np.testing.assert_array_equal(one, other)


# Files.


@pytest.fixture
def read(tmp_path):
  """Reads a file that holds so much."""

  def read(contents):
    path = tmp_path / 'trace'
    if isinstance(contents, str):
      contents = contents.encode()
    path.write_bytes(contents)
    return gsgd_jax.read_trace(path)

  return read


TIMED = ([0, 2], [0.5, 0.75])
UNTIMED = ([0, 2], None)


@pytest.mark.parametrize(
  'contents, arrivals, lines',
  [
    ('worker,time\n0,0.5\n2,0.75\n', TIMED, [2, 3]),
    ('worker,time\n0,0.5\n2,0.75', TIMED, [2, 3]),
    ('0,0.5\n2,0.75\n', TIMED, [1, 2]),
    ('0\n2\n', UNTIMED, [1, 2]),
    ('worker\n0\n2\n', UNTIMED, [2, 3]),
    ('worker,time\r\n0,0.5\r\n2,0.75\r\n', TIMED, [2, 3]),
    ('\ufeffworker,time\n0,0.5\n2,0.75\n', TIMED, [2, 3]),
    ('\ufeff0,0.5\n2,0.75\n', TIMED, [1, 2]),
    ('\n\nworker,time\n\n0,0.5\n  \n2,0.75\n\n', TIMED, [5, 7]),
    ('\r\n0,0.5\r\n\r\n2,0.75\r\n', TIMED, [2, 4]),
    (' worker , time \n 0 , 0.5 \n 2 , 7.5e-1 \n', TIMED, [2, 3]),
    ('time,loss,worker\n0.5,nan,0\n0.75,,2\n', TIMED, [2, 3]),
    ('loss,worker\n"a, b",0\n,2\n', UNTIMED, [2, 3]),
    (',worker,time\n0,0,0.5\n1,2,0.75\n', TIMED, [2, 3]),
    ('"worker","time"\n"0","0.5"\n"2","0.75"\n', TIMED, [2, 3]),
    ('{"worker":0,"time":0.5}\n{"time":75e-2,"worker":2}', TIMED, [1, 2]),
    ('\ufeff\r\n{"worker":0}\r\n\r\n{"worker":2}\r\n', UNTIMED, [2, 4]),
    ('{"worker":0,"time":null,"x":[1]}\n {"worker":2}\n', UNTIMED, [1, 2]),
    ('worker,time\n0,0\n2,1\n', ([0, 2], [0.0, 1.0]), [2, 3]),
    ('{"worker":0,"time":0}\n{"worker":2,"time":1}', ([0, 2], [0, 1]), [1, 2]),
  ],
)
def test_files(read, tmp_path, contents, arrivals, lines):
  workers, times = arrivals
  trace = read(contents)
  assert trace.workers.tolist() == workers
  assert trace.workers.dtype == np.int64
  if times is None:
    assert trace.times is None
  else:
    assert trace.times.dtype == np.float64
    assert trace.times.tolist() == times
  path = tmp_path / 'trace'
  assert trace.entries == [f'{path}, line {n}' for n in lines]


NO_JSON = 'a JSON object expected, got'
NO_WORKER = 'an object with a worker expected, got'
NO_TIME = 'time must be finite and at least 0, got'
MIXED = 'either every arrival has a time, or none'
LINES = {
  'unknown name': ('worker,time\n0,1\nx,2\n', 3, "worker .* integer, got 'x'"),
  'fraction': ('0,1\n0.5,2\n', 2, "worker must be an integer, got '0.5'"),
  'no worker': ('0,1\n,2\n', 2, "worker must be an integer, got ''"),
  'hexadecimal': ('0x1,2\n', 1, "worker must be an integer, got '0x1'"),
  'semicolons': ('0;1\n', 1, "worker must be an integer, got '0;1'"),
  'negative': ('0,1\n\n-1,2\n', 3, 'worker must be at least 0, got -1'),
  'negative in JSON': ('{"worker":-3}', 1, 'worker must be at least 0, got -3'),
  'time is a word': ('0,1\n0,late\n', 2, "time must be a number, got 'late'"),
  'no time': ('0,1\n1,\n', 2, "time must be a number, got ''"),
  'NaN': ('\n0,1\n1,nan\n', 3, f'{NO_TIME} nan'),
  'infinite': ('worker,time\n1,inf\n', 2, f'{NO_TIME} inf'),
  'too large': ('0,1e999\n', 1, f'{NO_TIME} inf'),
  'before the start': ('0,-1\n', 1, f'{NO_TIME} -1'),
  'NaN in JSON': ('{"worker":0,"time":NaN}', 1, f'{NO_TIME} nan'),
  'infinite in JSON': ('{"worker":0,"time":Infinity}', 1, f'{NO_TIME} inf'),
  'backwards': ('0,1\r\n\r\n1,3\r\n0,2.5\r\n', 4, 'from 3 to 2.5'),
  'backwards in JSON': (
    '{"worker":0,"time":2}\n{"worker":0,"time":1}',
    2,
    'time runs backwards, from 2 to 1',
  ),
  'all at 0': ('0,0\n1,0\n', 2, 'the last time must be above 0'),
  'header without worker': (
    '\nwho,time\n0,1\n',
    2,
    "a header must name a column worker, .* got 'who,time'",
  ),
  'header in capitals': (
    'Worker\n0\n',
    1,
    'a header must name a column worker',
  ),
  'too many columns': ('0,1,2\n', 1, 'worker and time expected, got 3 values'),
  'too many for the header': ('worker\n0,1\n', 2, "1 .* expected, got '0,1'"),
  'too few': ('worker,time\n0,1\n1\n', 3, "2 .* expected, got '1'"),
  'a time is missing': ('0,1\n1\n', 2, MIXED),
  'a time too many': ('0\n1,1\n', 2, MIXED),
  'a time is missing in JSON': (
    '{"worker":0,"time":1}\n{"worker":0}',
    2,
    MIXED,
  ),
  'a time too many in JSON': ('{"worker":0}\n{"worker":0,"time":1}', 2, MIXED),
  'torn JSON': ('{"worker":0}\n{"worker":', 2, f'{NO_JSON} \'{{"worker":\''),
  'two objects': ('{"worker":0}{"worker":1}', 1, NO_JSON),
  'CSV in JSON': ('{"worker":0}\n0,1', 2, f"{NO_JSON} '0,1'|{NO_WORKER} '0,1'"),
  'a number in JSON': ('{"worker":0}\n\n3', 3, f"{NO_WORKER} '3'"),
  'JSON in CSV': ('0\n{"worker":0}', 2, 'worker must be an integer, got'),
  'JSON without worker': ('{"time":1}', 1, f'{NO_WORKER} \'{{"time":1}}\''),
  'float worker': ('{"worker":1.0}', 1, 'worker must be an integer, got 1.0'),
  'bool worker': ('{"worker":true}', 1, 'worker must be an integer, got True'),
  'null worker': ('{"worker":null}', 1, 'worker must be an integer, got None'),
  'string worker': ('{"worker":"0"}', 1, "worker .* integer, got '0'"),
  'string time': ('{"worker":0,"time":"1"}', 1, "time .* number, got '1'"),
  'bool time': (
    '{"worker":0,"time":true}',
    1,
    'time must be a number, got True',
  ),
}


@pytest.mark.parametrize('contents, line, problem', LINES.values(), ids=LINES)
def test_a_line_that_cannot_be(read, tmp_path, contents, line, problem):
  complaint = complaint_of(read, contents)
  where = re.escape(f'{tmp_path / "trace"}, line {line}: ')
  assert re.match(f'{where}.*({problem})', complaint)


@pytest.mark.parametrize(
  'contents, problem',
  [
    ('', 'is empty: a trace holds a line for each arrival'),
    ('\ufeff\r\n \n', 'is empty: a trace holds a line for each arrival'),
    ('worker,time\n', 'holds a header, but no arrival'),
    ('\nworker', 'holds a header, but no arrival'),
    (b'\x89PNG\r\n\x1a\n', 'is not a text file in UTF-8'),
    ('worker\n0\n'.encode('utf-16'), 'is not a text file in UTF-8'),
  ],
)
def test_a_file_that_holds_no_trace(read, tmp_path, contents, problem):
  assert complaint_of(read, contents) == f'{tmp_path / "trace"} {problem}'


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    gsgd_jax.read_trace(tmp_path / 'nowhere')
  with pytest.raises(IsADirectoryError):
    gsgd_jax.read_trace(tmp_path)


@pytest.mark.parametrize(
  'contents, line',
  [('worker\n\n0\n\n3\n', 5), ('{"worker":0}\n{"worker":3}\n', 2)],
)
def test_a_worker_too_many_has_a_line(read, tmp_path, contents, line):
  """That there is none of that number is known where the run begins."""
  process = gsgd_jax.recorded_arrivals(read(contents))
  tx = gsgd_jax.asynchronous(SGD, 3, arrivals=process)
  assert complaint_of(tx.init, jnp.ones([1])) == (
    f'{tmp_path / "trace"}, line {line}: worker must be below the number of '
    'workers, 3, got 3'
  )
  gsgd_jax.asynchronous(SGD, 4, arrivals=process).init(jnp.ones([1]))


# Arrays.


def recorded(*args, **kwargs):
  return lambda: gsgd_jax.recorded_arrivals(*args, **kwargs)


def begun(*args, workers=2, **kwargs):
  """Some mistakes are found where the number of workers is known."""
  return lambda: gsgd_jax.asynchronous(
    SGD, workers, arrivals=gsgd_jax.recorded_arrivals(*args, **kwargs)
  ).init(jnp.ones([1]))


TRACE = gsgd_jax.Trace(np.array([0, 1]), np.array([1.0, 2.0]), ['a', 'b'])
KIND = '^a trace must be a sequence of ints and one of numbers, got workers='
ARRAYS = {
  'empty': (recorded([]), '^a trace must hold at least one arrival, got none$'),
  'empty array': (recorded(np.zeros([0], int)), 'at least one arrival'),
  'negative worker': (
    recorded([0, -1]),
    '^entry 1 of the trace: worker must be at least 0, got -1$',
  ),
  'unknown worker': (
    begun([0, 1, 2]),
    '^entry 2 of the trace: worker must be below the number of workers, 2, '
    'got 2$',
  ),
  'float workers': (recorded([0.0, 1.0]), KIND),
  'bool workers': (recorded([True, False]), KIND),
  'words': (recorded(['a']), KIND),
  'None': (recorded(None), KIND),
  'one worker': (recorded(0), KIND),
  'a table': (recorded([[0, 1]]), KIND),
  'ragged': (recorded([[0], [0, 1]]), KIND),
  'a huge worker': (recorded([10**30]), KIND),
  'bytes': (recorded(b'01'), KIND),
  'a generator': (recorded(i for i in range(2)), KIND),
  'a time that is a word': (recorded([0], ['late']), f'{KIND}.*late'),
  'one time': (recorded([0], 1.0), f'{KIND}.*times=.*1'),
  'a table of times': (recorded([0], [[1.0]]), f'{KIND}.*times='),
  'ragged times': (recorded([0], [[1.0], [1.0, 2.0]]), f'{KIND}.*times='),
  'too few times': (
    recorded([0, 1], [1.0]),
    '^a trace must hold a time for each arrival, got 1 for 2$',
  ),
  'too many times': (recorded([0], [1.0, 2.0]), 'got 2 for 1$'),
  'NaN': (
    recorded([0, 1], [1.0, np.nan]),
    f'^entry 1 of the trace: {NO_TIME} nan$',
  ),
  'infinite': (recorded([0], [np.inf]), f'{NO_TIME} inf$'),
  'before the start': (recorded([0], [-1.0]), f'{NO_TIME} -1$'),
  'backwards': (
    recorded([0, 1], [2.0, 1.5]),
    '^entry 1 of the trace: time runs backwards, from 2 to 1.5$',
  ),
  'all at 0': (
    recorded([0, 1], [0.0, 0.0]),
    '^entry 1 of the trace: the last time must be above 0$',
  ),
  'times given twice': (
    recorded(TRACE, [1.0, 2.0]),
    '^times belong to the trace, got both$',
  ),
  'zero unit': (
    recorded([0], [1.0], unit=0.0),
    '^unit must be positive, got 0$',
  ),
  'beyond the clock': (
    begun([0, 0], [1.0, 3e9], unit=1.0),
    r'^entry 1 of the trace: the clock reaches 2\^31 units, got 3e\+09$',
  ),
  'a trace that runs backwards': (
    recorded(TRACE._replace(times=np.array([2.0, 1.0]))),
    '^b: time runs backwards, from 2 to 1$',
  ),
  'a trace with a negative worker': (
    recorded(TRACE._replace(workers=np.array([-2, 0]))),
    '^a: worker must be at least 0, got -2$',
  ),
  'a trace with an unknown worker': (
    begun(TRACE, workers=1),
    '^b: worker must be below the number of workers, 1, got 1$',
  ),
}


@pytest.mark.parametrize('call, message', ARRAYS.values(), ids=ARRAYS)
def test_arrays(call, message):
  assert re.search(message, complaint_of(call))


@pytest.mark.parametrize(
  'workers',
  [(0, 1, 0), range(2), np.array([1, 0], np.uint8), jnp.array([0, 1, 1])],
)
def test_any_sequence_of_ints_will_do(workers):
  process = gsgd_jax.recorded_arrivals(workers)
  assert process.length == len(workers)
  _, order = clocks_and_workers(process, 2, len(workers))
  assert order == list(map(int, workers))


@pytest.mark.parametrize(
  'contents',
  [
    pytest.param(contents, id=name)
    for name, contents in {
      'a huge worker': '9' * 20 + ',1\n',
      'a huge worker in JSON': '{"worker":' + '9' * 20 + '}',
      'a huge time in JSON': '{"worker":0,"time":1' + '0' * 400 + '}',
      'a huge cell': '0,' + '1' * 140_000,
    }.items()
  ],
)
def test_files_that_overflow(read, contents):
  assert 'line 1' in complaint_of(read, contents)


@pytest.mark.parametrize(
  'call',
  [
    recorded(TRACE._replace(workers=np.array([0.5, 1.0]))),
    recorded(TRACE._replace(workers=np.array([[0, 1], [1, 0]]))),
    recorded(TRACE._replace(entries=['a'])),
  ],
)
def test_a_trace_is_checked_like_arrays(call):
  assert re.search(r'a trace must ', complaint_of(call))


@pytest.mark.parametrize('workers', [np.arange(64.0), np.zeros([30, 2], int)])
def test_a_complaint_of_many_workers_is_one_line(workers):
  assert re.search(KIND, complaint_of(recorded(workers)))


@pytest.mark.parametrize('time', ['nan', 'inf'])
def test_a_first_time_that_is_not_finite(read, time):
  assert NO_TIME in complaint_of(read, f'0,{time}\n')
