"""Imported before the libraries, keeps what they tell of themselves off the terminal, but for errors."""

import logging
import warnings

warnings.filterwarnings("ignore", message="No ccache found")  # of Paddle
warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")
logging.disable(logging.WARNING)
