"""The mathematics of docs/theory.md: levels, the process on symbols, the sampler. Pure functions of arrays."""
