"""scikit-learn's cache of OpenML, as if it had fetched a set there."""

import gzip
import hashlib
import json
import pathlib


def write(
  data_home, name, arff_text, features, default_target, version=1, data_id=61
):
  """Puts a data set where scikit-learn's fetch_openml looks first.

  Args:
    data_home: What SCIKIT_LEARN_DATA is set to.
    name: The set's name, in lower case.
    arff_text: Its examples, with the header. Sparse if rows begin with '{'.
    features: Its columns, from name to 'numeric' or 'nominal', in order.
    default_target: The column that holds the classes, or several, or None.
    version: The version. The first one written is found without a version.
    data_id: A number of its own for every version.
  """
  if isinstance(default_target, str):
    default_target = (default_target,)
  root = pathlib.Path(data_home) / 'openml' / 'openml.org'
  found = {'did': data_id, 'version': version, 'status': 'active'}
  listing = {'data': {'dataset': [found]}}
  search = f'api/v1/json/data/list/data_name/{name}/limit/2'
  if not (root / search / 'status' / 'active' / '.gz').exists():
    _put(root, f'{search}/status/active/', json.dumps(listing))
  _put(root, f'{search}/data_version/{version}', json.dumps(listing))
  path = f'data/v1/download/{data_id}'
  description = {
    'name': name,
    'version': str(version),
    'status': 'active',
    'format': 'Sparse_ARFF' if '\n{' in arff_text else 'ARFF',
    'description': name,
    'file_id': str(data_id),  # For scikit-learn before 1.7; then the URL.
    'url': f'https://www.openml.org/{path}',
    'md5_checksum': hashlib.md5(arff_text.encode()).hexdigest(),
  }
  columns = [
    {
      'index': str(i),
      'name': column,
      'data_type': kind,
      'is_target': 'true' if column in (default_target or ()) else 'false',
      'is_ignore': 'false',
      'is_row_identifier': 'false',
      'number_of_missing_values': '0',
    }
    for i, (column, kind) in enumerate(features.items())
  ]
  for kind, content in (
    ('', {'data_set_description': description}),
    ('features/', {'data_features': {'feature': columns}}),
    ('qualities/', {'data_qualities': {'quality': []}}),
  ):
    _put(root, f'api/v1/json/data/{kind}{data_id}', json.dumps(content))
  _put(root, path, arff_text)


def _put(root, path, text):
  file = root / f'{path}.gz'
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(gzip.compress(text.encode()))
