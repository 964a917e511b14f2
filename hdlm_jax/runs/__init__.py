"""The modes of hdlm_jax.main: each reads and writes one workdir."""
