"""What an installed wheel has to be, where nothing else is installed.

Run by the environment's Python, with the folder of the guides.
"""

import importlib.metadata
import importlib.resources
import pathlib
import re
import sys

import gsgd_jax

metadata = importlib.metadata.metadata('gsgd_jax')
assert metadata['Version'] == gsgd_jax.__version__
assert importlib.resources.files('gsgd_jax').joinpath('py.typed').is_file()
assert 'site-packages' in gsgd_jax.__file__, gsgd_jax.__file__

# The description is the README, no link of which leads into a clone.
description = metadata.get_payload()
assert description.startswith('# gsgd_jax')
links = re.findall(r'\]\((.*?)\)|src="(.*?)"', description)
assert len(links) > 15
assert all(re.match('https:|#', ''.join(link)) for link in links), links

# An optax loop before and after its five lines.
guide = (pathlib.Path(sys.argv[1]) / 'optax_loop.md').read_text()
blocks = re.findall(r'```python\n(.*?)```', guide, flags=re.DOTALL)
exec(compile('\n'.join(blocks), 'optax_loop.md', 'exec'), {})

extras = {'flax', 'ml_collections', 'matplotlib', 'scipy.stats', 'sklearn'}
assert not extras & set(sys.modules), extras & set(sys.modules)
