"""Where examples come from: scikit-learn's sets, files, OpenML.

`read` gives raw examples, unscaled and unsplit; `gsgd_jax.data` makes data
sets of them. A file is in one of two formats, both checked line by line:

* the gSGD author's: the number of columns, then one comma-separated row an
  example, its class, a whole number, last; blank lines are skipped;
* CSV with a header, when `target` names the column that holds the classes, of
  any kind; all other columns hold numbers.
"""

import contextlib
import csv
import functools
import http.client
import io
import os
import pathlib
import socket
import sys
import urllib.error
import warnings
from typing import NamedTuple

import numpy as np
import scipy.sparse

from gsgd_jax import _prepared, settings

BUNDLED = {
  'breast_cancer': 'load_breast_cancer',
  'digits': 'load_digits',
  'iris': 'load_iris',
  'wine': 'load_wine',
}
# Those whose features are pixels: height, width, channels.
IMAGES = {'digits': (8, 8, 1)}
_OPENML = 'openml:'
_TIMEOUT = 30  # Seconds that a silent server is waited for.
_WHITE = '\t\n\v\f\r'
_MOST = 2**53  # Whole numbers beyond it are not told apart.


class Source(NamedTuple):
  """Raw examples."""

  inputs: np.ndarray  # shape=(n, features), float64, finite.
  labels: np.ndarray  # shape=(n,), int32: positions in `classes`.
  classes: tuple[str, ...]  # At least two, each with examples.


@functools.cache
def read(dataset: str, target: str | None = None) -> Source:
  """Reads a data set's raw examples.

  Args:
    dataset: ``'digits'``, ``'breast_cancer'``, ``'iris'`` or ``'wine'``, as
      scikit-learn bundles them; the path of a file; or ``'openml:NAME'`` or
      ``'openml:NAME:VERSION'``, which scikit-learn fetches once and then keeps
      in its cache (``SCIKIT_LEARN_DATA``, else ``~/scikit_learn_data``).
    target: The column that holds the classes: a CSV file's, which needs one, or
      an OpenML set's, which has a default. None otherwise.

  Returns:
    A ``Source``; a later call returns the same one, without reading again.
    Nominal features of OpenML sets are numbered in the order of their values.

  Raises:
    ValueError: The name is unknown; the file is malformed (the line is named),
      holds something that is no finite number, or fewer than two classes; the
      set cannot be fetched.
    OSError: The file cannot be read.

  Examples:
    >>> from gsgd_jax import sources
    >>> iris = sources.read('iris')
    >>> print(iris.inputs.shape, *iris.classes)
    (150, 4) setosa versicolor virginica
  """
  if dataset.startswith(_OPENML):
    source = _openml(dataset, target)
  elif dataset in BUNDLED:
    if target is not None:
      raise ValueError(f'{dataset} has its classes already; leave out target')
    source = _bundled(dataset)
  elif _is_path(dataset):
    source = _file(os.path.expanduser(dataset), target)
  else:
    raise ValueError(
      f'dataset must be one of {", ".join(BUNDLED)}, openml:NAME, tfds:NAME '
      f'or a file that exists, got {dataset!r}'
      + (settings.nearest(dataset, BUNDLED) or _prepared.nearest(dataset))
    )
  _check(dataset, source)
  return source


@functools.cache
def read_text(path: str) -> tuple[np.ndarray, tuple[str, ...]]:
  """Reads a text file as characters.

  Args:
    path: A text file in UTF-8.

  Returns:
    The characters as int32 tokens, shape ``(n,)``: positions in the sorted
    characters of the file, which are the second value. Line ends of all kinds
    are newlines.

  Raises:
    ValueError: The file is empty, no text, or in another encoding.
    OSError: It cannot be read.

  Examples:
    >>> import tempfile
    >>> from gsgd_jax import sources
    >>> with tempfile.NamedTemporaryFile('w') as file:
    ...   _ = file.write('to be or not')
    ...   file.flush()
    ...   tokens, characters = sources.read_text(file.name)
    >>> print(''.join(characters), tokens[:5])
     benort [6 4 0 1 2]
  """
  if path.startswith((_OPENML, 'tfds:')) or path in BUNDLED:
    raise ValueError(
      f'gpt learns the characters of a text file, and {path} is none; give '
      '--config.dataset=FILE'
    )
  path = os.path.expanduser(path)
  text = _text_of(path)
  codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  # A table of all characters there may be: quicker than to sort the text.
  table = np.zeros(sys.maxunicode + 1, np.int32)
  table[codes] = 1
  numbers = np.flatnonzero(table)
  table[numbers] = np.arange(len(numbers))
  characters = tuple(map(chr, numbers))
  # What no text holds: NUL, and control characters but for white space.
  wrong = next((c for c in characters if c < ' ' and c not in _WHITE), None)
  if wrong is not None:
    raise ValueError(
      f'{path} is not a text file: it holds the control character {wrong!r}'
    )
  if len(characters) < 2:
    raise ValueError(f'{path} holds one character only, {text[0]!r}')
  return table[codes], characters


