"""What the corpora of the zero-shot tables did to their text, undone: functions of a text, by name.

Most of them were published word by word, with blanks around punctuation; a model of ordinary text would be charged for
that. The rules are those of the evaluation code behind the published tables (GPT-2, SEDD, MDLM), in its order, because
perplexities compare only at equal rules. They are meant for one line or sentence at a time: those that pair quotes and
brackets lose the thread in longer texts.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable

Rules = tuple[tuple[str, str], ...]

# One Billion Word: blanks around punctuation, brackets, quotes and clitics, and in web addresses.
LM1B = (
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),  # they 've
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "),
    (r" \?$", "?"),
    (r" ! ", "! "),
    (r" !$", "!"),
    (r" , ", ", "),
    (r" : ", ": "),
    (r" ; ", "; "),
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
)

# Penn Treebank in Mikolov's form: clitics set apart, numbers as N (read as 1), rare words as <unk> (read as ?). That it
# is lower-case and without punctuation cannot be undone.
PTB = (
    (r" 's", "'s"),
    (r"s ' ", "s' "),  # the traders ' screens
    (r" n't", "n't"),
    (r" \n ", "\n"),
    (r"\\/", "/"),
    (r"(?<= )N(?= )", "1"),  # every number is N; one at either end of a line stays
    (r"([$#]) 1", r"\g<1>1"),
    (r"<unk>", "?"),
)

# WikiText: blanks around punctuation, brackets and quotes, @-@ @,@ @.@ inside words and numbers, split = =.
WIKITEXT = (
    (r"s '", "s'"),
    (r" @([-,.])@ ", r"\1"),  # in words and numbers: self @-@ made, 1 @,@ 000
    *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),  # one after the other: "Jr. , son" and "Zero ?!" hang on it
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)

# A character reference whose ampersand was lost ("Turner   Newall", " #36;10"), and what else stands for a character.
_REFERENCE = re.compile(r" ?#(\d{2,5});| (quot|amp|lt|gt|hellip|nbsp);")


def lambada(text: str) -> str:
    """LAMBADA in OpenAI's form: curly double quotes become straight, outer blanks one line end in front."""
    return "\n" + re.sub("[“”]", '"', text).strip()


def ag_news(text: str) -> str:
    r"""AG News as it is distributed: line ends are backslashes, character references have lost their ampersand.

    "a second\team of rocketeers competing for the  #36;10 million" is mended to "a second team of rocketeers competing
    for the $10 million". The published tables leave the text as it is, so the task `ag_news` does as well.
    """
    text = _REFERENCE.sub(lambda found: html.unescape(f"&#{found[1]};" if found[1] else f"&{found[2]};"), text)
    return re.sub(r" {2,}", " ", text.replace("\\", " ")).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "lm1b": functools.partial(_apply, LM1B), "ptb": functools.partial(_apply, PTB),
    "wikitext": functools.partial(_apply, WIKITEXT), "lambada": lambada, "ag_news": ag_news}
