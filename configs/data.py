"""Corpora of the papers, as settings of a recipe: data.openwebtext(c), data.lm1b(c).

Where the text lies is told by an environment variable, a path, a folder, a glob or a URL:

    OPENWEBTEXT='owt/*.parquet'              # or openwebtext.tar.xz, subsets/*.tar, *.jsonl.zst, gs://bucket/owt/*.parquet
    LM1B=1-billion-word-language-modeling-benchmark-r13output  BERT_VOCAB=bert-base-uncased/vocab.txt
"""


def openwebtext(c):
    """OpenWebText with GPT-2's words; the last 100,000 documents are held out, as in the papers.

    Their loader took a random window of each document (c.data.packing = "crop", padding = "hidden"); here documents are
    packed.
    """
    c.data.source = "files"
    c.data.files = ("$OPENWEBTEXT",)
    c.data.split = "last"
    c.data.validation_documents = 100_000
    c.tokenizer.kind = "gpt2"


def lm1b(c):
    """The One Billion Word benchmark: a sentence a row of 128 tokens of BERT's uncased words, spacing undone."""
    c.data.source = "files"
    c.data.files = ("$LM1B/training-monolingual.tokenized.shuffled/news.en-*",)
    c.data.validation = ("$LM1B/heldout-monolingual.tokenized.shuffled/news.en.heldout-*",)
    c.data.format = "txt"
    c.data.txt_documents = "line"
    c.data.detokenize = "lm1b"
    c.data.packing, c.data.padding = "crop", "hidden"  # as in the papers: numbers are given the sentences' lengths
    c.tokenizer.kind = "bert"
    c.tokenizer.file = "$BERT_VOCAB"
    c.tokenizer.vocab_size = 30_522
    c.model.seq_len = 128
