"""Training by rewards: rollouts, what is verified of them, exact policy gradients (docs/training.md)."""
