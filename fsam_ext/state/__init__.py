"""State as it lies in memory and in checkpoints: flat buffers, flattened parameters, formats."""
