"""Sets that tensorflow-datasets has prepared, found and opened, or a sentence.

Nothing is prepared here and TensorFlow is not needed: record files in the
array_record format are read by themselves.
"""

import contextlib
import difflib
import io
import logging
import os
import pathlib
import re
import shlex
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

PREFIX = 'tfds:'
_FORMAT = 'array_record'
_NAME = re.compile(r'([\w-]+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?')
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_WELL_KNOWN = (
  'cifar10',
  'cifar100',
  'emnist',
  'fashion_mnist',
  'food101',
  'imagenet2012',
  'imagenette',
  'kmnist',
  'mnist',
  'oxford_flowers102',
  'oxford_iiit_pet',
  'stl10',
  'svhn_cropped',
)


class DamagedData(OSError):
  """A record that cannot be used; it may be met long after training began."""


class Prepared(NamedTuple):
  """A set whose records can be read in any order."""

  name: str
  folder: pathlib.Path | None  # None where records are made up.
  command: str  # That prepares it.
  features: Any = None  # tfds's, by name.
  keys: tuple[str, str] | None = None  # The input's, the target's.
  train: Sequence[dict] = ()
  tests: tuple[Sequence[dict], ...] = ()  # Test records, validation records.

  def broken(self, error: BaseException, what: str = '') -> str:
    """What to say of files that cannot be read."""
    return (
      f'{self.folder} does not hold the whole of {self.name} '
      f'({what}{_reason(error)}); delete it and prepare it anew, where there '
      f'is a network: {self.command}'
    )


def open_set(name: str, data_dir: str | os.PathLike | None) -> Prepared:
  """Opens the records of ``'tfds:NAME/CONFIG:VERSION'``.

  Raises:
    ValueError: There is no such set; it is not prepared, only half, or not as
      array_record; it lacks a split; a package is missing.
    OSError: `data_dir` is given and is no folder.
  """
  parts = _NAME.fullmatch(name.removeprefix(PREFIX))
  if not name.startswith(PREFIX) or not parts:
    raise ValueError(
      'dataset must be tfds:NAME, tfds:NAME/CONFIG or '
      f'tfds:NAME/CONFIG:VERSION, got {name!r}'
    )
  root = _root(data_dir)
  tfds = _tfds(name)
  with quiet():
    known = tfds.list_builders(with_community_datasets=False)
    folder = _folder(name, root, *parts.groups())
    prepared = Prepared(name, folder, _command(name, parts[1] in known, root))
    if folder is None:
      builder = _mocked(tfds, prepared, root, parts[1] in known)
      if builder is None:
        raise _missing(prepared, root, parts[1], known)
    else:
      try:
        builder = tfds.builder_from_directory(str(folder))
      except Exception as e:  # Of any kind: files may hold anything.
        raise ValueError(prepared.broken(e)) from e
      _check_format(prepared, builder.info)
    return _opened(prepared, builder)


def nearest(name: str, known: Iterable[str] = _WELL_KNOWN) -> str:
  """`'; did you mean tfds:X?'`, or nothing where no set's name is near.

  Small and capital letters, ``-`` and ``_`` count for nothing.
  """
  plain = lambda name: re.sub('[-_]', '', name).lower()
  set_name, *rest = re.split('([/:].*)', name, maxsplit=1)
  sets = {plain(x): x for x in known}
  close = difflib.get_close_matches(plain(set_name), sets, n=1, cutoff=0.6)
  if not close:
    return ''
  return f'; did you mean {PREFIX}{sets[close[0]]}{"".join(rest)}?'


def _reason(error):
  lines = str(error).strip().splitlines() or [type(error).__name__]
  line = lines[0].rstrip('.;: ')
  return line if len(line) <= 160 else line[:157] + '...'


def _root(data_dir):
  if data_dir is None:
    default = os.path.join('~', 'tensorflow_datasets')
    data_dir = os.environ.get('TFDS_DATA_DIR') or default
    return pathlib.Path(data_dir).expanduser()
  root = pathlib.Path(data_dir).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(
      f'data_dir must be a folder that holds prepared sets, got {root}, which '
      + ('is a file' if root.exists() else 'does not exist')
    )
  return root


def _command(name, known, root):
  # Of a builder that is not tfds's own, tfds takes the path.
  what = name.removeprefix(PREFIX) if known else 'PATH_OF_ITS_BUILDER'
  return (
    f'pip install tensorflow tensorflow-datasets && tfds build {what} '
    f'--file_format={_FORMAT} --data_dir={shlex.quote(str(root))}'
  )


