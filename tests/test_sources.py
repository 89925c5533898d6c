"""Raw examples: bundled sets, files of either format, OpenML's cache."""

import contextlib
import http.client
import os
import pathlib
import re
import socket
import types
import urllib.error

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sklearn.datasets import _openml

from gsgd_jax import sources
from tests import openml_cache

SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'data'


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  """An empty cache of OpenML's sets, and nothing read before."""
  folder = tmp_path / 'scikit_learn_data'
  monkeypatch.setenv('SCIKIT_LEARN_DATA', str(folder))
  sources.read.cache_clear()
  yield folder
  sources.read.cache_clear()


@pytest.fixture(autouse=True)
def network(monkeypatch):
  """No network: what it fails with, and the time-outs of all attempts."""
  state = types.SimpleNamespace(
    error=urllib.error.URLError('no route to host'), timeouts=[]
  )

  def urlopen(*args, **kwargs):
    state.timeouts.append(socket.getdefaulttimeout())
    raise state.error

  monkeypatch.setattr(_openml, 'urlopen', urlopen)
  no_time = types.SimpleNamespace(sleep=lambda seconds: None)
  monkeypatch.setattr(_openml, 'time', no_time)
  return state


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'examples.data'


@pytest.fixture
def read(path):
  """Reads a file of such a text."""

  def read(text, target=None):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    sources.read.cache_clear()
    return sources.read(str(path), target)

  return read


def fails(*args, match, error=ValueError):
  """`sources.read` raises one sentence that begins as `match` does."""
  with pytest.raises(error) as caught:
    sources.read(*args)
  assert str(caught.value).startswith(match)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def agree(source, inputs, labels, classes):
  """Exactly these examples, in the types that are promised."""
  assert source.classes == tuple(classes)
  for actual, expected in (
    (source.inputs, np.array(inputs, np.float64)),
    (source.labels, np.array(labels, np.int32)),
  ):
    np.testing.assert_array_equal(actual, expected, strict=True)


# Bundled sets.


@pytest.mark.parametrize(
  'name, features, examples',
  [
    ('breast_cancer', 30, {'malignant': 212, 'benign': 357}),
    (
      'digits',
      64,
      dict(
        zip(
          '0123456789',
          (178, 182, 177, 183, 181, 182, 181, 179, 174, 180),
          strict=True,
        )
      ),
    ),
    ('iris', 4, {'setosa': 50, 'versicolor': 50, 'virginica': 50}),
    ('wine', 13, {'class_0': 59, 'class_1': 71, 'class_2': 48}),
  ],
)
def test_bundled(name, features, examples):
  source = sources.read(name)
  assert source.inputs.shape == (sum(examples.values()), features)
  assert source.inputs.dtype == np.float64 and source.labels.dtype == np.int32
  assert np.isfinite(source.inputs).all()
  counts = np.bincount(source.labels).tolist()
  assert dict(zip(source.classes, counts, strict=True)) == examples
  assert all(type(c) is str for c in source.classes)


def test_the_whole_of_a_bundled_set_in_its_units():
  iris = sources.read('iris')
  np.testing.assert_array_equal(iris.inputs[0], [5.1, 3.5, 1.4, 0.2])
  np.testing.assert_array_equal(iris.inputs[149], [5.9, 3.0, 5.1, 1.8])


@pytest.mark.parametrize(
  'name, ending',
  [
    ('iriss', "got 'iriss'; did you mean iris?"),
    ('breast-cancer', "got 'breast-cancer'; did you mean breast_cancer?"),
    ('mnist', "got 'mnist'; did you mean tfds:mnist?"),
    ('CIFAR-10', "got 'CIFAR-10'; did you mean tfds:cifar10?"),
    ('', "got ''"),
  ],
)
def test_unknown_set(name, ending):
  message = fails(
    name,
    match='dataset must be one of breast_cancer, digits, iris, wine, '
    'openml:NAME, tfds:NAME or a file that exists, got ',
  )
  assert message.endswith(ending)


def test_a_bundled_set_takes_no_target():
  fails('wine', 'class_0', match='wine has its classes already')


# The author's format.


