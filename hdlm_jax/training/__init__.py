"""One training step and what it changes: loss, state, checkpoints; a trained run and how it is loaded."""
