"""What `experiments/benchmark.py` measures, and the tables of it."""
