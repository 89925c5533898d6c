"""What a delay costs on real data, and what guided SGD wins back.

  python train.py

Digits (scikit-learn's 1,797 images), an MLP 64-64-10, batches of 16, 16
asynchronous workers that arrive in turn, at a learning rate at which the delay
shows. Four methods, 10 seeds each. `gsgd_jax/settings.py` lists every setting.

TIME AND RESULT
"""

import ml_collections

from gsgd_jax import settings


def get_config() -> ml_collections.ConfigDict:
  return settings.default_config()
