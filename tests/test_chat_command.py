"""hdlm-jax chat RUN: lines from a pipe, commands, a conversation, what a terminal shows."""
import dataclasses
import io

import pytest
from tiny import SEQ_LEN, model, trained

from hdlm_jax.runs import chat


@pytest.fixture
def talk():
    """A talk with the shared run, and what it has shown."""
    shown = []
    found = chat.Talk(model().run, lambda parts, last: shown.append((parts, last)))
    found.draw = model()._draw  # its programs are compiled already
    found.answer("/steps 6")
    return found, shown


def test_lines_from_a_pipe_are_gone_on_from(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/steps 6\n/stepps 3\n\nThe \n/quit\nnever read\n"))
    run = model().run
    monkeypatch.setattr(chat, "load_run", lambda *_: run)
    capsys.readouterr()  # what training said
    chat.chat(run.config, str(trained()[1]))
    said, steps, wrong, *text = capsys.readouterr().out.split("\n", 3)
    assert "no chat template, so each line is gone on from (completion)" in said and "steps 6" in steps
    assert wrong.startswith("command='stepps': choose one of method, steps") and wrong.endswith("mean 'steps'?")
    assert text == [model().generate(1, prompt="The ", steps=6)[0] + "\n"]


def test_the_canvas_falls_and_the_text_stays(talk):
    found, shown = talk
    assert found.answer("The ") == ""
    (first, _), (last, done) = shown[0], shown[-1]
    assert first == [("The ", 0), ("░" * (SEQ_LEN - 4), 2)]
    assert done and last == [(model().generate(1, prompt="The ", steps=6)[0], 0)]
    assert any(level == 1 and set(text) == {"▒"} for parts, _ in shown for text, level in parts)  # clusters


def test_commands(talk):
    found, shown = talk
    assert found.answer("/method fast_dllm draw=sample") == "method fast_dllm draw=sample, steps 6, seed 0"
    assert found.answer("/seed 3").endswith("seed 3") and found.answer("/length 8") and found.g.length == 8
    before = found.g
    for line, message in {"/method profet": "/method='profet': choose one of .*did you mean 'prophet'",
                          "/method prophet speed=9": "speed", "/steps": "/steps='': needs a whole number",
                          "/steps 0": "steps=0: must be at least 1", f"/length {SEQ_LEN + 1}": "length=17",
                          "/": "command='': choose one of"}.items():
        with pytest.raises(ValueError, match=message) as error:
            found.answer(line)
        assert "\n" not in str(error.value) and found.g == before
    assert "/method NAME" in found.answer("/help") and found.answer("/quit") is None and shown == []


def test_turns_of_a_conversation(talk, monkeypatch):
    found, _ = talk
    asked = []

    def chatted(run, g, turns):
        asked.append([turn["content"] for turn in turns])
        return dataclasses.replace(chat.texts.prompted(run, g, "The "), skip=4)

    monkeypatch.setattr(chat.texts, "chatted", chatted)
    found.chats = True
    found.answer("one")
    found.answer("two")
    answer = model().generate(1, prompt="The ", steps=6)[0].removeprefix("The ")
    assert asked == [["one"], ["one", answer, "two"]]
    monkeypatch.setattr(chat.texts, "chatted", lambda run, g, turns: chat.texts.prompted(run, g, "a" * SEQ_LEN))
    with pytest.raises(ValueError, match="has 16 tokens: must be fewer than the 16 .*; /new forgets what was said"):
        found.answer("a long one")
    monkeypatch.setattr(chat.texts, "chatted", chatted)
    found.answer("/new")
    found.answer("three")
    assert asked[-1] == ["three"]