@pytest.mark.parametrize(
  'text, classes, labels',
  [
    ('3\n1,2,-1\n3,4.5,1\n', ('-1', '1'), [0, 1]),
    ('3\n\n1,2,1\n\n\n3,4.5,-1', ('-1', '1'), [1, 0]),
    ('3\r\n\r\n1,2,-1\r\n3,4.5,1\r\n\r\n', ('-1', '1'), [0, 1]),
    (' 3 \n\t\n 1 , 2\t,-1 \n3,4.5, 1\n', ('-1', '1'), [0, 1]),
    ('\ufeff3\n1,2,-1\n3,4.5,1\n', ('-1', '1'), [0, 1]),
    ('3\n1,2,10\n3,4.5,9.0\n', ('9', '10'), [1, 0]),
    ('3\n+1.,2e0,0\n003,45E-1,7\n', ('0', '7'), [0, 1]),
  ],
  ids=['plain', 'blank', 'CRLF', 'spaces', 'BOM', 'numbers', 'notations'],
)
def test_the_authors_format(read, text, classes, labels):
  agree(read(text), [[1, 2], [3, 4.5]], labels, classes)


def test_the_authors_format_with_three_classes(read):
  labels = [2, 0, 1, 1, 0, 2]
  text = '2\n' + ''.join(f'{i / 8},{k}\n' for i, k in enumerate(labels))
  agree(read(text), np.arange(6)[:, None] / 8, labels, '012')


@pytest.mark.parametrize(
  'text, message',
  [
    ('', ' is empty'),
    (' \r\n\n', ' is empty'),
    ('\ufeff\n', ' is empty'),
    (b'\x89PNG\r\n\x1a\n', ' is not a text file in UTF-8'),
    ('3\n1,2,1\n'.encode('utf-16'), ' is not a text file in UTF-8'),
    (
      '\n\nmany\n1,0\n2,1\n',
      ", line 3: the number of columns should stand here, got 'many'",
    ),
    (
      '2.5\n1,0\n2,1\n',
      ", line 1: the number of columns should stand here, got '2.5'",
    ),
    (
      '1,0\n2,1\n',
      ", line 1: the number of columns should stand here, got '1,0'",
    ),
    (
      '\n1\n0\n1\n',
      ', line 2: at least 2 columns are needed, a feature and the class, got 1',
    ),
    ('-2\n1,0\n2,1\n', ', line 1: at least 2 columns are needed'),
    ('3\n', ' holds no examples'),
    ('3\n\n \n', ' holds no examples'),
    (
      '3\n1,2,0\n\n1,2\n1\n',
      ', line 4: 3 comma-separated values should stand here, got 2',
    ),
    (
      '3\n1,2,0\n1,2,3,1\n',
      ', line 3: 3 comma-separated values should stand here, got 4',
    ),
    ('3\n1,2,0,\n', ', line 2: 3 comma-separated values should stand here'),
    ('3\n1 2 0\n', ', line 2: 3 comma-separated values should stand here'),
    (
      '3\r\n\r\n1,2,0\r\n1,x,y\r\nz,2,1\r\n',
      ", line 4, column 2: a finite number should stand here, got 'x'",
    ),
    (
      '3\n1,2,benign\n1,2,malignant\n',
      ", line 2, column 3: a finite number should stand here, got 'benign'",
    ),
    *(
      (
        f'3\n1,2,0\n{cell},2,1\n',
        f', line 3, column 1: a finite number should stand here, got {cell!r}',
      )
      for cell in ('nan', 'NaN', 'inf', '-inf', '1e999', '?', '', '0x10')
    ),
    (
      f'2\n1,0\n{61 * "x"},1\n',
      ', line 3, column 1: a finite number should stand here, got '
      f"'{57 * 'x'}...'",
    ),
    (
      '3\n1,2,0\n\n1,2,0.5\n',
      ', line 4: the class, a whole number, should stand last, got 0.5',
    ),
    ('3\n1,2,nan\n', ', line 2, column 3: a finite number should stand here'),
    ('3\n1,2,1\n3,4,1\n', ' holds one class only (1)'),
    (
      '2\n1,0\n2,1\n3,2\n4,0\n5,1\n',
      ' holds 3 different classes in 5 examples: is the target a number',
    ),
  ],
)
def test_errors_of_the_authors_format(read, path, text, message):
  path.touch()
  with pytest.raises(ValueError) as error:
    read(text)
  assert str(error.value).startswith(f'{path}{message}')
  assert '\n' not in str(error.value)


