"""A run as a model of lm-evaluation-harness (`pip install 'hdlm_jax[lm-eval]'`), by the name "hdlm_jax".

In Python, `import hdlm_jax.evaluation.harness, lm_eval` and then
`lm_eval.simple_evaluate(model="hdlm_jax", model_args="workdir=runs/hdlm_small", tasks=["arc_easy"])`; on the command
line `python -m hdlm_jax.evaluation.harness --model hdlm_jax --model_args workdir=... --tasks ...`, with the harness's
own flags. What is computed is in requests.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hdlm_jax.config import ConfigError, EvaluateConfig, GenerateConfig, change
from hdlm_jax.evaluation import requests as answers
from hdlm_jax.evaluation.scorer import Scorer
from hdlm_jax.training.loading import load_here

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise ImportError("hdlm_jax.evaluation.harness needs lm_eval: pip install 'hdlm_jax[lm-eval]'") from None

_OF_THE_HARNESS = ("batch_size", "max_batch_size", "device")  # here rows fill the devices that JAX finds
_EVALUATE = ("checkpoint", "ema", "draws", "target_se", "most_draws", "seed")
_GENERATE = ("method", "options", "steps", "clusters", "helper")


@register_model("hdlm_jax")
class HDLM(LM):
    """Log-likelihoods are minus the exact (conditional) NELBO in nats; see requests.py.

    model_args: workdir, and any of the settings of EvaluateConfig (checkpoint, ema, draws, target_se, most_draws,
      seed) and GenerateConfig (method, options, steps, clusters, helper); greedy=False leaves is_greedy False without
      looking.
    Raises: ConfigError for others, or for a workdir without a run.
    """

    def __init__(self, workdir: str, greedy: bool = True, **settings: Any):
        super().__init__()
        given = {k: v for k, v in settings.items() if k not in _OF_THE_HARNESS}
        if unknown := sorted(set(given) - {*_EVALUATE, *_GENERATE}):
            raise ConfigError(f"model_args {', '.join(unknown)}: choose of workdir, greedy, "
                              f"{', '.join((*_EVALUATE, *_GENERATE))}")
        evaluate = change("evaluate", EvaluateConfig(), {k: v for k, v in given.items() if k in _EVALUATE})
        evaluate.check()
        run = load_here(workdir, evaluate.checkpoint, ema=evaluate.ema)
        self._greedy, self._scorer = greedy, Scorer(run, evaluate)
        self._generate: GenerateConfig = change("generate", run.config.generate,
                                          {k: v for k, v in given.items() if k in _GENERATE})
        dataclasses.replace(run.config, generate=self._generate).check()

    def loglikelihood(self, requests: Sequence[answers.Request], **_: Any) -> list[tuple[float, bool]]:
        return answers.loglikelihood(self._scorer, requests, self._greedy)

    def loglikelihood_rolling(self, requests: Sequence[answers.Request], **_: Any) -> list[float]:
        return answers.loglikelihood_rolling(self._scorer, requests)

    def generate_until(self, requests: Sequence[answers.Request], **_: Any) -> list[str]:
        return answers.generate_until(self._scorer, requests, self._generate)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
