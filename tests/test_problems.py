"""Problems answered by writing, and turns of a chat as training rows."""
import json

import numpy as np
import pytest
import tokenfiles
from tiny import model

from hdlm_jax.config import ConfigError, DataConfig, GenerateConfig
from hdlm_jax.data.chat import turns_ids
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.records import Document
from hdlm_jax.data.shards import encode_documents
from hdlm_jax.data.tokenizers import make_tokenizer
from hdlm_jax.evaluation import problems
from hdlm_jax.evaluation.benchmarks import load
from hdlm_jax.evaluation.problems import Problem, number_of, solve


@pytest.mark.parametrize("text, want", [
    ("so\n#### 72", 72.0), ("#### $1,234.50.", 1234.5), ("####-7", -7.0), ("#### .5", 0.5), ("72", None),
    ("#### 3\n#### 4", 3.0), ("#### none", None), ("", None)])
def test_the_number_behind_the_marks(text, want):
    assert number_of(text) == want


def test_right_is_the_solution_s_number(monkeypatch):
    asked = [Problem(f"{i}?", f"it is #### {i}") for i in range(4)]
    monkeypatch.setattr(problems, "answers", lambda run, items, g: (
        ["#### 0", "#### 2.0", "2", "so #### 3,"], np.array([5, 5, 5, 9])))
    found = solve(model().run, asked, GenerateConfig())
    assert found["right"] == [1, 0, 0, 1] and found["accuracy"] == 0.5 and found["accuracy_se"] == 0.25
    assert found["answered"] == 0.75 and found["calls"] == 6


def test_a_run_writes_answers():
    """Whatever they are: to every problem one, the same whichever batch it is in."""
    run, asked = model().run, [Problem("1?", "#### 1"), Problem("2 or so?", "#### 2"), Problem("", "#### 3")]
    assert bytes(problems.asked(run.tokenizer, "1?").astype(np.uint8)) == b"Question: 1?\nAnswer:"
    asked = [p._replace(question="") for p in asked]
    with pytest.raises(ConfigError, match="tokens: must be fewer than the 16"):
        solve(run, asked, GenerateConfig(steps=3))
    short = [np.array([65 + i], np.int32) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "asked", lambda tokenizer, question: short[int(question)])
        items = [Problem(str(i), f"#### {i}") for i in range(3)]
        texts, calls = problems.answers(run, items, GenerateConfig(steps=3, batch_size=2))
    assert len(texts) == 3 and len(calls) == 3


def test_the_data_is_read(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "<<1+1=2>>\n#### 2"}) + "\n")
    assert load("gsm8k", str(file)) == [Problem("1 + 1?", "<<1+1=2>>\n#### 2")]
    file.write_text(json.dumps({"question": "1 + 1?"}) + "\n")
    with pytest.raises(ValueError, match="gsm8k cannot be read"):
        load("gsm8k", str(file))


def test_records_become_turns_of_a_chat(tmp_path):
    words = make_tokenizer("hub", file=str(tokenfiles.folder(tmp_path)))
    documents = [Document("hello there", "1", "hi"), Document("b", "2", "a")]
    found = encode_documents(words, documents, Reader("text", "prompt", chat=True))
    for document, (ids, prompt) in zip(documents, found, strict=True):
        want, given = turns_ids(words, [{"role": "user", "content": document.prompt},
                                        {"role": "assistant", "content": document.text}])
        np.testing.assert_array_equal(ids, [*want, words.eot])
        assert prompt == given and want[-1] == words.turn_end
    with pytest.raises(ConfigError, match="data.chat=True: needs data.prompt_field"):
        DataConfig(chat=True).check()
