"""docs/tour.ipynb: small as it is kept, and all of it runs."""
import json
import os

import pytest

SHORT = {'"train.steps": 1000': '"train.steps": 4, "model.seq_len": 32, "checkpoint.every": 2'}


def cells(root):
    return json.loads((root / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_kept_without_what_came_out(root):
    assert (root / "docs" / "tour.ipynb").stat().st_size < 10_000
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells(root))
    assert all(text in "".join(line for cell in cells(root) for line in cell["source"]) for text in SHORT)


@pytest.mark.slow
def test_the_tour_runs(root, tmp_path, monkeypatch):
    """As it stands, with a shorter training."""
    reason = "no Jupyter to run it (pip install 'hdlm_jax[notebook]')"
    pytest.importorskip("ipykernel", reason=reason)
    nbclient, nbformat = (pytest.importorskip(name, reason=reason) for name in ("nbclient", "nbformat"))
    text = (root / "docs" / "tour.ipynb").read_text(encoding="utf-8")
    for long, short in SHORT.items():
        text = text.replace(json.dumps(long)[1:-1], json.dumps(short)[1:-1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")])))
    found = nbclient.NotebookClient(nbformat.reads(text, 4), timeout=900, resources={"metadata": {"path": tmp_path}},
                                    kernel_name="python3").execute()
    out = [cell["outputs"] for cell in found["cells"] if cell["cell_type"] == "code"]
    shown = [[part["data"].get("text/html", "") for part in parts if "data" in part] for parts in out]
    assert any("step 4 of 4" in text and "<svg" in text for text in shown[1]), "the curves of the training"
    assert len(shown[2]) == 1 and shown[2][0].startswith("<iframe srcdoc=")
    assert [text[:7] for text in shown[-1]] == ["<iframe"] * 2, "two methods"
    (objects,) = [part["data"]["text/plain"] for part in out[6] if "data" in part]
    assert "'kind': " in objects and (tmp_path / "runs" / "tour" / "checkpoints").is_dir()
