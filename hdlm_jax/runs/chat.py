"""hdlm-jax chat RUN: texts in a terminal, seen while they are written."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hdlm_jax.common.console import say
from hdlm_jax.common.extras import package
from hdlm_jax.config import Config, ConfigError, GenerateConfig
from hdlm_jax.config.rules import choice, rule
from hdlm_jax.data import chat as chats
from hdlm_jax.decoding import desk, presets, sampler, texts
from hdlm_jax.training.loading import Run, load_run

HELP = ("/method NAME [OPTION=VALUE ...]   /steps N   /seed N   /length N (what is there counts; 0: all there is "
        "room for)   /new (forgets the conversation)   /help   /quit; anything else is a line for the model")
COMMANDS = ("method", "steps", "seed", "length", "new", "help", "quit")
Part = tuple[str, int]  # text and its level: 0 is a word


def drawn(run: Run, z: Iterable[int]) -> Iterator[Part]:
    """A canvas as text: words as they are, a block for every other token."""
    level_of, mask = run.process.hierarchy.level_of, run.hierarchy.mask_id
    for level, group in itertools.groupby(z, lambda state: 2 if state == mask else int(level_of(state) > 0)):
        states = list(group)
        yield (run.tokenizer.decode(states) if level == 0 else "▒░"[level - 1] * len(states)), level


class Talk:
    """A conversation with a run, or completions where it has no chat template.

    show: called with the parts of each canvas; the last call has the text alone.
    """

    def __init__(self, run: Run, show: Callable[[list[Part], bool], None]):
        self.run, self.show, self.g = run, show, run.config.generate
        self.draw = sampler.sampler_of(run, sampler.load_helper(run, self.g))
        self.chats = bool(run.tokenizer.chat_template)
        self.turns: list[chats.Message] = []

    def answer(self, line: str) -> str | None:
        """What a line of the user's brings: a line to print, "" for nothing more, None for the end.

        Raises:
          ValueError: a wrong command, or what this run cannot write, in one line.
        """
        if not line.startswith("/"):
            self.write(line)
            return ""
        name, _, rest = line[1:].strip().partition(" ")
        choice("command", name, COMMANDS)
        if name == "quit":
            return None
        if name == "help":
            return HELP
        if name == "new":
            self.turns = []
            return "a new conversation"
        if name == "method":
            given = rest.partition(" ")
            choice("/method", given[0], tuple(presets.METHODS))
            return self.set(method=given[0], options=given[2].strip())
        rule(rest.strip().isdecimal(), f"/{name}", rest, f"needs a whole number, as in /{name} 32")
        return self.set(**{name: int(rest)})

    def set(self, **values: Any) -> str:
        """Settings for what comes; the ones before stay where these are refused."""
        now = {f.name: getattr(self.g, f.name) for f in dataclasses.fields(self.g)}
        self.g = texts.settings(self.run, now | values)
        return f"method {self.g.method} {self.g.options}".rstrip() + f", steps {self.g.steps}, seed {self.g.seed}"

    def asked(self, g: GenerateConfig, turns: list[chats.Message]) -> texts.Asked:
        try:
            return texts.chatted(self.run, g, turns)
        except ConfigError as error:
            raise ConfigError(f"{error}; /new forgets what was said before" if self.turns else str(error)) from None

    def write(self, line: str) -> None:
        """The text after a line, shown while it is written; one that is stopped is no turn."""
        g = dataclasses.replace(self.g, num_samples=1, prompt="", schema="")
        turns = [*self.turns, {"role": "user", "content": line}]
        asked = self.asked(g, turns) if self.chats else texts.prompted(self.run, g, line)
        for now in desk.moments(self.draw, self.run.tokenizer, asked, g):
            parts = [(now.text, 0)] if now.done else list(drawn(self.run, now.z[asked.skip:].tolist()))
            self.show(parts, bool(now.done))
            if now.done and self.chats:
                self.turns = [*turns, {"role": "assistant", "content": now.text}]


class _Screen:
    """A terminal on which the canvas falls in place, then stays; no terminal: the finished texts alone."""

    def __init__(self) -> None:
        self.live: Any = None
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if self.terminal:
            self.rich = {name: package(f"rich.{name}", "chat", "--mode=chat") for name in ("live", "text")}

    def show(self, parts: list[Part], last: bool) -> None:
        if not self.terminal:
            if last:
                print(parts[0][0], flush=True)
            return
        seen = self.rich["text"].Text()
        for text, level in parts:  # control characters of a text do nothing to the terminal
            seen.append("".join(c for c in text if c.isprintable() or c in "\n\t"), style="dim" if level else "")
        if self.live is None:
            self.live = self.rich["live"].Live(auto_refresh=False, vertical_overflow="ellipsis")
            self.live.start()
        self.live.vertical_overflow = "visible" if last else "ellipsis"
        self.live.update(seen, refresh=True)
        if last:
            self.stop()

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def lines(self) -> Iterator[str]:
        while True:
            try:
                yield input("> " if self.terminal else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves")


def chat(config: Config, workdir: str) -> None:
    """Reads lines and answers them until there are no more."""
    screen = _Screen()
    run = load_run(config, workdir, config.generate.checkpoint)
    sampler.check_features(run, None)  # lines have none
    talk = Talk(run, screen.show)
    does = ("each line is a turn of the conversation" if talk.chats else
            "it has no chat template, so each line is gone on from (completion)")
    say(f"chat: {workdir}, step {run.step}; {does}. /help for commands, Ctrl-C stops a text, Ctrl-D leaves.")
    for line in screen.lines():
        if not line.strip():
            continue
        try:
            said = talk.answer(line)
        except KeyboardInterrupt:
            said = "stopped"
        except (ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
        finally:
            screen.stop()
        if said is None:
            return
        if said:
            print(said, flush=True)
