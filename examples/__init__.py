"""Programs that show rrattn at work, run one by one: `python examples/NAME.py`."""
