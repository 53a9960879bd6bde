"""Benchmarks of cuflash against its peers: `python -m benchmarks.run`, pytest-benchmark, and the report."""
