"""What compiles: programs kept between runs, batches as large as fit, sums over batch shards."""
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.common import parallel


def cache_after(tmp_path, **env):
    """Files in the folder after a program was compiled in a process of its own."""
    script = ("import jax; from hdlm_jax.common import parallel; parallel.keep_compiled();"
              "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((9, 9)))")
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "XLA_FLAGS"}
    keep |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=keep | env, check=True)
    return [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]


def test_compiled_programs_are_kept(tmp_path):
    kept = cache_after(tmp_path)
    assert kept and all(name.startswith("hdlm_jax/compiled/") for name in kept)


def test_where_they_are_kept_is_the_user_s_choice(tmp_path):
    kept = cache_after(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert kept and all(name.startswith("mine/") for name in kept)
    assert cache_after(tmp_path / "off", JAX_ENABLE_COMPILATION_CACHE="false") == []


@pytest.mark.parametrize("limit, used, rows", [(0, 0, 20), (10_000, 0, 20), (1000, 0, 8), (1000, 800, 4), (30, 0, 4)])
def test_a_batch_as_large_as_fits(monkeypatch, limit, used, rows):
    """100 bytes a row: halved until nine tenths of what is free hold them; multiples of the shards."""
    seen = []

    def lower(params, batch, key):
        seen.append(batch)
        analysis = SimpleNamespace(temp_size_in_bytes=100 * batch)
        return SimpleNamespace(compile=lambda: SimpleNamespace(memory_analysis=lambda: analysis, rows=batch))

    stats = {"bytes_limit": limit, "bytes_in_use": used} if limit else None
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    compiled, found = parallel.fitting(SimpleNamespace(lower=lower), None, lambda n: n, 17, 4, None)
    assert found == rows == compiled.rows and seen[0] == 20 and all(n % 4 == 0 for n in seen)


def test_over_batch_sums_over_shards_and_leaves_rows_where_they_are():
    mesh = jax.make_mesh((2, 2, 2), parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    x = jnp.arange(24.0).reshape(8, 3)

    def run(scale, x):
        assert x.shape == (2, 3), "a shard's own rows"
        return jnp.sum(scale * x), x + 1

    total, rows = jax.jit(parallel.OverBatch(mesh)(run))(2.0, x)
    assert float(total) == 2 * 24 * 23 / 2
    np.testing.assert_array_equal(rows, x + 1)
    one = parallel.make_mesh(SimpleNamespace(parallel=SimpleNamespace(shape=lambda n: (1, 1, n))))
    assert parallel.OverBatch(one)(run) is run, "a single shard needs no division"


def test_trim_memory_is_harmless():
    parallel.trim_memory()
