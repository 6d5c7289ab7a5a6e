"""PaddleFormers' own trainer, which knows rrattn here: python examples/pretrain.py train examples/pretrain.yaml"""

from paddleformers.cli.launcher import launch

import rrattn  # noqa: F401  so that the library knows "rrattn"

launch()
