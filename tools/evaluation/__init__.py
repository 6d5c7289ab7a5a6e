"""What tools/evaluate.py and tools/calibrate.py are made of."""