def test_a_header_without_target_points_to_it(read, path):
  with pytest.raises(ValueError) as error:
    read('weight,size,kind\n1,2,cat\n2,3,dog\n')
  assert str(error.value) == (
    f'{path}, line 1: the number of columns should stand here, got '
    "'weight,size,kind'; a CSV file with a header needs "
    '--config.target=COLUMN, the column of the classes; text to learn as '
    'characters needs --config.model=gpt'
  )


@pytest.mark.parametrize('separator', '\x0b\x0c\x1c\x85\u2028')
def test_only_line_ends_count_as_lines(read, separator):
  with pytest.raises(ValueError, match='line 3, column 1: '):
    read(f'2\n1,0{separator}\nx,1\n')


@pytest.mark.parametrize('label', ['1e30', str(2**53 + 1)])
def test_a_class_that_no_float_tells_apart(read, label):
  with pytest.raises(ValueError, match='line 3: the class'):
    read(f'2\n1,0\n2,{label}\n3,{2**53}\n4,0\n5,0\n6,0\n')


# CSV.

ROWS = [[1, 2.5], [3, -4e-3], [5, 6], [7, 8]]


@pytest.mark.parametrize(
  'text, classes, labels',
  [
    (
      'kind,a,b\ncat,1,2.5\ndog,3,-4e-3\ndog,5,6\ncat,7,8\n',
      ('cat', 'dog'),
      [0, 1, 1, 0],
    ),
    ('a,kind,b\n1,z,2.5\n3,y,-.004\n5,y,6\n7,z,8', 'yz', [1, 0, 0, 1]),
    ('a,b,kind\n1,2.5,1\n3,-4e-3,0\n5,6,0\n7,8,1\n', '01', [1, 0, 0, 1]),
    (
      'a,b,kind\n1,2.5,1.5\n3,-4e-3,?\n5,6,?\n7,8,1.5\n',
      ('1.5', '?'),
      [0, 1, 1, 0],
    ),
    (
      '"a","b, in cm",kind\n"1","2.5","x, y"\n3,-4e-3,"""z"""\n'
      '"5",6,"""z"""\n7," 8 ","x, y"\n',
      ('"z"', 'x, y'),
      [1, 0, 0, 1],
    ),
    (
      ' a , b , kind \n 1 , 2.5 , x \n3, -4e-3,y\n5,6,y \n7,8,\tx\n',
      'xy',
      [0, 1, 1, 0],
    ),
    (
      '\n\na,b,kind\n\n1,2.5,x\n,,\n3,-4e-3,y\n \n5,6,y\n7,8,x\n\n\n',
      'xy',
      [0, 1, 1, 0],
    ),
    (
      '\ufeffkind,a,b\r\n\r\nx,1,2.5\r\ny,3,-4e-3\r\ny,5,6\r\nx,7,8\r\n',
      'xy',
      [0, 1, 1, 0],
    ),
    (
      'kind,a,b\n"x\ny",1,2.5\nz,3,-4e-3\nz,5,6\n"x\ny",7,8\n',
      ('x\ny', 'z'),
      [0, 1, 1, 0],
    ),
  ],
  ids=[
    'first',
    'middle',
    'last',
    'numbers',
    'quoted',
    'spaces',
    'blank',
    'CRLF and BOM',
    'lines in a cell',
  ],
)
def test_csv(read, text, classes, labels):
  agree(read(text, 'kind'), ROWS, labels, classes)


