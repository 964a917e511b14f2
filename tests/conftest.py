"""Settings shared by all tests: 8 simulated CPU devices, no silent rank promotion, where local data lies.

Programs compiled twice in a session (a run and its resume) are kept in a folder that goes with it; to reuse them
between sessions, set JAX's own JAX_COMPILATION_CACHE_DIR to a folder.
"""
import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from tiny import QUICK_COMPILES

# Both are read when JAX starts its backend: they have to be set before anything imports jax.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILES} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="hdlm_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example compiles for seconds, so no deadline. CI draws the same examples in every run.
hypothesis.settings.register_profile("hdlm_jax", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("hdlm_jax")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture
def hearing():
    """Processes that a test starts hear SIGINT and SIGTERM, also where this one was started with them ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of local data sets: $HDLM_DATA, or ../shared/data beside the repository. Skips where absent."""
    folder = Path(os.environ.get("HDLM_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no local data: {folder} is not a folder (set HDLM_DATA)")
    return folder


@pytest.fixture
def small(monkeypatch):
    """Prepared text in shards of a few documents, so that little of it has many of them."""
    monkeypatch.setattr("hdlm_jax.data.shards.BATCH_CHARS", 350)
    monkeypatch.setattr("hdlm_jax.data.shards.SHARD_TOKENS", 120)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that is installed already. Skips where there is none, or no playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install 'hdlm_jax[browser]')")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    where = next(filter(None, map(shutil.which, names)), None)
    if where is None:
        pytest.skip(f"no browser: none of {', '.join(names)} on PATH")
    with api.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=where, args=[
            "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        yield opened
        opened.close()
