"""Benchmarks: ``python -m bench.<op>``, each against the machine's own ceilings measured in the same run."""
