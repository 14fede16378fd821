"""The Flower app that `benchmarks/flower.py` compares with."""
