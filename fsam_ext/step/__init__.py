"""One training step: who takes part, the three passes, and the transaction that brings the weights back."""
