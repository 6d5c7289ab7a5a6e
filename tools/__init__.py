"""What rrattn is measured, trained and set up with: `python -m tools.NAME` from the top of a checkout."""
