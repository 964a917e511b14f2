"""What the package computed before its files moved (commit 4da3eb3, tests/goldens.json) is what it computes now.

Losses of 20 steps and bounds within float32's rounding anywhere; every sample and every preset bit for bit where the
file was made: there, `./launch/test.sh --slow tests/test_goldens.py`.
"""
import json
import subprocess
import sys
from importlib.metadata import version

import jax
import numpy as np
import pytest
from goldens import CASES, config_of, results
from tiny import write_recipe


@pytest.fixture(scope="module")
def frozen(root):
    return json.loads((root / "tests" / "goldens.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hdlm_k3_xi9_factorised", "gidd"])
def test_losses_and_bounds_are_those_of_before(case, frozen, tmp_path):
    devices = len(jax.devices())
    name = f"{case}/{devices}" if f"{case}/{devices}" in frozen["cases"] else f"{case}/1"
    found = results(case, config_of(write_recipe(tmp_path), CASES[case]), str(tmp_path / "run"), False, True)
    for key in ("losses", "nelbo"):
        np.testing.assert_allclose(found[key], frozen["cases"][name][key], rtol=2e-3, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_all_is_bit_for_bit_that_of_before(devices, frozen, root, tmp_path):
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    if version("jax") != "0.10.2" or sys.version_info[:2] != (3, 11) or cpu not in frozen["made"]:
        pytest.skip(f"bits belong to {frozen['made']}")
    cases = [name.split("/")[0] for name in frozen["cases"] if name.endswith(f"/{devices}")]
    (tmp_path / "like.json").write_text(json.dumps(frozen["cases"]))
    ran = subprocess.run([sys.executable, root / "tests" / "goldens.py", tmp_path / "now.json", "--like",
                          tmp_path / "like.json", "--devices", str(devices), "--only", ",".join(cases)],
                         capture_output=True, text=True)
    assert ran.returncode == 0 and "bit for bit" in ran.stdout, ran.stdout[-2000:] + ran.stderr[-2000:]
