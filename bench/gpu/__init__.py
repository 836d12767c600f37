"""The run on a GPU, part by part: ``python -m bench.gpu``."""
