"""The first day on a GPU: what bench/gpu_check.py runs there, within a budget, and what becomes of its rows."""
