"""What a training step keeps for its backward pass: the first way that fits, or one line."""

import types

import jax
import pytest

from hdlm_jax import config as configs
from hdlm_jax import main
from hdlm_jax.common import parallel
from hdlm_jax.training import fitting
from hdlm_jax.training.fitting import TooLarge, fit, needed, ways

GIB = 2**30


def settings(remat="auto", batch_size=32, microbatches=1):
    c = configs.default()
    c.model.remat, c.train.batch_size, c.train.microbatches = remat, batch_size, microbatches
    return configs.resolve(c)


def program(gib):
    sizes = types.SimpleNamespace(argument_size_in_bytes=2 * GIB, output_size_in_bytes=2 * GIB,
                                  alias_size_in_bytes=2 * GIB, temp_size_in_bytes=int((gib - 2) * GIB),
                                  generated_code_size_in_bytes=0)
    return types.SimpleNamespace(memory_analysis=lambda: sizes)


NEEDS = {("none", 1): None, ("cheap", 1): 20, ("all", 1): 12, ("all", 2): 9, ("all", 4): 7}  # GiB; None: refused


def compiled(config):
    gib = NEEDS.get((config.model.remat, config.train.microbatches), 6)
    if gib is None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 43G exceeds\n15.75G")
    return program(gib)


@pytest.mark.parametrize("limit, remat, parts", [(32, "cheap", 1), (16, "all", 1), (12.5, "all", 2), (8, "all", 4),
                                                 (0, "cheap", 1)])
def test_the_first_way_that_fits_is_taken(monkeypatch, limit, remat, parts):
    monkeypatch.setattr(parallel, "platform", lambda: "tpu")
    found = fit(settings(), 8, compiled, int(limit * GIB))
    assert (found.config.model.remat, found.config.train.microbatches) == (remat, parts)
    assert found.bytes == needed(found.compiled) == NEEDS[remat, parts] * GIB
    assert "remat=none: the compiler refuses it (RESOURCE_EXHAUSTED: 43G exceeds 15.75G)" in found.why
    assert f"remat={remat}" in found.why and (not limit or f"of {limit:.2f}" in found.why)


def test_where_nothing_fits_it_is_a_line_with_the_ways_out(monkeypatch):
    monkeypatch.setattr(parallel, "platform", lambda: "tpu")
    with pytest.raises(TooLarge) as told:
        fit(settings(), 8, compiled, 4 * GIB)
    for text in ("4.00 GiB", "remat=cheap: 20.00 GiB", "4 microbatches: 7.00 GiB", "parallel.fsdp", "train.batch_size"):
        assert text in str(told.value)
    assert "8 microbatches" not in str(told.value)  # 32 rows on 8 shards have at most 4 parts
    with pytest.raises(TooLarge, match="remat=cheap: 20.00 GiB"):  # what is set is not changed
        fit(settings("cheap"), 8, compiled, 16 * GIB)

    def broken(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fit(settings(), 8, broken, GIB)


def test_ways_of_a_cpu_and_of_what_is_set(monkeypatch):
    assert [c.model.remat for c in ways(settings(), 1)] == ["cheap"]
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    auto = [(c.model.remat, c.train.microbatches) for c in ways(settings(microbatches=2), 4)]
    assert auto == [("none", 2), ("cheap", 2), ("all", 2), ("all", 4), ("all", 8)]
    for remat in ("none", "cheap", "all"):
        assert [c.model.remat for c in ways(settings(remat), 4)] == [remat]


@pytest.mark.parametrize("mode, helps", [("train", "train.microbatches"), ("evaluate", "evaluate.batch_size"),
                                         ("generate", "generate.batch_size")])
def test_out_of_memory_anywhere_is_one_line(monkeypatch, capsys, mode, helps):
    def full(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying\nto allocate 3.1GiB.")

    monkeypatch.setattr(main, "main", full)
    monkeypatch.setattr(main, "_MODE", types.SimpleNamespace(value=mode))
    monkeypatch.setattr(main, "_DISTRIBUTED", types.SimpleNamespace(value=False))
    with pytest.raises(SystemExit) as left:
        main.run([])
    told = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 1 and len(told) == 1 and "3.1GiB" in told[0] and helps in told[0]
    assert fitting.HELP in told[0] or mode != "train"

    def other(argv):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    monkeypatch.setattr(main, "main", other)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main.run([])
