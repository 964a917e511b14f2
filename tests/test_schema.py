"""JSON schemas as canvases: whatever is drawn parses and validates, and means what it says."""

import json
import types

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_canvas import bpe, clusters, law_of, processed, write

from hdlm_jax.data.tokenizers import make_tokenizer
from hdlm_jax.decoding import guide, schema

SCHEMA = {
    "type": "object", "title": "All of it", "required": ["name"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 2, "budget": 5},
        "say \"é\"\\": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "one": {"type": "integer", "budget": 1},
        "score": {"type": "number"},
        "small": {"type": "number", "minimum": 0, "budget": 2},
        "on": {"type": "boolean"},
        "nothing": {"type": "null"},
        "kind": {"const": {"a": [1, None]}},
        "colour": {"enum": ["red", "dark red", "dark blue", "", "a \"quote\"", "日本語 é"]},
        "any": {"enum": [1, "1", None, True, {"deep": [1.5]}, [], -12345]},
        "level": {"type": "integer", "enum": [1, 12, 123]},
        "inner": {"type": "object", "properties": {
            "tags": {"type": "array", "items": {"type": "string", "budget": 3}, "minItems": 2, "maxItems": 2},
            "none": {"type": "array", "minItems": 0, "maxItems": 0},
            "numbers": {"type": "array", "minItems": 3, "maxItems": 3, "items": {"type": "number", "budget": 9}},
            "empty": {"type": "object"}}},
    },
}


def check(made, spec, tokens):
    """The row parses, and validates with another's validator; its keys are the schema's, in their order."""
    text = made.text(tokens)
    found = json.loads(text)
    assert found == made.read(tokens)
    jsonschema.Draft202012Validator(spec).validate(found)
    text.encode()  # Unicode without lone surrogates
    if spec.get("type") == "object":
        assert list(found) == list(spec.get("properties", {}))
    return found


def harms(tokenizer):
    """Orders of words, the most harmful last, each by another notion of harm."""
    words = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    marks = (b'"', b"\\", b"0", b"-", b".", b" ", b"\n", b"\xff", b",", b"}", b"e")
    for mark in marks:
        yield np.array([word.count(mark) + len(word) / 1e3 for word in words])
    yield np.array([float(len(word)) for word in words])
    yield np.array([-float(len(word)) for word in words])
    yield np.array([sum(b > 127 for b in word) + 0.0 for word in words])
    yield np.arange(len(words)) + 0.0  # fillers wherever they may stand
    yield -np.arange(len(words)) - 0.0


def attack(made, spec, rng, draws):
    """Rows drawn word by word from what is allowed: uniformly, by harm, and mixed."""
    start = made.canvas()
    z, free = start.z[0], ~start.given[0]
    sets = {k: np.flatnonzero(row) for k, row in enumerate(start.allowed)}
    assert (start.kind[0, free] > 0).all()
    orders = list(harms(made.tokenizer))
    for draw in range(draws + len(orders)):
        row = z.copy()
        for place in np.flatnonzero(free):
            words = sets[start.kind[0, place]]
            if draw < len(orders):
                row[place] = words[np.argmax(orders[draw][words])]
            elif draw % 2:
                row[place] = rng.choice(words)
            else:
                row[place] = words[np.argmax(orders[rng.integers(len(orders))][words])]
        check(made, spec, row)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_whatever_is_drawn_parses_and_validates(kind):
    tokenizer = bpe() if kind == "bpe" else make_tokenizer("bytes")
    h = clusters(tokenizer.vocab_size, (8,))
    made = schema.scaffold(SCHEMA, tokenizer, h, 6, prompt="As JSON: ")
    attack(made, SCHEMA, np.random.default_rng(7), 150)


