"""The benchmark suite: ``run.py`` is the command; docs/benchmarks.md says what is measured and how."""
