"""Programs to read and to start from, each run from the repository's top with ``python -m examples.NAME``."""