def test_whatever_is_drawn_parses_with_gpt2_s_words(data_dir, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken_cache"))
    tokenizer = make_tokenizer("gpt2")
    made = schema.scaffold(SCHEMA, tokenizer, clusters(tokenizer.vocab_size, (64,)), 6)
    attack(made, SCHEMA, np.random.default_rng(8), 100)


FIELDS = st.one_of(
    st.builds(lambda least, more: {"type": "string", "minLength": least, "budget": least + more},
              st.integers(0, 3), st.integers(1, 4)),
    st.builds(lambda kind, n, least: {"type": kind, "budget": n} | least, st.sampled_from(["integer", "number"]),
              st.integers(1, 9), st.sampled_from([{}, {"minimum": 0}])),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string"}]),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(
        st.text(max_size=6).filter(lambda s: s.isprintable()), st.integers(-999, 999), st.booleans(), st.none(),
        st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=5)),
)
SCHEMAS = st.recursive(FIELDS, lambda inner: st.one_of(
    st.builds(lambda p: {"type": "object", "properties": p, "required": list(p)},
              st.dictionaries(st.text(max_size=4).filter(lambda s: s.isprintable()), inner, max_size=3)),
    st.builds(lambda item, n: {"type": "array", "items": item, "minItems": n, "maxItems": n}, inner, st.integers(0, 3)),
), max_leaves=6)


@settings(max_examples=25)
@given(SCHEMAS, st.integers(0, 2**32 - 1))
def test_any_schema(spec, seed):
    made = schema.scaffold(spec, bpe(), clusters(bpe().vocab_size, (8,)), 4)
    attack(made, spec, np.random.default_rng(seed), 10)


@pytest.mark.parametrize("sizes, xi, by", [
    ((16,), 1.0, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ((), 1.0, 1), ((16,), 1.0, 2), ((16, 4), 0.9, 1)))])
def test_a_random_network_writes_json(sizes, xi, by):
    """Through the denoiser and the process: clusters on the way, many positions a call, literals as they were."""
    t = bpe()
    process = processed(clusters(t.vocab_size, sizes), xi)
    made = schema.scaffold(SCHEMA, t, process.hierarchy, 4, prompt="JSON:")
    start = made.canvas(rows=12)

    def network(z, at):  # knows nothing, with great confidence; another answer to every z
        key = jax.random.fold_in(jax.random.key(9), jnp.sum(z * (jnp.arange(z.size).reshape(z.shape) % 977)))
        return 20 * jax.random.normal(key, (*z.shape, t.vocab_size))

    denoiser = guide.Constrained(process, network, start.allowed)
    groups = np.random.default_rng(10).permutation(start.z.shape[1]).reshape(-1)
    words = write(process, denoiser, start.z, start.kind, np.array_split(groups, 3), by=by)
    np.testing.assert_array_equal(words[start.given], start.z[start.given])
    for row in words:
        check(made, SCHEMA, row)
    assert len({made.text(row) for row in words}) == 12


def spell(made, *parts):
    """A row in which every field, in order, has the words of these lists (None: fillers)."""
    row, fields = list(made.prompt), iter(parts)
    for piece in made.pieces:
        if isinstance(piece, schema.Literal):
            row += piece.ids
        else:
            words = [made.tokenizer.eot if w is None else int(made.tokenizer.encode(w)[0]) for w in next(fields)]
            row += words + [made.tokenizer.eot] * (len(piece.sets) - len(words))
    return row


@pytest.mark.parametrize("spec, words, want", [
    ({"type": "integer"}, ["0", "0", "7", None, None, "0"], "70"),
    ({"type": "integer"}, ["-", "0", None, "0", "0", "0"], "-0"),
    ({"type": "integer"}, [None, None, None, None, "1", "2"], "12"),
    ({"type": "integer", "budget": 1}, [" -"], None),
    ({"type": "integer", "minimum": 0}, ["-", "1", "1", "1", "1", "1"], None),
    ({"type": "integer"}, ["1", None, None, None, None, None], None),  # the digit that must be
    ({"type": "number"}, ["-", None, None, "0", ".", "5"], "-0.5"),
    ({"type": "number"}, ["1", None, None, "2", ".", None], "12"),
    ({"type": "number"}, ["0", None, None, "2", None, "5"], "25"),
    ({"type": "number"}, ["1", ".", None, "2", ".", None], None),
    ({"type": "string", "budget": 3}, [None, "a", None], '"a"'),
    ({"type": "string", "budget": 3}, [], '""'),
    ({"type": "string", "budget": 3, "minLength": 1}, [None, "a"], None),
    ({"type": "string", "budget": 3}, ["\""], None),
    ({"type": "string", "budget": 3}, ["\\"], None),
    ({"type": "string", "budget": 3}, ["\n"], None),
])
def test_what_fields_mean(spec, words, want):
    made = schema.scaffold(spec, bpe(), clusters(bpe().vocab_size, (8,)))
    row, start = spell(made, words), made.canvas()
    assert start.allowed[start.kind[0], row].all() == (want is not None)
    if want is not None:
        assert made.text(row) == want