@pytest.mark.parametrize(
  'text, message',
  [
    ('', ' is empty'),
    (b'kind,a\n\xff,1\n', ' is not a text file in UTF-8'),
    (
      'a,Kind,b\n1,x,2\n3,y,4\n',
      " has no column kind; its columns are 'a, Kind, b'; did you mean Kind?",
    ),
    (
      '3\n\n1,2,0\n3,4,1\n',
      " has no column kind; its columns are '3'",
    ),
    ('a,b,a,kind\n1,2,3,x\n', ' has more than one column a'),
    ('kind,a, kind\nx,1,y\n', ' has more than one column kind'),
    ('a,kind\n', ' holds no examples'),
    ('a,kind\n\n,\n', ' holds no examples'),
    (
      'a,kind\n1,x\n\n2\n',
      ', line 4: 2 comma-separated values should stand here, got 1',
    ),
    (
      'a,kind\n1,x\n2,y,\n',
      ', line 3: 2 comma-separated values should stand here, got 3',
    ),
    ('a,kind\n1,x\n2, \n3,y\n', ', line 3: the class is missing'),
    (
      'a,kind,b,c\r\n1,x,2,3\r\n\r\n"4",y,5,six\r\nx,y,z,1\r\n',
      ", line 4, column c: a finite number should stand here, got 'six'",
    ),
    (
      'kind,a\n"x\ny",1\nz,one\n',
      ", line 4, column a: a finite number should stand here, got 'one'",
    ),
    *(
      (
        f'kind,a,b\nx,1,2\ny,3,{cell}\n',
        f', line 3, column b: a finite number should stand here, got {cell!r}',
      )
      for cell in ('nan', 'inf', '-Infinity', '1e999', '?', '', ' ', '1;2')
    ),
    ('a,kind\n1,x\n"2"3,y\n', ', line 3: '),
    ('a,kind\n1,x\n2,"y\n', ', line 3: '),
    ('kind\nx\ny\n', ' has no features, only classes'),
    ('a,kind\n1,x\n2,x\n', ' holds one class only (x)'),
    (
      'a,kind\n' + ''.join(f'{i},{i / 7}\n' for i in range(20)),
      ' holds 20 different classes in 20 examples: is the target a number to '
      'be predicted rather than a class?',
    ),
  ],
)
def test_errors_of_csv(read, path, text, message):
  with pytest.raises(ValueError) as error:
    read(text, 'kind')
  assert str(error.value).startswith(f'{path}{message}')
  assert '\n' not in str(error.value)


def test_no_column_is_proposed_where_none_is_near(read):
  with pytest.raises(ValueError, match=r"its columns are 'a, b'$"):
    read('a,b\n1,x\n2,y\n', 'kind')


def test_the_target_decides_which_column_is_no_feature(read):
  text = 'a,b\n1,1\n2,1\n1,2\n2,2\n'
  agree(read(text, 'a'), [[1], [1], [2], [2]], [0, 1, 0, 1], '12')
  agree(read(text, 'b'), [[1], [2], [1], [2]], [0, 0, 1, 1], '12')


def test_as_many_classes_as_half_the_examples(read):
  assert read('a,kind\n1,x\n2,y\n', 'kind').classes == ('x', 'y')
  text = 'a,kind\n1,x\n2,y\n3,x\n4,y\n5,z\n'
  with pytest.raises(ValueError, match='3 different classes in 5 examples'):
    read(text, 'kind')
  assert read(text + '6,z\n', 'kind').classes == ('x', 'y', 'z')


@pytest.mark.parametrize('text', [',\n,,\n', '""\n'])
def test_a_csv_file_of_empty_cells(read, text):
  with pytest.raises(ValueError, match=r'is empty|has no column kind'):
    read(text, 'kind')


@pytest.mark.parametrize('separator', '\x0b\x0c\x1c\x85\u2028')
def test_only_line_ends_end_rows(read, separator):
  text = f'kind,a\nx{separator}y,1\nz,2\n'
  assert read(text, 'kind').classes == (f'x{separator}y', 'z')


# Paths.


def test_missing_files_and_folders(tmp_path):
  missing = str(tmp_path / 'no.csv')
  for name in (missing, 'no.csv', os.path.join('no', 'iris')):
    for target in (None, 'kind'):
      with pytest.raises(FileNotFoundError, match=re.escape(repr(name))):
        sources.read(name, target)
  with pytest.raises(OSError, match=re.escape(repr(str(tmp_path)))):
    sources.read(str(tmp_path))


def test_a_file_beside_the_program(monkeypatch, read, path):
  expected = read('2\n1,0\n2,1\n')
  path.rename(path.with_name('pets'))
  monkeypatch.chdir(path.parent)
  agree(sources.read('pets'), *expected)


# Files, against cells that were made without the reader.

# Without shrinking, which takes minutes here; the last file is left behind.
many = settings(max_examples=100, phases=[Phase.generate])

cells = st.one_of(
  st.integers(-(10**6), 10**6).map(str),
  st.floats(allow_nan=False, allow_infinity=False).map(repr),
  st.floats(-1e6, 1e6).map('{:.3f}'.format),
  st.sampled_from(['-0', '+3', '.5', '7.', '1E-5', '-1.5e+2', '0003']),
)
line_ends = st.sampled_from(['\n', '\r\n'])
pads = st.sampled_from(['', '', ' ', '\t '])