def _tfds(name):
  try:
    with quiet():
      import array_record.python.array_record_data_source
      import grain
      import tensorflow_datasets as tfds

      del array_record, grain
  except ImportError as e:
    raise ValueError(
      f"{name} needs the package {e.name}: pip install 'gsgd_jax[train]'"
    ) from e
  return tfds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps tfds from printing, logging and warning of what we say ourselves."""
  logger = logging.getLogger('absl')
  before, logger.disabled = logger.disabled, True
  try:
    with (
      contextlib.redirect_stdout(io.StringIO()),
      warnings.catch_warnings(action='ignore'),
    ):
      yield
  finally:
    logger.disabled = before


def _folder(name, root, set_name, config, version):
  """The folder of the version asked for, else the newest; None if none is."""
  top = root / set_name
  if config is not None:
    top = top / config
  elif not _versions(top) and top.is_dir():
    configs = sorted(p.name for p in top.iterdir() if _versions(p))
    if len(configs) > 1:
      raise ValueError(
        f'{top} holds several configurations of {name}; name one of them, as '
        f'{", ".join(f"{PREFIX}{set_name}/{c}" for c in configs)}'
      )
    top = top / configs[0] if configs else top
  versions = _versions(top)
  if version in versions or (versions and version is None):
    return top / (version or versions[-1])
  if versions:
    raise ValueError(
      f'{top} does not hold version {version} of {name}, only '
      + ', '.join(versions)
    )
  return None


def _versions(folder):
  if not folder.is_dir():
    return []
  names = [p.name for p in folder.iterdir() if _VERSION.fullmatch(p.name)]
  return sorted(names, key=lambda name: [int(n) for n in name.split('.')])


def _holds_versions(folder):
  """Whether a set, or its configurations, have versions there."""
  if not folder.is_dir():
    return False
  return any(map(_versions, (folder, *folder.iterdir())))


def _mocked(tfds, prepared, root, known):
  """A builder that needs no folder, as under `tfds.testing.mock_data`."""
  if known:
    with contextlib.suppress(Exception):
      name = prepared.name.removeprefix(PREFIX)
      builder = tfds.builder(name, data_dir=str(root))
      builder.as_data_source('train')
      return builder
  return None


def _missing(prepared, root, set_name, known):
  """What to raise where no version has a folder."""
  name, top = prepared.name, root / set_name
  for folder in (root, *root.parents)[:3]:
    if folder.name == set_name and _holds_versions(folder):
      return ValueError(
        f'{root} is a folder of {name} itself; give the one that holds all of '
        f'it: --config.data_dir={shlex.quote(str(folder.parent))}'
      )
  if set_name not in known and not top.is_dir():
    there = root.iterdir() if root.is_dir() else ()
    sets = [*known, *(p.name for p in there if _holds_versions(p))]
    return ValueError(
      f'tensorflow-datasets knows no set {set_name}, and none is prepared in '
      f'{root}' + nearest(name.removeprefix(PREFIX), sets)
    )
  left = sorted(p for p in top.rglob('*incomplete*') if p.is_dir())
  if left:
    return ValueError(
      f'{left[0]} was left by a preparation of {name} that broke off; delete '
      f'it and prepare it anew, where there is a network: {prepared.command}'
    )
  return ValueError(
    f'{name} is not prepared in {root}; say by --config.data_dir where it is, '
    f'or prepare it where there is a network and copy {top} here: '
    + prepared.command
  )


def _check_format(prepared, info):
  formats = sorted(f.value for f in info.available_file_formats())
  if _FORMAT not in formats:
    folder = prepared.folder
    raise ValueError(
      f'{folder} holds {prepared.name} as {" and ".join(formats) or "nothing"} '
      f'rather than {_FORMAT}; where TensorFlow is installed, convert it: tfds '
      f'convert_format --dataset_version_dir={shlex.quote(str(folder))} '
      f'--out_file_format={_FORMAT}'
    )


def _opened(prepared, builder):
  info = builder.info
  # Nothing is known of the splits of mocked sets: they are what is asked for.
  splits = list(info.splits) or ['train', 'test']
  used = [s for s in ('train', 'test', 'validation') if s in splits]
  if 'train' not in used or len(used) < 2:
    raise ValueError(
      f'{prepared.name} must have a split train and a split test or '
      f'validation, its splits are {", ".join(splits)}'
    )
  try:
    sources = [builder.as_data_source(s, file_format=_FORMAT) for s in used]
    for split in used if info.splits else ():
      _check_files(info.splits[split])
    for source in sources:
      source[0]  # tfds logs, the first time, that OpenCV would be faster.
  except Exception as e:
    raise ValueError(prepared.broken(e)) from e
  keys = info.supervised_keys
  if not isinstance(keys, tuple) or [type(k) for k in keys] != [str, str]:
    keys = None
  return prepared._replace(
    features=info.features, keys=keys, train=sources[0], tests=(*sources[1:],)
  )


def _check_files(split):
  """That every file is there, with all its records."""
  from array_record.python import array_record_module

  for file in split.file_instructions:
    path = os.fspath(file.filename)
    if not os.path.exists(path):
      raise ValueError(f'{os.path.basename(path)} is missing')
    reader = array_record_module.ArrayRecordReader(path)
    records = reader.num_records()
    reader.close()
    if records != file.examples_in_shard:
      raise ValueError(
        f'{os.path.basename(path)} holds {records} records, not '
        f'{file.examples_in_shard}'
      )
  if not split.num_examples:
    raise ValueError(f'its split {split.name} is empty')
