"""What a trained run is used for: the sections evaluate, generate and released."""

from __future__ import annotations

import dataclasses

from hdlm_jax.config.choices import CLUSTERS, FORCE_TRANSITIONS, PROTOCOLS, TASKS
from hdlm_jax.config.rules import check_seed, choice, rule


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The exact NELBO over the whole validation split; with `tasks`, of other texts and of answers to questions."""

    draws: int = 8  # passes over the split, each with its own noise
    batch_size: int = 0  # sequences at once; 0: as many as fit. Changes no result
    rows: int = 0  # only the first so many sequences; 0: all
    rows_in_training: int = 256  # as many (and one draw) at each train.evaluate_every
    cv2: float = 0.03  # a of the proposal q_a, the squared coefficient of variation between sequences
    checkpoint: str = "best"  # best (on validation text) | latest
    ema: bool = True  # use the average of the weights where the run keeps one
    seed: int = 0  # of the noise
    tasks: tuple[str, ...] = ()  # in place of the validation split: names of hdlm_jax.evaluation.benchmarks
    tasks_data: str = "$HDLM_DATA"  # folder of the tasks' files
    files: tuple[str, ...] = ()  # of the task 'files': any local texts, read as data.format and so on say
    lm1b: tuple[str, ...] = ()  # of the task 'lm1b': its held-out files
    protocols: tuple[str, ...] = PROTOCOLS  # of perplexities: each document by itself, all packed into windows of S
    limit: int = 0  # only the first so many documents or questions of a task; 0: all
    target_se: float = 0.25  # nats; a pilot tells how many draws make the best two answers' difference so well known
    most_draws: int = 128  # a question's draws at the most, the pilot's (16, or `draws` if more) not counted

    def check(self) -> None:
        choice("evaluate.checkpoint", self.checkpoint, ("best", "latest"))
        check_seed("evaluate.seed", self.seed)
        rule(self.draws >= 2, "evaluate.draws", self.draws, "must be at least 2 (for a standard error)")
        rule(self.batch_size >= 0, "evaluate.batch_size", self.batch_size, "must not be negative; 0 is what fits")
        rule(self.rows >= 0, "evaluate.rows", self.rows, "must not be negative")
        rule(self.rows_in_training >= 2, "evaluate.rows_in_training", self.rows_in_training, "must be at least 2")
        rule(self.cv2 > 0, "evaluate.cv2", self.cv2, "must be positive")
        for name in self.tasks:
            choice("evaluate.tasks", name, TASKS)
        for name in self.protocols:
            choice("evaluate.protocols", name, PROTOCOLS)
        rule(bool(self.protocols), "evaluate.protocols", self.protocols, f"choose of {', '.join(PROTOCOLS)}")
        for name in ("files", "lm1b"):
            rule(name not in self.tasks or bool(getattr(self, name)), f"evaluate.{name}", getattr(self, name),
                  f"the task {name!r} needs its files")
        rule(self.limit >= 0, "evaluate.limit", self.limit, "must not be negative; 0 is all")
        rule(self.target_se > 0, "evaluate.target_se", self.target_se, "must be positive")
        rule(self.most_draws >= 1, "evaluate.most_draws", self.most_draws, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    num_samples: int = 16  # texts to draw
    length: int = 0  # tokens of a text, prompt and all; 0: model.seq_len, or drawn where training tells lengths
    method: str = "ancestral"  # how to decode: any name of hdlm_jax/decoding/presets.py (docs/decoding.md)
    options: str = ""  # of the method, as in "threshold=.8 block=16"
    steps: int = 128  # of the methods that have a number of steps
    temperature: float = 1.0  # divides log-probabilities of draws; 0 takes the likeliest
    top_p: float = 1.0  # nucleus: draws are among the fewest likeliest tokens with so much mass
    corrections: int = 0  # gidd: calls at the end that revise a word each
    correction_temperature: float = 0.1  # of those calls
    clusters: str = "exact"  # xi < 1: exact shows wrong clusters as the process does, clean never does
    prompt: str = ""  # text that every sample begins with
    stop: str = "end"  # texts are cut before the first end of text behind the prompt; "": they are not
    schema: str = ""  # file with a JSON schema: every sample is a document of it (docs/decoding.md)
    helper: str = ""  # workdir of an autoregressive run, for the methods that need one: guided, edlm
    batch_size: int = 16  # texts at once; changes no result
    trajectories: int = 4  # of so many samples every step is kept as well, for --mode=report
    checkpoint: str = "best"  # best (on validation text) | latest
    seed: int = 0  # of the noise
    force_transition: str = ""  # of the sampler alone: none | within | between | cavity; empty: as trained
    judge: str = ""  # who scores the texts: a folder of GPT-2 or the workdir of a run; empty: nobody
    judge_dtype: str = "float32"  # of a GPT-2 judge's products; a run judges in its own model.dtype

    def check(self) -> None:
        choice("generate.clusters", self.clusters, CLUSTERS)
        choice("generate.stop", self.stop, ("end", ""))
        choice("generate.judge_dtype", self.judge_dtype, ("float32", "bfloat16"))
        if self.force_transition:
            choice("generate.force_transition", self.force_transition, FORCE_TRANSITIONS)
        choice("generate.checkpoint", self.checkpoint, ("best", "latest"))
        check_seed("generate.seed", self.seed)
        for name in ("num_samples", "steps", "batch_size"):
            rule(getattr(self, name) >= 1, f"generate.{name}", getattr(self, name), "must be at least 1")
        for name in ("num_samples", "steps", "batch_size", "corrections"):  # the sampler counts in int32
            rule(getattr(self, name) < 2**31, f"generate.{name}", getattr(self, name), f"must be at most {2**31 - 1}")
        rule(self.corrections >= 0, "generate.corrections", self.corrections, "must not be negative")
        rule(self.correction_temperature > 0, "generate.correction_temperature", self.correction_temperature,
              "must be positive")
        rule(self.length >= 0, "generate.length", self.length, "must not be negative; 0 is model.seq_len")
        rule(self.trajectories >= 0, "generate.trajectories", self.trajectories, "must not be negative; 0 is none")
        rule(self.temperature >= 0, "generate.temperature", self.temperature, "must not be negative")
        rule(0 < self.top_p <= 1, "generate.top_p", self.top_p, "must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class ReleasedConfig:
    """Weights of the published PyTorch networks: what --mode=import reads and --mode=export adds (docs/import.md)."""

    layout: str = ""  # whose vocabulary: mdlm | gidd | hdlm; given, --mode=export writes <layout>.safetensors as well
    weights: str = ""  # .safetensors, .pt, .pth, .bin, .ckpt or .npz, or the folder that holds it
    clusters: str = ""  # word -> cluster: .pt, .npy or .json
    ema: bool = True  # the averaged weights, where the file keeps both
    mask_id: int = -1  # -1: as released, V for mdlm, V + 1 for gidd and hdlm (behind a padding token)
    first_cluster: int = -1  # -1: as released, behind words and mask
    missing: str = "refuse"  # words that the dictionary lacks: refuse | own, a cluster of their own

    def check(self) -> None:
        choice("released.layout", self.layout, ("", "mdlm", "gidd", "hdlm"))
        choice("released.missing", self.missing, ("refuse", "own"))
        for name in ("mask_id", "first_cluster"):
            rule(getattr(self, name) >= -1, f"released.{name}", getattr(self, name), "must be an id, or -1")
