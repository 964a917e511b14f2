"""An open model's HDLM or MDLM learns to answer: GSM8K's problems as turns of a chat (docs/finetuning.md).

    HDLM_DATA=../shared/data python -m hdlm_jax.main --config=gsm8k \\
        --config.train.init_from=runs/adapt_hdlm64-factorised
    HDLM_DATA=../shared/data python -m hdlm_jax.main --workdir=runs/gsm8k --mode=evaluate \\
        --config.evaluate.tasks='("gsm8k",)' --config.evaluate.limit=100
    HDLM_DATA=../shared/data python -m hdlm_jax.main --config=gsm8k:score --workdir=runs/gsm8k_score

":score" goes on by rewards from runs/gsm8k: 1 for the right number behind "####", .1 for another one, by the exact
policy gradient (docs/training.md); its prompts are the training problems that fit a row with their solution.

Rows are one problem each, in the chat template of the run's tokenizer; the question is given, the solution and its end
are learnt. Answers are judged by the number behind "####".

Fits on: what the run that it starts from was trained on (":score": as many rows at once, and those weights once more).
"""

from hdlm_jax import config


def get_config(objective=""):
    c = config.recipe("tuned")
    c.data.files = ("$HDLM_DATA/gsm8k/train.jsonl.xz",)
    c.data.prompt_field = "question"
    c.data.text_field = "answer"
    c.data.chat = True
    c.model.seq_len = 256
    c.optimizer.lr = 1e-4
    c.train.init_from = "runs/adapt_hdlm64-factorised"
    c.train.steps = 1000
    c.train.batch_size = 8
    c.train.log_every = 10
    c.checkpoint.every = 500
    c.evaluate.checkpoint = "latest"
    c.generate.checkpoint = "latest"
    c.generate.temperature = 0.5
    if objective:
        c.tune.objective = objective
        c.tune.task = "answers"
        c.tune.kl = 0.04
        c.tune.views = 4
        c.tune.rows = 64
        c.optimizer.lr = 5e-6
        c.optimizer.warmup = 0
        c.optimizer.schedule = "constant"
        c.train.init_from = "runs/gsm8k"
        c.train.steps = 200
        c.train.batch_size = 64
        c.train.microbatches = 8
        c.train.log_every = 1
        c.checkpoint.every = 20
        c.evaluate.checkpoint = "best"
        c.generate.checkpoint = "best"
        c.evaluate.rows_in_training = 64
        c.generate.method = "max_prob"
        c.generate.steps = 128
    return c
