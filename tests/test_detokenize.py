"""What corpora did to their text, undone: hand-made examples of every rule, and real lines."""

import bz2
import csv
import gzip
import io
import lzma
import re

import pytest

from hdlm_jax import config
from hdlm_jax.data.detokenize import DETOKENIZERS
from hdlm_jax.evaluation import benchmarks

EXAMPLES = {
    "lm1b": [
        ("They 've said : \" we 're here , \" he added .", "They've said: \"we're here,\" he added."),
        ("Why not ? Because ! Really !", "Why not? Because! Really!"),
        ("Is it ?", "Is it?"),
        ("The U.S. government 's $ 700 billion ( about £ 400 billion ) plan ; and / or this",
         "The U.S. government's $700 billion (about £400 billion) plan; and/or this"),
        ("See http : / / www.example.com and https : / / example.org [ sic ] .",
         "See http://www.example.com and https://example.org [sic] ."),  # as they have it: only words take a full stop
        ("It ended . Then it began .", "It ended. Then it began."),
        ("a , b , c : d ; e", "a, b, c: d; e"),
        ("nothing to do", "nothing to do"),
    ],
    "ptb": [
        ("it was n't the firm 's fault", "it wasn't the firm's fault"),
        ("the traders ' screens", "the traders' screens"),
        ("it lost $ N million or N N N of # N", "it lost $1 million or 1 1 1 of # N"),  # the N at the end stays
        ("N N of it", "N 1 of it"),
        ("its # N share", "its #1 share"),
        ("a <unk> of <unk>", "a ? of ?"),
        ("and\\/or", "and/or"),
        ("one \n two", "one\ntwo"),
    ],
    "wikitext": [
        ("a self @-@ made man of 1 @,@ 000 @.@ 5 pounds", "a self-made man of 1,000.5 pounds"),
        ("He said : \" no , never ! \" ; so what ? Well . Then", "He said: \"no, never!\"; so what? Well. Then"),
        ("a film ( 1999 ) [ sic ] { so }", "a film (1999) [sic] {so}"),
        ("the band 's song , the bands ' songs", "the band's song, the bands' songs"),
        ("= = History = =", "== History =="),
        ("= = = Early = = =", "=== Early ==="),
        ("= = = = Birth = = = =", "==== Birth ===="),
        ("at 20 ° C", "at 20°C"),
        ("John Doe Jr. , son of N men", "John Doe Jr., son of 1 men"),
        ("\" Channel Zero ? ! \" was", "\"Channel Zero ?!\" was"),  # the marks in the published order
        ("one \n two", "one\ntwo"),
    ],
    "lambada": [("  “Well,” she said. ‘No.’ \n", "\n\"Well,\" she said. ‘No.’")],
    "ag_news": [
        ("a second\\team of rocketeers competing for the  #36;10 million", "a second team of rocketeers competing for "
                                                                           "the $10 million"),
        ("Eriksson doesn #39;t say  quot;no quot; to J amp;J", "Eriksson doesn't say \"no\" to J&J"),
        ("Turner   Newall; the # 1;", "Turner Newall; the # 1;"),
    ],
}


@pytest.mark.parametrize("name, raw, wanted", [(name, *pair) for name, pairs in EXAMPLES.items() for pair in pairs])
def test_examples(name, raw, wanted):
    assert DETOKENIZERS[name](raw) == wanted


def test_every_name_is_a_choice_and_has_examples():
    assert tuple(DETOKENIZERS) == config.DETOKENIZERS[1:] == tuple(EXAMPLES)
    assert all(task.detokenize in config.DETOKENIZERS for task in benchmarks.TASKS.values())


def lines(path):
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[path.suffix]
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        return file.read().split("\n")


def test_real_lines(data_dir):
    ptb = [DETOKENIZERS["ptb"](line.strip()) for line in lines(data_dir / "ptb" / "ptb.test.txt.gz")]
    assert ptb[0] == "no it wasn't black monday"
    assert not any(re.search(r" n't| 's|<unk>|\\/| N ", line) for line in ptb)
    wiki = [DETOKENIZERS["wikitext"](line.strip()) for line in lines(data_dir / "wikitext2" / "wiki.test.raw.gz")]
    assert wiki[0] == "= Robert Boulter =" and wiki[3] == "== Career =="
    assert wiki[1].startswith("Robert Boulter is an English film, television and theatre actor. He had a guest-")
    assert not any(re.search(r" @[-,.]@ | , | \. | ; ", line) for line in wiki)
    passage = DETOKENIZERS["lambada"](lines(data_dir / "lambada" / "lambada_test.jsonl.gz")[0])
    assert passage.startswith("\n") and not re.search("[“”]", passage)
    raw = "\n".join(lines(data_dir / "ag_news" / "test.csv.gz"))
    news = [DETOKENIZERS["ag_news"](f"{title} {text}") for _, title, text in csv.reader(io.StringIO(raw))]
    assert len(news) == 7600 and not any(re.search(r"\\| #\d+;| quot;|  ", text) for text in news)
    assert sum("doesn't" in text for text in news) > 20