def tables(classes):
  """(cells, labels): no more classes than half the examples."""

  def with_labels(classes):
    more = st.lists(st.sampled_from(classes), max_size=4)
    labels = more.map(lambda more: [*classes, *classes, *more])
    return labels.flatmap(st.permutations).flatmap(with_cells)

  def with_cells(labels):
    rows = lambda width: st.lists(
      st.lists(cells, min_size=width, max_size=width),
      min_size=len(labels),
      max_size=len(labels),
    )
    return st.tuples(st.integers(1, 4).flatmap(rows), st.just(labels))

  return classes.flatmap(with_labels)


def text_of(data, rows):
  """The rows as text, with blank lines anywhere."""
  end = data.draw(line_ends)
  lines = []
  for row in rows:
    lines += data.draw(st.lists(pads, max_size=1))
    lines.append(','.join(row))
  text = end.join(lines) + data.draw(st.sampled_from(['', end]))
  return data.draw(st.sampled_from(['', '\ufeff'])) + text


def padded(data, cell):
  return data.draw(pads) + cell + data.draw(pads)


@many
@given(
  table=tables(
    st.lists(st.integers(-30, 30), min_size=2, max_size=4, unique=True)
  ),
  data=st.data(),
)
def test_random_files_in_the_authors_format(read, table, data):
  inputs, labels = table
  rows = [
    [padded(data, cell) for cell in (*row, str(label))]
    for row, label in zip(inputs, labels, strict=True)
  ]
  text = text_of(data, [[str(len(inputs[0]) + 1)], *rows])
  classes = sorted(set(labels))
  agree(
    read(text),
    [[float(cell) for cell in row] for row in inputs],
    [classes.index(label) for label in labels],
    map(str, classes),
  )


names = st.text('aB1-."\' ,é\n', min_size=1).filter(str.strip)


def quoted(data, cell):
  """The cell as CSV holds it, in quotes where it needs them, or anyway."""
  if set(cell) & set(',"\n') or data.draw(st.booleans()):
    return '"' + cell.replace('"', '""') + '"'
  return padded(data, cell)


@many
@given(
  table=tables(
    st.lists(names, min_size=2, max_size=4, unique_by=str.strip),
  ),
  data=st.data(),
)
def test_random_csv_files(read, table, data):
  inputs, labels = table
  width = len(inputs[0])
  header = data.draw(
    st.lists(names, min_size=width + 1, max_size=width + 1, unique_by=str.strip)
  )
  column = data.draw(st.integers(0, width))
  rows = [
    [*row[:column], label, *row[column:]]
    for row, label in zip(inputs, labels, strict=True)
  ]
  rows = [[quoted(data, cell) for cell in row] for row in [header, *rows]]
  labels = [label.strip() for label in labels]
  classes = sorted(set(labels))
  agree(
    read(text_of(data, rows), header[column].strip()),
    [[float(cell) for cell in row] for row in inputs],
    [classes.index(label) for label in labels],
    classes,
  )


# The author's own files.


@pytest.mark.skipif(not SHARED.is_dir(), reason='the files are not here')
@pytest.mark.parametrize(
  'name, features, counts',
  [
    ('cancer', 9, [172, 285]),
    ('haberman', 3, [81, 225]),
    ('liver_disorder', 6, [145, 200]),
  ],
)
def test_the_authors_files(name, features, counts):
  source = sources.read(str(SHARED / f'{name}.data'))
  assert source.inputs.shape == (sum(counts), features)
  assert source.classes == ('-1', '1')
  assert sorted(np.bincount(source.labels).tolist()) == counts


# OpenML.

PETS = """@relation pets
@attribute weight numeric
@attribute size {small,large}
@attribute kind {cat,dog,'guinea pig'}
@data
3.5,small,cat
20,large,dog
4.25,small,cat
0.9,small,'guinea pig'
1,small,'guinea pig'
30,large,dog
"""
COLUMNS = {'weight': 'numeric', 'size': 'nominal', 'kind': 'nominal'}
WEIGHTS = [3.5, 20, 4.25, 0.9, 1, 30]
SIZES = [0, 1, 0, 0, 0, 1]  # In the order in which the file lists them.
KINDS = [0, 1, 0, 2, 2, 1]


@pytest.mark.parametrize('name', ['openml:pets', 'openml:Pets:1'])
def test_openml(cache, network, name):
  openml_cache.write(cache, 'pets', PETS, COLUMNS, 'kind')
  agree(
    sources.read(name),
    np.column_stack([WEIGHTS, SIZES]),
    KINDS,
    ('cat', 'dog', 'guinea pig'),
  )
  assert not network.timeouts


