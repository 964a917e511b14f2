"""hdlm_jax/text/corpus.py: the embedded corpus, and files of every kind with their error messages."""
import ast
import bz2
import gzip
import hashlib
import json
import lzma
import subprocess
import sys

import pytest

from hdlm_jax.text import corpus
from hdlm_jax.text.corpus import Document


def pack(raw: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(raw) // 2  # two frames, as parallel compressors write
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:]))
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix](raw)


# --------------------------------------------------------------------------------------------------- embedded


def test_embedded_corpus_is_the_documentation_of_python():
    found, unreadable = corpus.embedded_corpus()
    names = [document.name for document in found]
    topics = [name for name in names if name.startswith("topic ")]
    modules = [name for name in names if not name.startswith("topic ")]
    assert names == topics + modules and topics == sorted(topics) and modules == sorted(modules)
    assert len(topics) > 50 and {"ast.py", "asyncio/base_events.py", "textwrap.py"} <= set(modules)
    parts = {part for name in modules for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert sum(len(document.text.encode()) for document in found) > 1_500_000
    assert all(document.text.strip() and not document.prompt for document in found)
    assert unreadable < 20
    text = next(document.text for document in found if document.name == "textwrap.py")
    assert text.startswith("Text wrapping and filling.\n\n") and "Remove any common leading" in text


def test_embedded_corpus_imports_nothing_of_what_it_reads():
    code = ("import sys; from hdlm_jax.text import corpus; before = set(sys.modules); "
            "n = len(corpus.embedded_corpus()[0]); print(n, sorted(set(sys.modules) - before))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, modules = out.split(maxsplit=1)
    assert int(count) == len(corpus.embedded_corpus()[0])
    assert not {"pydoc_data.topics", "this", "tkinter", "turtle", "xmlrpc"} & set(ast.literal_eval(modules))


def test_docstrings_come_in_source_order():
    source = '"""m"""\nclass A:\n  """a"""\n  def f(self):\n    """f"""\n    def g():\n      """g"""\n' \
             '  async def h(self): "h"\ndef i():\n  "  "\ndef j(): return "no"\nclass B: "b"\n'
    assert corpus.docstrings(source) == ["m", "a", "f", "g", "h", "b"]


# ------------------------------------------------------------------------------------------------------ split


def test_split_is_by_sha256_of_the_text():
    for text in ("", "a", "déjà vu"):
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        assert not corpus.split(Document(text, "x"), share * 0.999)
        assert corpus.split(Document(text, "another name"), share * 1.001)
    assert corpus.split(Document("b", "", "a"), 0.5) == corpus.split(Document("ab", ""), 0.5)
    held = sum(corpus.split(Document(str(i), ""), 0.1) for i in range(4000))
    assert abs(held - 400) < 5 * (4000 * 0.09) ** 0.5


def test_fingerprint_sees_boundaries_order_and_text_only():
    def of(*found):
        state = corpus.Fingerprint()
        for document in found:
            state.add(document)
        return state.hexdigest()

    a, b = Document("a", "1"), Document("b", "2")
    assert of(a, b) == of(Document("a", "x"), b)
    assert len({of(a, b), of(b, a), of(Document("ab", "")), of(a), of(), of(Document("", "", "a"))}) == 6


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
def test_every_kind_and_compression_gives_the_same_documents(tmp_path, suffix):
    rows = [{"text": f"text {i} é\n\nmore\r\n", "q": f"ask {i}", "n": i} for i in range(300)]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n" + json.dumps({"text": " ", "q": "empty"})
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines.encode(), suffix))
    got = list(corpus.documents("files", str(tmp_path / "*.jsonl*"), "text", "q"))
    assert got == [Document(row["text"], f"a.jsonl{suffix}:{i + 1}", row["q"]) for i, row in enumerate(rows)]
    raw = "one\r\nline é\n\n\n  \ntwo\n"
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(raw.encode(), suffix))
    path = str(tmp_path / f"b.txt{suffix}")
    assert [document.text for document in corpus.documents("files", path)] == [raw]
    blank = list(corpus.documents("files", [path], txt_documents="blank_line"))
    assert [(document.text, document.name) for document in blank] == [
        ("one\r\nline é", f"b.txt{suffix}:1"), ("two", f"b.txt{suffix}:6")]


