"""The mathematics of docs/theory.md: levels, hierarchy, processes, predictions. Pure functions of arrays; no Flax."""