def _text_of(path):
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8-sig')
  except UnicodeDecodeError:
    raise ValueError(
      f'{path} is not a text file in UTF-8; unpack or convert it first'
    ) from None
  if not text.strip():
    raise ValueError(f'{path} is empty')
  return text


def _is_path(dataset):
  return os.path.exists(dataset) or any(c in dataset for c in ('/', '\\', '.'))


def _check(dataset, source):
  if not source.inputs.shape[1]:
    raise ValueError(f'{dataset} has no features, only classes')
  if len(source.classes) < 2:
    raise ValueError(
      f'{dataset} holds one class only ({source.classes[0]}); classification '
      'needs two or more'
    )
  if len(source.classes) > max(2, len(source.labels) // 2):
    raise ValueError(
      f'{dataset} holds {len(source.classes)} different classes in '
      f'{len(source.labels)} examples: is the target a number to be '
      'predicted rather than a class?'
    )


def _bundled(dataset):
  import sklearn.datasets

  bunch = getattr(sklearn.datasets, BUNDLED[dataset])()
  return Source(
    bunch.data.astype(np.float64),
    bunch.target.astype(np.int32),
    tuple(str(name) for name in bunch.target_names),
  )


def _file(path, target):
  text = _text_of(path)
  if target is None:
    return _author_format(path, text.split('\n'))
  return _csv(path, text, target)


def _author_format(path, lines):
  rows = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
  number, head = rows[0]
  try:
    columns = int(head)
  except ValueError:
    raise ValueError(
      f'{path}, line {number}: the number of columns should stand here, got '
      f'{_short(head)}; a CSV file with a header needs '
      '--config.target=COLUMN, the column of the classes; text to learn as '
      'characters needs --config.model=gpt'
    ) from None
  if columns < 2:
    raise ValueError(
      f'{path}, line {number}: at least 2 columns are needed, a feature and '
      f'the class, got {columns}'
    )
  cells = [(i, line.split(',')) for i, line in rows[1:]]
  _same_width(path, cells, columns)
  names = [f'column {i + 1}' for i in range(columns)]
  values = _numbers(path, cells, names)
  classes = values[:, -1]
  for (i, _), label in zip(cells, classes, strict=True):
    if label != round(label) or abs(label) >= _MOST:
      raise ValueError(
        f'{path}, line {i}: the class, a whole number, should stand last, got '
        f'{label:g}'
      )
  return _source(values[:, :-1], classes.astype(np.int64))


def _csv(path, text, target):
  reader = csv.reader(io.StringIO(text), strict=True)
  try:
    rows = [
      (reader.line_num, row) for row in reader if any(map(str.strip, row))
    ]
  except csv.Error as e:
    raise ValueError(f'{path}, line {reader.line_num}: {e}') from None
  if not rows:
    raise ValueError(f'{path} is empty')
  header = [name.strip() for name in rows[0][1]]
  if target not in header:
    hint = settings.nearest(target, header)
    if len(header) == 1:
      hint = '; a file that is no CSV with a header needs no target'
      if any(separator in header[0] for separator in ';\t|'):
        hint = '; columns must be separated by commas'
    raise ValueError(
      f'{path} has no column {target}; its columns are '
      f'{_short(", ".join(header))}{hint}'
    )
  for name in header:
    if header.count(name) > 1:
      raise ValueError(f'{path} has more than one column {name}')
  cells = rows[1:]
  _same_width(path, cells, len(header))
  column = header.index(target)
  labels = [row[column].strip() for _, row in cells]
  for (i, _), label in zip(cells, labels, strict=True):
    if not label:
      raise ValueError(f'{path}, line {i}: the class is missing')
  features = [(i, row[:column] + row[column + 1 :]) for i, row in cells]
  names = [f'column {name}' for name in header if name != target]
  return _source(_numbers(path, features, names), _ordered(labels))


def _ordered(labels):
  """Labels that sort as numbers if they are whole numbers, else as text."""
  labels = np.array(labels)
  with contextlib.suppress(ValueError):
    values = labels.astype(np.float64)
    if np.all((np.abs(values) < _MOST) & (values == np.round(values))):
      return values.astype(np.int64)
  return labels


def _same_width(path, rows, columns):
  if not rows:
    raise ValueError(f'{path} holds no examples')
  for i, row in rows:
    if len(row) != columns:
      raise ValueError(
        f'{path}, line {i}: {columns} comma-separated values should stand '
        f'here, got {len(row)}'
      )


def _numbers(path, rows, names):
  """All cells as finite float64, or a sentence about the first that is not."""
  with contextlib.suppress(ValueError):
    values = np.array([row for _, row in rows]).astype(np.float64)
    if np.isfinite(values).all():
      return values.reshape(len(rows), len(names))
  for i, row in rows:
    for name, cell in zip(names, row, strict=True):
      if not _is_finite(cell):
        raise ValueError(
          f'{path}, line {i}, {name}: a finite number should stand here, got '
          f'{_short(cell)}'
        )
  return np.array([[float(cell) for cell in row] for _, row in rows])


def _is_finite(cell):
  try:
    return np.isfinite(float(cell))
  except ValueError:
    return False


def _short(text):
  text = text if len(text) <= 60 else text[:57] + '...'
  return repr(text)


def _source(inputs, labels):
  classes, positions = np.unique(labels, return_inverse=True)
  return Source(
    inputs, positions.astype(np.int32), tuple(str(c) for c in classes)
  )


def _openml(dataset, target):
  name, _, version = dataset.removeprefix(_OPENML).partition(':')
  if not name or (version and not (version.isdecimal() and int(version))):
    raise ValueError(
      f'dataset must be openml:NAME or openml:NAME:VERSION, got {dataset!r}'
    )
  bunch = _fetch(dataset, name, version, target)
  if bunch.target is None:
    raise ValueError(
      f'{dataset} has no default target; name one of its columns by '
      '--config.target=COLUMN'
    )
  labels = np.asarray(bunch.target)
  if labels.ndim > 1:
    raise ValueError(
      f'{dataset} has more than one default target; name one of its columns by '
      '--config.target=COLUMN'
    )
  inputs = bunch.data
  if scipy.sparse.issparse(inputs):
    inputs = inputs.toarray()
  inputs = np.asarray(inputs, np.float64)
  bad = np.argwhere(~np.isfinite(inputs))
  if len(bad):
    row, column = bad[0]
    given = inputs[row, column]
    given = 'a missing value' if np.isnan(given) else f'{given:g}'
    raise ValueError(
      f'{dataset}, example {row + 1}, column {bunch.feature_names[column]}: '
      f'a finite number should stand here, got {given}'
    )
  return _source(inputs, _ordered(labels.astype(str)))


def _fetch(dataset, name, version, target):
  import sklearn.datasets

  timeout = socket.getdefaulttimeout()
  socket.setdefaulttimeout(_TIMEOUT)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Retries; several active versions.
      return sklearn.datasets.fetch_openml(
        name,
        version=int(version) if version else 'active',
        target_column=target or 'default-target',
        as_frame=False,
        parser='liac-arff',
        n_retries=1,
      )
  except (OSError, http.client.HTTPException) as e:
    reason = str(getattr(e, 'reason', None) or e) or type(e).__name__
    offline = (urllib.error.URLError, TimeoutError, ConnectionError)
    answered = isinstance(e, urllib.error.HTTPError)
    if answered:
      e.close()
    if isinstance(e, offline) and not answered:
      reason = f'a network connection is needed ({reason})'
    raise ValueError(
      f'{dataset} is not in the cache ({sklearn.datasets.get_data_home()}) and '
      f'cannot be fetched: {reason}'
    ) from e
  except (KeyError, ValueError) as e:
    reason = str(e.args[0] if e.args else e).splitlines()[0]
    reason = reason.partition(' Try as_frame')[0]
    raise ValueError(f'{dataset} cannot be read: {reason}') from e
  finally:
    socket.setdefaulttimeout(timeout)