def test_choices_are_decided_from_the_left():
    """The first position where choices differ always decides; words of no choice left are passed over."""
    t = make_tokenizer("bytes")
    made = schema.scaffold({"enum": ["ab", "acd", "xcd"]}, t, clusters(257, (8,)))
    for drawn, want in (("ab", "ab"), ("acd", "acd"), ("abd", "ab"), ("xb", "xcd"), ("xcd", "xcd")):
        assert made.read(spell(made, list(drawn))) == want
    assert made.canvas().given[0].tolist() == [True, False, False, False, True]
    same = schema.scaffold({"enum": ["dark red", "dark blue"]}, t, clusters(257, (8,))).canvas()
    np.testing.assert_array_equal(same.z[0, :6], t.encode('"dark '))  # what all choices share is given


def test_each_choice_has_its_own_probability():
    """Choices of one word: the law of the choice is the network's law over those words, cut and normalised."""
    t = make_tokenizer("bytes")
    process = processed(clusters(257, (8,)))
    made = schema.scaffold({"type": "object", "properties": {"k": {"enum": ["a", "b", "c"]}}}, t, process.hierarchy)
    start = made.canvas()
    logits = np.zeros(257, np.float32)
    logits[t.encode("abc")] = np.log([1, 2, 5])
    denoiser = guide.Constrained(process, lambda z, at: jnp.broadcast_to(jnp.asarray(logits), (*z.shape, 257)),
                                 start.allowed)
    place = np.flatnonzero(~start.given[0])
    law = law_of(denoiser, start.z, start.kind, place)[0]
    want = np.zeros(257)
    for word, share in zip(t.encode("abc"), (1, 2, 5), strict=True):
        want[word] = share / 8
        row = start.z[0].copy()
        row[place] = word
        assert made.read(row) == {"k": chr(word)}
    np.testing.assert_allclose(law, want, atol=1e-6)


def test_strings_take_whole_characters_alone():
    letters = schema.scaffold({"type": "string", "budget": 4}, make_tokenizer("bytes"), clusters(257, (8,))).canvas()
    assert not letters.allowed[1][128:256].any() and letters.allowed[1][32:127].sum() == 93