def test_versions_of_openml(cache):
  openml_cache.write(cache, 'pets', PETS, COLUMNS, 'kind')
  later = PETS.replace('\n30,', '\n31,')
  openml_cache.write(
    cache, 'pets', later, COLUMNS, 'kind', version=4, data_id=99
  )
  for version, last in (('', 30), (':1', 30), (':4', 31)):
    assert sources.read(f'openml:pets{version}').inputs[5, 0] == last


def test_target_of_openml(cache):
  openml_cache.write(cache, 'pets', PETS, COLUMNS, 'kind')
  agree(
    sources.read('openml:pets', 'size'),
    np.column_stack([WEIGHTS, KINDS]),
    1 - np.array(SIZES),
    ('large', 'small'),
  )
  message = fails('openml:pets', 'sizes', match='openml:pets cannot be read: ')
  assert 'sizes' in message
  fails(
    'openml:pets',
    'weight',
    match='openml:pets holds 6 different classes in 6 examples',
  )


def test_no_default_target_of_openml(cache):
  openml_cache.write(cache, 'pets', PETS, COLUMNS, None)
  message = fails('openml:pets', match='openml:pets has no default target')
  assert message.endswith('--config.target=COLUMN')
  assert len(sources.read('openml:pets', 'kind').classes) == 3


@pytest.mark.parametrize(
  'row, column', [('?,small,cat', 'weight'), ('4.25,?,cat', 'size')]
)
def test_missing_value_of_openml(cache, row, column):
  text = PETS.replace('4.25,small,cat', row).replace('30,large', '?,?')
  openml_cache.write(cache, 'pets', text, COLUMNS, 'kind')
  fails(
    'openml:pets',
    match=f'openml:pets, example 3, column {column}: a finite number should '
    'stand here, got a missing value',
  )


@pytest.mark.parametrize('error', [urllib.error.URLError('no'), TimeoutError()])
def test_openml_needs_the_network_once(cache, network, error):
  network.error = error
  message = fails('openml:pets', match='openml:pets is not in the cache')
  assert 'a network connection is needed' in message and str(cache) in message
  fails('openml:pets:1', match='openml:pets:1 is not in the cache')
  # A silent server is not waited for without end, and only here.
  assert network.timeouts and all(0 < t <= 60 for t in network.timeouts)
  assert socket.getdefaulttimeout() is None
  openml_cache.write(cache, 'pets', PETS, COLUMNS, 'kind')
  assert len(sources.read('openml:pets').labels) == 6


@pytest.mark.parametrize(
  'name, reason',
  [
    ('openml:pets', 'No active dataset pets found'),
    ('openml:pets:3', 'Dataset pets with version 3 not found'),
  ],
)
def test_a_set_that_openml_does_not_have(network, name, reason):
  error = urllib.error.HTTPError('', 412, 'No results', {}, None)
  with contextlib.closing(error):
    network.error = error
    fails(name, match=f'{name} cannot be read: {reason}')


@pytest.mark.parametrize(
  'name', ['openml:', 'openml::1', 'openml:a:b', 'openml:a:1:2', 'openml:a:-1']
)
def test_malformed_name_of_openml(network, name):
  fails(
    name,
    match=f'dataset must be openml:NAME or openml:NAME:VERSION, got {name!r}',
  )
  assert not network.timeouts


def test_a_sparse_set_of_openml(cache):
  text = PETS.split('@data')[0] + '@data\n'
  text += '{0 1.5, 2 dog}\n{1 large, 2 cat}\n' * 2
  openml_cache.write(cache, 'pets', text, COLUMNS, 'kind')
  try:
    assert sources.read('openml:pets').inputs.shape == (4, 2)
  except ValueError as error:
    assert str(error).startswith('openml:pets ')


def test_a_set_of_openml_with_two_targets(cache):
  text = PETS.replace("{cat,dog,'guinea pig'}", '{small,large}')
  text = text.split('@data')[0] + '@data\n'
  text += '1,small,large\n2,large,small\n' * 4
  openml_cache.write(cache, 'pets', text, COLUMNS, ('size', 'kind'))
  fails('openml:pets', match='openml:pets has more than one default target')


@pytest.mark.parametrize(
  'error', [http.client.IncompleteRead(b''), http.client.InvalidURL('a b')]
)
def test_a_transfer_that_fails(network, error):
  network.error = error
  fails('openml:a b', match='openml:a b ')
