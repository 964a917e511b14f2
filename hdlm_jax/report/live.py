"""The page that a served run comes with: type, choose a method, and watch the text fall (runs/serve.py)."""

from __future__ import annotations

import importlib.resources

from hdlm_jax.common.jsons import Json
from hdlm_jax.report.page import describe, document
from hdlm_jax.report.run_files import gather


def about(workdir: str) -> Json:
    """What the page is told of a run: name, description, and its words and clusters."""
    run = gather(workdir)
    return {"name": run["name"], "description": describe(run), "hierarchy": run["hierarchy"]}


def page() -> str:
    """The page of any run; what it shows it asks the server for."""
    program = (importlib.resources.files("hdlm_jax.report") / "serve.js").read_text("utf-8")
    return document("hdlm_jax", "<div data-part=live></div>", {}, program)