def test_globs_are_sorted_and_files_come_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c[1].txt", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setenv("TEST_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def names(*patterns):
        return [document.text for document in corpus.documents("files", patterns)]

    assert names("$TEST_DATA/*.txt") == ["a.txt", "b.txt", "c[1].txt"]
    assert names("b.txt", "./*.txt", str(tmp_path / "a.txt")) == ["b.txt", "a.txt", "c[1].txt"]
    assert names("c[1].txt") == ["c[1].txt"]
    assert names("**/d.txt") == ["sub/d.txt"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert {document.text for document in corpus.documents("files", str(tmp_path / "*"))} == {"hello"}


@pytest.mark.parametrize("name, raw, message", [
    ("a.jsonl", b'{"text": "x"}\n{"body": 1, "id": 2}', "a.jsonl:2: no field 'text'; fields here: 'body'"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', r"a\.jsonl:2: field 'text' must be a string, not int"),
    ("a.jsonl", b'\n{"text": \n', r"a\.jsonl:2: not JSON"),
    ("a.jsonl", b'[1]', r"a\.jsonl:1: a line must be a JSON object, not list"),
    ("a.jsonl", b'{"text": "x\\ud800"}', r"a\.jsonl:1: field 'text' is not Unicode: lone surrogate"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl: not valid UTF-8 at line 2, byte 24 \(0xff"),
    ("a.txt", b"abc\xe9def", r"a\.txt: not valid UTF-8 at byte 3 \(0xe9"),
    ("a.txt", b"\xef\xbb\xbfabc\xe9", r"a\.txt: not valid UTF-8 at byte 6 "),
    ("a.txt.gz", b"plain", r"a\.txt\.gz: cannot be read \(BadGzipFile"),
    ("a.txt.xz", b"plain", r"a\.txt\.xz: cannot be read \(LZMAError"),
    ("a.txt.bz2", b"plain", r"a\.txt\.bz2: cannot be read \(OSError"),
    ("a.txt.zst", b"plain", r"a\.txt\.zst: cannot be read \(ZstdError"),
    ("a.csv", b"x", r"a\.csv: kind of file '\.csv' is unknown; choices: \.txt, \.jsonl, plain or with \.gz"),
    ("a.gz", b"x", r"a\.gz: kind of file '\.gz' is unknown"),
])
def test_errors_name_file_and_place(tmp_path, name, raw, message):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        list(corpus.documents("files", str(tmp_path / name)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_file_cut_short_is_an_error(tmp_path, suffix):
    raw = pack("".join(json.dumps({"text": str(i)}) + "\n" for i in range(5000)).encode(), suffix)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(raw[:-40])
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+: (cannot be read \(EOFError|not valid|.*not JSON)"):
        list(corpus.documents("files", str(tmp_path / f"a.jsonl{suffix}")))


def test_zst_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match="a.txt.zst: .zst needs the zstandard package: pip install"):
        list(corpus.documents("files", str(tmp_path / "a.txt.zst")))


@pytest.mark.parametrize("arguments, message", [
    (dict(source="web"), "data.source is 'web'; choices: embedded, files"),
    (dict(source="files"), "data.files is empty"),
    (dict(source="files", files=("nowhere/*.txt",)), r"data.files: no file matches 'nowhere/\*.txt'"),
    (dict(source="files", files="$NO_SUCH_VAR/a.txt"), r"no file matches .* is the variable set\?"),
    (dict(source="files", files=__file__), r"kind of file '\.py' is unknown"),
])
def test_wrong_sources(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(corpus.documents(**arguments))


def test_wrong_options(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="data.txt_documents is 'line'; choices: file, blank_line"):
        list(corpus.documents("files", str(tmp_path / "a.txt"), txt_documents="line"))
    with pytest.raises(ValueError, match="data.prompt_field='q' needs .jsonl files"):
        list(corpus.documents("files", str(tmp_path / "a.txt"), prompt_field="q"))


def test_local_books(data_dir):
    path = data_dir / "openstax" / "openstax_cc_by.valid.jsonl.xz"
    if not path.exists():
        pytest.skip(f"no {path.name} in the local data")
    found = list(corpus.documents("files", str(path)))
    assert len(found) == 82 and found[-1].name == "openstax_cc_by.valid.jsonl.xz:82"
