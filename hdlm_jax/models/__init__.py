"""Networks: the trunk, heads over tokens and clusters, GPT-2, and weights of other code."""