@pytest.mark.parametrize("spec, message", [
    ({"type": "strin"}, r"schema at \$: type='strin': choose one of object, array"),
    ({"type": ["string", "null"]}, r"type=\['string', 'null'\]: choose one of"),
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}}, r"\$.a: 'pattern' cannot be kept"),
    ({"type": "integer", "minimum": 3}, "minimum=3 cannot be kept; 0 is the only one"),
    ({"type": "integer", "maximum": 3}, "'maximum' cannot be kept"),
    ({"type": "array", "items": {"type": "null"}}, "an array needs minItems = maxItems"),
    ({"type": "array", "items": {"type": "nul"}, "minItems": 1, "maxItems": 1}, r"\$\[0\]: type='nul'"),
    ({"type": "array", "minItems": 1, "maxItems": 1}, r"\$\[0\]: must be an object, is None"),
    ({"type": "object", "required": ["b"], "properties": {}}, "'b' is required, and not in properties"),
    ({"type": "string", "budget": 0}, r"\$: budget=0: must be a whole number of at least 1"),
    ({"type": "string", "minLength": 3, "budget": 2}, "minLength=3 needs a budget of as many, which is 2"),
    ({"type": "number", "budget": 101}, "budget=101: a number has at most 100"),
    ({"type": "string", "enum": ["a", 1]}, "1 in enum is no string"),
    ({"type": "integer", "const": True}, "True in enum is no integer"),
    ({"enum": []}, "enum must be a list of at least one value"),
    ({"enum": ["a"], "budget": 2}, "'budget' cannot be kept"),
    ({}, "no type, enum or const"),
    ("{", "schema is not JSON"),
    ({"type": "object", "required": 1}, "required must be a list of names, is 1"),
    ({"type": "object", "required": [[]]}, r"\$: \[\] is required, and not in properties"),
    ({"enum": [float("nan"), 1]}, "schema: nan cannot be written as JSON"),
    (list(range(10**6)), r"must be an object, is \[0, 1, 2, 3, 4, 5, \.\.\.\]$"),
    ([1], r"schema at \$: must be an object, is \[1\]"),
])
def test_schemas_that_cannot_be_kept(spec, message):
    with pytest.raises(ValueError, match=message):
        schema.scaffold(spec, bpe(), clusters(bpe().vocab_size, (8,)))


def nested(depth, items, inner=None):
    """Arrays of so many items inside each other."""
    for _ in range(depth):
        inner = {"type": "array", "minItems": items, "maxItems": items, "items": inner or {"type": "null"}}
    return inner


def deep(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("spec, message", [
    (nested(3, 1000), r"\$\[0\]\[\d+\]\[\d+\]: up to here more than 1,048,576 characters .*; give shorter arrays"),
    (nested(1, 10**18), "up to here more than 1,048,576 characters"),
    (nested(3, 30, {"type": "string", "budget": 4}), "up to here 1,028 positions are free, a text has at most 1,024"),
    (nested(1, 2000, {"enum": ["a", "b"]}), r"\$\[1024\]: up to here 1,025 positions"),
    (nested(3000, 1), "nested more than 64 deep; give a flatter one"),
    ('{"a":' * 3000 + "1" + "}" * 3000, "schema is nested more than 64 deep"),
    ({"const": deep(3000)}, r"schema: \[\[.*\.\.\..*\]\] cannot be written as JSON \(maximum recursion"),
    ({"type": "string", "budget": 10**9}, "up to here 1,000,000,000 positions"),
    ({"enum": list(range(10**6))}, "more than 1,048,576 characters"),
    ({"const": "a" * 10**7}, "more than 1,048,576 characters"),
], ids=range(10))
def test_a_few_characters_ask_for_no_end_of_text(spec, message, monkeypatch):
    """Refused before much is written, encoded, or made of arrays."""
    written, write = [], schema._Compiler.write
    monkeypatch.setattr(schema._Compiler, "write", lambda *given: written.append(0) or write(*given))
    with pytest.raises(ValueError, match=message) as error:
        schema.scaffold(spec, bpe(), clusters(bpe().vocab_size, (8,)), seq_len=1024)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
    assert len(written) <= 1 + schema._MOST_TEXT // schema._PIECE


def test_what_an_array_repeats_is_encoded_once(monkeypatch):
    t, calls = bpe(), []
    monkeypatch.setattr(t, "encode", lambda text: calls.append(text) or type(t).encode(t, text))
    made = schema.scaffold(nested(1, 50, {"enum": [f"word {i}" for i in range(40)]}), t, clusters(t.vocab_size, (8,)))
    assert len(calls) < 2 * 40 + 60 and len({id(piece.sets) for piece in made.pieces[1::2]}) == 2


def test_scaffolds_know_their_words():
    t, h = bpe(), clusters(bpe().vocab_size, (8,))
    spec = json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}})
    made = schema.scaffold(spec, t, h, prompt="the")
    row = spell(made, [" true"])
    assert made.read(row) == {"a": True}
    with pytest.raises(ValueError, match="kind='bert'"):
        schema.scaffold({"type": "null"}, types.SimpleNamespace(kind="bert"), h)
