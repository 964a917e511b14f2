"""What evaluation harnesses ask of a model, answered by a Scorer: likelihoods, rolling likelihoods, texts up to a stop.

A diffusion model bounds likelihoods: what is called a log-likelihood here is minus the (conditional) NELBO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from hdlm_jax.config import GenerateConfig
from hdlm_jax.evaluation.rows import per_text, split_all
from hdlm_jax.evaluation.scorer import Choices, Scorer, encode_pair


class Request(Protocol):
    """What a harness asks: args (context, continuation), (text,) or (context, settings); doc_id where it has one."""

    args: tuple[Any, ...]


def loglikelihood(scorer: Scorer, requests: Sequence[Request], greedy: bool = True) -> list[tuple[float, bool]]:
    """(minus the conditional NELBO in nats, whether greedy filling gives the continuation) of (context, continuation).

    Requests of one document (the same task_name and doc_id; without them, the same context) are ranked together: same
    noise for all, draws by the best two. greedy=False: False without looking.
    """
    pairs = [encode_pair(scorer.run.tokenizer, *request.args) for request in requests]
    together: dict[Hashable, list[int]] = {}
    for i, request in enumerate(requests):
        document = getattr(request, "doc_id", None)
        key = request.args[0] if document is None else (getattr(request, "task_name", ""), document)
        together.setdefault(key, []).append(i)
    groups = list(together.values())
    found = scorer.rank([Choices([pairs[i][0] for i in g], [pairs[i][1] for i in g]) for g in groups], "loglikelihood")
    nats = np.zeros(len(pairs))
    for group, values in zip(groups, found.nats, strict=True):
        nats[group] = values
    hits = scorer.hits(pairs) if greedy else np.zeros(len(pairs), bool)
    return list(zip((-nats).tolist(), hits.tolist(), strict=True))


def loglikelihood_rolling(scorer: Scorer, requests: Sequence[Request]) -> list[float]:
    """Minus the NELBO in nats of each whole text (text,), in pieces of S where it is longer.

    Without its end of text, and so given its length, but for a run that learnt ends of texts.
    """
    run = scorer.run
    end = np.full(int(run.ends), run.tokenizer.eot, np.int32)
    texts = [np.append(run.tokenizer.encode(request.args[0]), end) for request in requests]
    pieces, owner = split_all(texts, scorer.seq_len, ends=run.ends)
    if not pieces:
        return [0.0] * len(texts)
    nats = scorer.nats(pieces, scorer.settings.draws, "loglikelihood")[0].mean(0).sum(-1)
    return (-per_text(nats, owner, len(texts))).tolist()


def generate_until(scorer: Scorer, requests: Sequence[Request], g: GenerateConfig, most: int = 128) -> list[str]:
    """Texts for (context, {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}), up to the first stop.

    max_gen_toks tokens (`most` where it is not given, at most S - 1) are written behind the context by the sampler;
    the text ends before the end of text or the first of the strings `until`. Without do_sample the most likely words
    are taken (temperature 0).
    """
    tokenizer, out = scorer.run.tokenizer, [""] * len(requests)
    alike: dict[GenerateConfig, list[int]] = {}
    for i, request in enumerate(requests):
        how = request.args[1]
        temperature = float(how.get("temperature", g.temperature)) if how.get("do_sample") else 0.0
        top_p = float(how.get("top_p", g.top_p)) if temperature else 1.0
        alike.setdefault(dataclasses.replace(g, temperature=temperature, top_p=top_p), []).append(i)
    for settings, here in alike.items():
        settings.check()
        contexts = [tokenizer.encode(requests[i].args[0]) for i in here]
        counts = [max(1, min(int(requests[i].args[1].get("max_gen_toks", most)), scorer.seq_len - 1)) for i in here]
        for i, ids in zip(here, scorer.fill(contexts, counts, settings), strict=True):
            end = np.flatnonzero(ids == tokenizer.eot)
            stops = requests[i].args[1].get("until") or []
            text = tokenizer.decode(ids[: end[0]] if len(end) else ids)
            out[i] = cut(text, [stops] if isinstance(stops, str) else stops)
    return out


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings in it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
