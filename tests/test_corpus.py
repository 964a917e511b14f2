"""hdlm_jax.data.documents and what it reads from: the embedded corpus, files of every kind, and damaged ones."""
import ast
import bz2
import gzip
import hashlib
import io
import json
import lzma
import platform
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import owt
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hdlm_jax.data import archives, documents
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.embedded import EMBEDDED, docstrings, embedded_corpus
from hdlm_jax.data.records import Bad, Document, is_validation
from hdlm_jax.data.sources import resolve, source_facts

HASHED = lambda path: (Path(path).stat().st_size, hashlib.sha256(Path(path).read_bytes()).hexdigest())  # noqa: E731
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
        ".zst": zstandard.ZstdCompressor().compress}


def pack(raw: bytes, suffix: str) -> bytes:
    """`raw` in two streams, as parallel compressors write, with padding between where the format knows it."""
    half = len(raw) // 2
    padding = b"\0" * 4 if suffix in (".gz", ".xz") else b""
    return PACK[suffix](raw[:half]) + padding + PACK[suffix](raw[half:]) if suffix else raw


def tar(members: dict[str, bytes], **kinds: bytes) -> bytes:
    """An archive of `members` in order; `kinds` are types of members that are no files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, raw in members.items():
            header = tarfile.TarInfo(name)
            header.type, header.size = kinds.get(name, tarfile.REGTYPE), len(raw)
            archive.addfile(header, io.BytesIO(raw))
    return buffer.getvalue()


def parquet(columns: dict, **options) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path: Path, raw: bytes | None = None, **settings) -> list[Document | Bad]:
    """All records of a file, which is made of `raw` when that is given."""
    if raw is not None:
        path.write_bytes(raw)
    return list(Reader(**settings).read(str(path)))


def texts(records: list[Document | Bad]) -> list[str]:
    """The texts of records that must all be documents."""
    assert not [record for record in records if isinstance(record, Bad)]
    return [record.text for record in records]


# --------------------------------------------------------------------------------------------------- embedded


@pytest.mark.slow
def test_embedded_corpus_is_the_documentation_of_python():
    found, unreadable = embedded_corpus()
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


@pytest.mark.slow
def test_embedded_corpus_imports_nothing_of_what_it_reads():
    code = ("import sys; from hdlm_jax.data.embedded import embedded_corpus; before = set(sys.modules); "
            "n = len(embedded_corpus()[0]); print(n, sorted(set(sys.modules) - before))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, modules = out.split(maxsplit=1)
    assert int(count) == len(embedded_corpus()[0])
    assert not {"pydoc_data.topics", "this", "tkinter", "turtle", "xmlrpc"} & set(ast.literal_eval(modules))


def test_docstrings_come_in_source_order():
    source = '"""m"""\nclass A:\n  """a"""\n  def f(self):\n    """f"""\n    def g():\n      """g"""\n' \
             '  async def h(self): "h"\ndef i():\n  "  "\ndef j(): return "no"\nclass B: "b"\n'
    assert docstrings(source) == ["m", "a", "f", "g", "h", "b"]


# ------------------------------------------------------------------------------------------------------ split


def test_split_is_by_sha256_of_the_text():
    for text in ("", "a", "déjà vu"):
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        assert not is_validation(Document(text, "x"), share * 0.999)
        assert is_validation(Document(text, "another name"), share * 1.001)
    assert is_validation(Document("b", "", "a"), 0.5) == is_validation(Document("ab", ""), 0.5)
    held = sum(is_validation(Document(str(i), ""), 0.1) for i in range(4000))
    assert abs(held - 400) < 5 * (4000 * 0.09) ** 0.5


# ------------------------------------------------------------------------------------------------ kinds of files


@pytest.mark.parametrize("suffix", PACK)
def test_every_kind_and_compression_gives_the_same_documents(tmp_path, suffix):
    rows = [{"text": f"text {i} é\n\nmore\r\n", "q": f"ask {i}", "n": i} for i in range(300)]
    lines = jsonl(rows) + b"\n" + jsonl([{"text": " ", "q": "empty"}])
    for kind in ("jsonl", "ndjson", "json"):
        name = f"a.{kind}{suffix}"
        got = read(tmp_path / name, pack(lines, suffix), prompt_field="q")
        assert got == [Document(row["text"], f"{name}:{i + 1}", row["q"]) for i, row in enumerate(rows)]
    columns = {key: [row[key] for row in rows] + [" "] for key in ("text", "q")}
    name = f"a.parquet{suffix}"
    got = read(tmp_path / name, pack(parquet(columns, row_group_size=70), suffix), prompt_field="q")
    assert got == [Document(row["text"], f"{name}:{i + 1}", row["q"]) for i, row in enumerate(rows)]

    raw = "one\r\nline é\n\n\n  \ntwo\n".encode()
    name = f"b.txt{suffix}"
    assert read(tmp_path / name, pack(raw, suffix)) == [Document(raw.decode(), name)]
    assert read(tmp_path / name, txt_documents="blank_line") == [
        Document("one\r\nline é", f"{name}:1"), Document("two", f"{name}:6")]
    assert read(tmp_path / name, txt_documents="line") == [
        Document("one", f"{name}:1"), Document("line é", f"{name}:2"), Document("two", f"{name}:6")]

    # The same inside of archives, where the contents decide: a tar in a tar, files named as they like.
    members = {"x/deep": pack(tar({"1.txt": b"first", "2": pack(raw, suffix)}), suffix), "lines.jsonl": lines,
               f"x/rows.{'p' if suffix else 'parquet'}": pack(parquet(columns), suffix), "x/3.TXT": b"last"}
    names = [f"c.tar{suffix}", *({".gz": ["c.tgz"], ".xz": ["c.txz"]}.get(suffix, []))]
    for name in names:
        got = read(tmp_path / name, pack(tar(members), suffix))
        assert texts(got) == ["first", raw.decode(), *columns["text"][:-1], *columns["text"][:-1], "last"]
        assert [record.name for record in got[:3]] == [
            f"{name}:x/deep/1.txt", f"{name}:x/deep/2", f"{name}:lines.jsonl:1"]


@pytest.mark.parametrize("layout", owt.LAYOUTS)
def test_openwebtext_as_it_is_distributed(tmp_path, layout):
    documents = owt.openwebtext_documents(40)
    paths = owt.make_openwebtext(tmp_path, documents, outer=layout)
    sources = resolve(str(tmp_path / "*"))
    assert sources == [str(path) for path in paths] and len(paths) == 1 + (layout != "tar.xz")
    got = [record for source in sources for record in Reader().read(source)]
    assert texts(got) == documents
    if "tar" in layout:
        assert got[0].name.startswith(f"{paths[0].name}:openwebtext/urlsf_subset00-1_data.xz/0000001-")


def test_openwebtext_unpacked_once(tmp_path):
    """urlsf_subset00-1_data.xz on disk: neither name says that it is a tar, its content does."""
    documents = owt.openwebtext_documents(10)
    (path,) = owt.make_openwebtext(tmp_path, documents, subsets=1, members=1)
    with tarfile.open(path) as archive:
        raw = archive.extractfile("openwebtext/urlsf_subset00-1_data.xz").read()
    path = tmp_path / "urlsf_subset00-1_data.xz"
    assert texts(read(path, raw)) == documents and Reader().check(str(path)) == "tar"


def test_lm1b_as_it_is_distributed(tmp_path):
    folder = "1-billion-word-language-modeling-benchmark-r13output"
    raw = tar({folder: b"", f"{folder}/README": b"a word\n", f"{folder}/.DS_Store": b"\xff", f"{folder}/._x": b"\xff",
               f"{folder}/training-monolingual.tokenized.shuffled/news.en-00001-of-00100": b"It 's so .\nIs it ?\n",
               f"{folder}/link": b""}, **{folder: tarfile.DIRTYPE, f"{folder}/link": tarfile.SYMTYPE})
    got = read(tmp_path / "lm1b.tar.gz", gzip.compress(raw), txt_documents="line", detokenize="lm1b")
    assert texts(got) == ["a word", "It's so.", "Is it?"]
    assert got[2].name.endswith("news.en-00001-of-00100:2")


def test_format_overrides_the_name(tmp_path):
    row = jsonl([{"text": "x"}])
    assert texts(read(tmp_path / "news.en-00001-of-00100", row, format="jsonl")) == ["x"]
    assert texts(read(tmp_path / "a.jsonl", row, format="txt")) == [row.decode()]
    assert texts(read(tmp_path / "b", gzip.compress(row), format="txt")) == [row.decode()]  # packed, and not so named
    assert texts(read(tmp_path / "c.data", parquet({"text": ["x"]}))) == ["x"]
    assert texts(read(tmp_path / "d", parquet({"text": ["x"]}), format="parquet")) == ["x"]


def test_columns_of_any_type_of_text(tmp_path):
    words = ["a", "b\u00e9", "a"]
    types = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
    for kind in types:
        raw = parquet({"text": pyarrow.array(words, kind), "id": [1, 2, 3]})
        assert texts(read(tmp_path / "a.parquet", raw)) == words
    raw = parquet({"text": pyarrow.array([b"a", b"\xff", None, b"c"], pyarrow.binary())})
    path = tmp_path / "a.parquet"
    assert read(path, raw) == [
        Document("a", "a.parquet:1"),
        Bad(str(path), "row 2", "field 'text' is not Unicode (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff "
                                "in position 0: invalid start byte)"),
        Bad(str(path), "row 3", "field 'text' must be a string, not NoneType"), Document("c", "a.parquet:4")]
    with pytest.raises(ValueError, match="a.parquet: text must be text .*int64"):
        read(path, parquet({"text": [1]}))


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts(read(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]
    assert texts(read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}')) == ["hello"]
    assert texts(read(tmp_path / "a.jsonl", b"\xef\xbb\xbf")) == []


ROWS = [{"text": "one\nline", "q": "é"},
        {"q": "2", "text": "two ] } , \\\" [", "n": [1, {"x": None}]}, {"text": "3", "q": "3"}]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays_are_records(tmp_path, indent, suffix):
    wanted = [Document(row["text"], f"a.json{suffix}:{i}", row["q"]) for i, row in enumerate(ROWS, 1)]
    for ascii in (True, False):
        raw = b" \n" + json.dumps(ROWS, indent=indent, ensure_ascii=ascii).encode() + b"\n "
        assert read(tmp_path / f"a.json{suffix}", PACK[suffix](raw), prompt_field="q") == wanted
    assert texts(read(tmp_path / "b.json", b"\xef\xbb\xbf[]")) == []
    packed = read(tmp_path / "a.tar", tar({f"x.json{suffix}": PACK[suffix](raw)}), prompt_field="q")
    assert [record[::2] for record in packed] == [record[::2] for record in wanted]
    assert read(tmp_path / "lines", raw, format="json", prompt_field="q")[2].text == "3"


def test_json_objects_that_span_lines(tmp_path):
    one = json.dumps(ROWS[0], indent=4).encode()
    assert texts(read(tmp_path / "a.json", one)) == ["one\nline"]
    assert texts(read(tmp_path / "a.json", one + b"\n" + one)) == ["one\nline"] * 2
    assert texts(read(tmp_path / "a.json", json.dumps(ROWS[0]).encode())) == ["one\nline"]
    (document, bad) = read(tmp_path / "a.json", b'{"text": "x"}\n{"text": \n')  # lines, each for itself
    assert (document.text, bad.position) == ("x", "line 2")
    with pytest.raises(ValueError, match=r"a\.json: no field 'text' in its first record; fields there: 'data'"):
        read(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=1).encode())


@pytest.mark.parametrize("raw, good, position, reason", [
    (b'[{"text": "x"}, [1], {"text": "y"}]', "xy", "record 2", "a record must be a JSON object, not list"),
    (b'[{"text": "x"}, 12345, {"text": "y"}]', "xy", "record 2", "a record must be a JSON object, not int"),
    (b'[{"text": "x"}, {"text": "\xff"}, {"text": "y"}]', "xy", "record 2", "field 'text' is not Unicode"),
    (b'[{"text": "x"}, {"body": 1}]', "x", "record 2", "no field 'text'; fields here: 'body'"),
    (b'[{"text": "x"}, {"text": 1 2}, {"text": "y"}]', "x", "record 2", "not JSON (Expecting ',' delimiter)"),
    (b'[{"text": "x"} {"text": "y"}]', "x", "record 2", "not JSON (found '{' behind an element)"),
    (b'[{"text": "x"}, {"text": "y"', "x", "record 2", "not JSON (Expecting ',' delimiter)"),
    (b'[{"text": "x"}, {"text": "y', "x", "record 2", "not JSON (Unterminated string"),
    (b'[{"text": "x"}', "x", "record 2", "not JSON (the array is cut short)"),
    (b'[{"text": "x"},', "x", "record 2", "not JSON (Expecting value)"),
    (b'[{"text": "x"}] []', "x", "record 2", "not JSON (found '[' behind the end of the array)"),
    (b'[{"text": "x"}, ' + b"[" * 100_000, "x", "record 2", "not JSON (RecursionError: "),
    (b'{\n"text": "x"}\n{"text" "y"}', "x", "record 2", "not JSON (Expecting ':' delimiter)"),
])
def test_bad_records_of_json(tmp_path, raw, good, position, reason):
    records = read(tmp_path / "a.json", raw)
    (bad,) = [record for record in records if isinstance(record, Bad)]
    assert "".join(record.text for record in records if isinstance(record, Document)) == good
    assert (bad.file, bad.position) == (str(tmp_path / "a.json"), position) and bad.reason.startswith(reason)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_told_by_their_mark(tmp_path, encoding):
    text = "one é 中 \U0001f600\r\n\ntwo ਊ\u0a0a\n"  # U+0A0A: bytes that look like line ends

    def wide(text: str) -> bytes:
        return ("\ufeff" + text).encode(encoding)

    assert texts(read(tmp_path / "a.txt", wide(text))) == [text]
    assert texts(read(tmp_path / "a.txt", txt_documents="line")) == [text.splitlines()[0], text.splitlines()[2]]
    assert texts(read(tmp_path / "a.txt", wide(text * 50_000))) == [text * 50_000]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    for name, raw in {"a.jsonl": wide(lines), "a.json": wide(json.dumps(ROWS)),
                      "a.jsonl.gz": gzip.compress(wide(lines)),
                      "a.tar": tar({"x.jsonl": wide(lines)})}.items():
        assert texts(read(tmp_path / name, raw)) == [row["text"] for row in ROWS]
    # a lone surrogate spoils its line; a file cut inside a character is cut short
    if encoding.startswith("utf-16"):
        raw = wide("a\n") + "\ud800".encode(encoding, "surrogatepass") + "x\nb\n".encode(encoding)
        first, bad, last = read(tmp_path / "a.txt", raw, txt_documents="line")
        assert (first.text, bad.position, last.text) == ("a", "line 2, byte 0", "b")
    *good, bad = read(tmp_path / "a.txt", wide("a\nb") + b"x", txt_documents="line")
    assert [record.text for record in good][:1] == ["a"] and "truncated data" in bad.reason
    assert read(tmp_path / "a.txt", "\ufeff".encode(encoding)) == []


def test_folders_are_read(tmp_path, monkeypatch):
    """All of known kinds beneath, sorted; what is there is said, once a folder."""
    folder = tmp_path / "data"
    for name in ("b.txt", "a.jsonl.gz", "sub/c.JSON", "sub/deep/d.parquet", "x.md", "sub/y", "e.md", ".z.txt",
                 ".git/z.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "link.txt").symlink_to(folder / "b.txt")
    said: list[str] = []
    names = ["a.jsonl.gz", "b.txt", "sub/c.JSON", "sub/deep/d.parquet"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (folder, f"{folder}/", "~/data"):
        found = resolve(str(given), say=said.append)
        assert [str(Path(source).relative_to(folder)) for source in found] == names
    assert said[0] == (f"data.files: 5 files beneath {folder} (1 json, 1 jsonl, 1 parquet, 2 txt); left out: 3 of "
                       "other kinds (suffix .md, none)")
    assert resolve([str(folder / "*"), str(folder)])[0].endswith("a.jsonl.gz")
    assert len(resolve(str(folder), format="txt", say=said.append)) == 7
    assert said[-1] == f"data.files: 8 files beneath {folder} (8 txt)"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"evaluate.files: no \.txt, .* beneath '.*empty'$"):
        resolve(str(tmp_path / "empty"), "evaluate.files")
    (tmp_path / "empty" / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"beneath .*empty', 1 of other kinds \(suffix \.csv\); data\.format says"):
        resolve(str(tmp_path / "empty"))


def test_embedded_source(tmp_path):
    assert tuple(Reader().read(EMBEDDED)) == embedded_corpus()[0]
    name, size, mark = source_facts(EMBEDDED, HASHED)
    assert (name, size, mark) == ("embedded", 0, f"Python {platform.python_version()}")


# ---------------------------------------------------------------------------------------------------- sources


def test_globs_are_sorted_and_files_come_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c[1].txt", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("TEST_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def names(*patterns):
        return [record.text for source in resolve(patterns) for record in Reader().read(source)]

    assert names("$TEST_DATA/*.txt") == ["a.txt", "b.txt", "c[1].txt"]
    assert names("b.txt", "./*.txt", str(tmp_path / "a.txt")) == ["b.txt", "a.txt", "c[1].txt"]
    assert names("c[1].txt") == ["c[1].txt"]
    assert names("**/d.txt") == ["sub/d.txt"]
    assert source_facts("sub/d.txt", HASHED) == ["d.txt", *HASHED("sub/d.txt")]


def test_urls(monkeypatch):
    """fsspec's file system in memory stands for s3, gs and https."""
    import fsspec
    files = fsspec.filesystem("memory")
    files.store.clear()
    documents = ["one", "two", "three"]
    raws = {"a-0.jsonl.xz": lzma.compress(jsonl([{"text": "one"}])), "a-1.parquet": parquet({"text": ["two"]}),
            "a-2.tar": tar({"x.txt": b"three"})}
    for name, raw in raws.items():
        files.pipe(f"/sub/{name}", raw)
    sources = resolve(["memory://sub/a*", "memory://sub/a-1.parquet"])
    assert [source.rpartition("/")[2] for source in sources] == list(raws)  # each once
    assert texts([record for source in sources for record in Reader().read(source)]) == documents
    facts = [source_facts(source, HASHED) for source in sources]
    assert [fact[:2] for fact in facts] == [[name, len(raw)] for name, raw in raws.items()]
    files.pipe("/sub/a-2.tar", tar({"x.txt": b"other"}))  # of equal size: told by the time, which this one gives
    again = [source_facts(source, HASHED) for source in sources]
    assert [a == b for a, b in zip(facts, again, strict=True)] == [True, True, False] and facts[2][:2] == again[2][:2]
    files.pipe("/sub/deep/.x.txt", b"hidden")
    assert resolve("memory://sub") == resolve("memory://sub/a*")
    assert [record.name for record in Reader().read(sources[2])] == ["a-2.tar:x.txt"]
    with pytest.raises(ValueError, match=r"data.validation: no file matches 'memory://sub/\*.txt'"):
        resolve("memory://sub/*.txt", "data.validation")
    with pytest.raises(ValueError, match="no file matches 'memory://sub/a'"):
        resolve("memory://sub/a")
    with pytest.raises(FileNotFoundError):
        source_facts("memory://sub/a", HASHED)

    def no_network(*_, **__):
        raise TimeoutError("no route")

    monkeypatch.setattr(type(files), "open", no_network)
    with pytest.raises(ValueError, match=r"a-0.jsonl.xz: cannot be read \(TimeoutError: no route\)"):
        list(Reader().read(sources[0]))
    monkeypatch.setattr(type(files), "info", no_network)
    with pytest.raises(ValueError, match=r"a-0.jsonl.xz: cannot be read \(TimeoutError: no route\)"):
        resolve(sources[0])


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), OSError("gone"), ValueError("gone")])
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.tar.bz2", "b.parquet"])
def test_a_network_that_fails_midway_is_no_bad_record(monkeypatch, name, error):
    """For what is left would be lost; bare OSErrors are also what bz2 and pyarrow raise for damaged data."""
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
    lines = [hashlib.shake_128(str(i).encode()).hexdigest(1000) for i in range(1600)]
    make = {"b.jsonl": lambda: jsonl([{"text": line} for line in lines]),
            "b.jsonl.gz": lambda: gzip.compress(make["b.jsonl"](), 1),
            "b.tar.bz2": lambda: bz2.compress(tar({f"{i}.txt": line.encode() for i, line in enumerate(lines)})),
            "b.parquet": lambda: parquet({"text": lines}, row_group_size=100, use_dictionary=False)}
    raw = make[name]()

    class Failing(MemoryFile):
        def read(self, size):
            if self.tell() <= 0.8 * len(raw) < self.tell() + size:
                raise error
            return super().read(size)

    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: Failing(None, "/b", raw))
    records = Reader().read(f"memory://{name}")
    assert next(records).text == lines[0]
    with pytest.raises(ValueError, match=rf"{name}: cannot be read \({type(error).__name__}: gone\)"):
        for record in records:
            assert isinstance(record, Document)


@pytest.mark.parametrize("name, module, message", [
    ("a.txt.zst", "zstandard", r"a\.txt\.zst: needs the zstandard package: pip install 'hdlm_jax\[zstd\]'"),
    ("a.parquet", "pyarrow.parquet", r"a\.parquet: needs the pyarrow package: pip install 'hdlm_jax\[parquet\]'"),
    ("a.tar", "pyarrow", r"a\.tar: needs the pyarrow package: pip install 'hdlm_jax\[parquet\]'"),
])
def test_missing_packages_say_what_to_install(tmp_path, monkeypatch, name, module, message):
    (tmp_path / name).write_bytes(tar({"x": parquet({"text": ["a"]})}))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        if name == "a.tar":  # what is inside shows when it is read
            read(tmp_path / name)
        Reader().check(str(tmp_path / name))


def test_urls_without_their_packages(monkeypatch):
    with pytest.raises(ValueError, match=r"^nothing://x/a\.txt: .*pip install 'hdlm_jax\[remote\]'"):
        resolve("nothing://x/a.txt")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"^gs://x/a\.txt: needs the fsspec package: pip install 'hdlm_jax\[remote\]'"):
        resolve("gs://x/a.txt")


@pytest.mark.parametrize("files, message", [
    ((), "data.files is empty"),
    (("nowhere/*.txt",), r"data.files: no file matches 'nowhere/\*.txt'"),
    ("$NO_SUCH_VAR/a.txt", r"no file matches .* is the variable set\?"),
])
def test_no_sources(files, message):
    with pytest.raises(ValueError, match=message):
        resolve(files)


@pytest.mark.parametrize("name, raw, settings, message", [
    ("a.csv", b"x", {}, r"a\.csv: kind of file '\.csv' is unknown; choices: \.txt, \.jsonl.* with \.gz.*data\.format"),
    ("a.gz", b"x", {}, r"a\.gz: kind of file '\.gz' is unknown"),
    ("a.csv.gz", gzip.compress(b"x", mtime=0), {}, r"kind of file '\.csv\.gz' is unknown"),
    ("a.txt", b"x", dict(prompt_field="q"), r"a\.txt: data\.prompt_field='q' needs jsonl or parquet, not txt"),
    ("a.tar", tar({"b": b"x"}), dict(prompt_field="q"), r"a\.tar:b: data\.prompt_field='q' needs jsonl or parquet"),
    ("a.jsonl", b'\n{"body": 1, "id": 2}', {}, r"a\.jsonl: no field 'text' in its first .* there: 'body', 'id'"),
    ("a.jsonl", b'[]\n{"text": "x"}', dict(prompt_field="q"), r"no field 'q' in its first record; .* there: 'text'"),
    ("a.parquet", parquet({"body": ["x"]}), {}, r"a\.parquet: no field 'text' in its first record; .* there: 'body'"),
])
def test_wrong_settings(tmp_path, name, raw, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name, raw, **settings)
    assert "\n" not in str(error.value)


def test_wrong_choices(tmp_path):
    with pytest.raises(ValueError, match="embedded: data.prompt_field='q' needs"):
        Reader(prompt_field="q").read(EMBEDDED)  # at once, not with the first document
    with pytest.raises(ValueError, match="nothing.txt: no such file"):
        Reader().read(str(tmp_path / "nothing.txt"))


# ------------------------------------------------------------------------------------------------- bad records


@pytest.mark.parametrize("name, raw, position, reason", [
    ("a.jsonl", b'{"body": 1, "id": 2}\n', "line 2", "no field 'text'; fields here: 'body', 'id'"),
    ("a.jsonl", b'{"text": 5}\n', "line 2", "field 'text' must be a string, not int"),
    ("a.jsonl", b'{"text": \n', "line 2", "not JSON (JSONDecodeError: Expecting value: line 2 column 1 (char 10))"),
    ("a.jsonl", b'[1]\n', "line 2", "a line must be a JSON object, not list"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "line 2", "not JSON (RecursionError: "),
    ("a.jsonl", b'{"text": "x\\ud800"}\n', "line 2", "field 'text' is not Unicode (UnicodeEncodeError: "),
    ("a.jsonl", b'{"text": "\xff"}\n', "line 2, byte 10", "not valid UTF-8 (0xff: invalid start byte)"),
    ("line.txt", b"abc\xe9def\n", "line 2, byte 3", "not valid UTF-8 (0xe9: invalid continuation byte)"),
    ("blank_line.txt", b"\nabc\n\xe9def\n\xff\n\n", "line 4, byte 0", "not valid UTF-8 (0xe9: "),
])
def test_a_bad_record_leaves_the_others(tmp_path, name, raw, position, reason):
    good = b'{"text": "x"}\n'
    settings = {} if name.endswith("jsonl") else dict(txt_documents=name.removesuffix(".txt"))
    first, bad, last = read(tmp_path / name, good + raw + good, **settings)
    assert (bad.file, bad.position) == (str(tmp_path / name), position) and bad.reason.startswith(reason)
    assert "\n" not in bad.reason
    end = good.count(b"\n") + raw.count(b"\n") + 1
    text = "x" if name.endswith("jsonl") else good.decode().strip()
    assert (first, last) == (Document(text, f"{name}:1"), Document(text, f"{name}:{end}"))


@pytest.mark.parametrize("name, raw, position, reason", [
    ("a.txt", b"abc\xe9def", "byte 3", "not valid UTF-8 (0xe9: "),
    ("a.txt", b"\xef\xbb\xbfabc\xe9", "byte 6", "not valid UTF-8 (0xe9: "),
    ("a.txt.gz", b"plain", "byte 0", "this is no .gz data"),
    ("a.jsonl.xz", b"", "byte 0", "this is no .xz data"),  # a download that never began
    ("a.tar", b"", "byte 0", "ReadError: empty header: the archive is damaged or cut short"),
    ("a.tar", b"plain" * 1000, "byte 5000", "ReadError: invalid header: the archive is "),
    ("a.parquet", b"plain" * 10, "byte 50", "ArrowInvalid: Parquet magic bytes not found"),
])
def test_a_file_that_is_bad_as_a_whole(tmp_path, name, raw, position, reason):
    (bad,) = read(tmp_path / name, raw)
    assert (bad.file, bad.position) == (str(tmp_path / name), position) and bad.reason.startswith(reason)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_a_file_cut_short_anywhere(tmp_path, kind, suffix):
    """All documents before the cut, then one Bad; nothing is taken for whole."""
    wanted = [f"{i} {hashlib.sha256(bytes([i])).hexdigest() * 20}" for i in range(8)]
    raw = (tar({f"{i}.txt": text.encode() for i, text in enumerate(wanted)}) if kind == "tar"
           else jsonl([{"text": text} for text in wanted]))
    if kind == "tar":
        raw = raw[:8 * (512 + 1536) + 512]  # the first block of the end mark, nothing that fills up the record
    packed = pack(raw, suffix)
    assert texts(read(tmp_path / f"a.{kind}{suffix}", packed)) == wanted
    found = set()
    for cut in range(0, len(packed), 101):
        records = read(tmp_path / f"a.{kind}{suffix}", packed[:cut])
        if kind == "jsonl" and not suffix and packed[:cut][-1:] in (b"", b"\n", b"}"):
            continue  # a whole file of fewer lines
        assert [record.text for record in records[:-1]] == wanted[:len(records) - 1], cut
        assert isinstance(records[-1], Bad), cut
        found.add(len(records) - 1)
    assert max(found) >= 4  # the first of the two streams, at least


def test_a_bad_member_leaves_the_others(tmp_path):
    raw = lzma.compress(tar({"a.txt": b"a" * 2000, "b.txt": b"b"}))
    broken = bytearray(lzma.compress(tar({"deep.txt": bytes(range(128)) * 500})))
    broken[len(broken) // 2] ^= 255
    members = {"good.xz": raw, "cut.xz": raw[:-20], "broken.xz": bytes(broken), "latin.txt": b"abc\xe9",
               "empty.gz": b"", "two.tar": tar({"c.txt": b"c"}) * 2, "a.parquet": b"PAR1" * 9,
               "lines.jsonl": b'{"text": "x"}\n{"text"\n', "last.txt": b"last", "end.gz": b""}
    path = tmp_path / "a.tar.xz"
    records = read(path, lzma.compress(tar(members)))
    good = [record.text for record in records if isinstance(record, Document)]
    assert good == ["a" * 2000, "b", "a" * 2000, "b", "c", "x", "last"]
    bad = [(record.position, record.reason.partition(":")[0]) for record in records if isinstance(record, Bad)]
    assert {record.file for record in records if isinstance(record, Bad)} == {str(path)}
    assert bad == [("member cut.xz", "the compressed data is cut short"), ("member broken.xz", "LZMAError"),
                   ("member latin.txt, byte 3", "not valid UTF-8 (0xe9"), ("member empty.gz", "this is no .gz data"),
                   ("member two.tar", "ReadError"), ("member a.parquet", "ArrowInvalid"),
                   ("member lines.jsonl, line 2", "not JSON (JSONDecodeError"),
                   ("member end.gz", "this is no .gz data")]


def test_a_broken_archive_is_one_bad_record(tmp_path):
    """An archive cut inside a member is not reported for the member as well."""
    inner = lzma.compress(tar({f"{i}.txt": hashlib.sha256(bytes([i])).digest().hex().encode() * 30 for i in range(50)}))
    raw = tar({"1.xz": inner, "2.xz": inner, "3.xz": inner})
    path = tmp_path / "a.tar"
    for cut in range(600, len(raw) - 1024, 4096):
        records = read(path, raw[:cut])
        assert [type(record) for record in records].count(Bad) == 1 and isinstance(records[-1], Bad)
        assert records[-1].position.startswith("byte ")


def test_headers_of_an_archive_are_checked(tmp_path):
    """tarfile alone takes a damaged header for the end of the archive."""
    raw = bytearray(tar({"a": b"a", "b": b"b", "c": b"c"}))
    raw[1024 + 5] ^= 1  # the name of b
    records = read(tmp_path / "a.tar", bytes(raw))
    assert records[0] == Document("a", "a.tar:a") and len(records) == 2
    assert isinstance(records[1], Bad) and "bad checksum" in records[1].reason


def test_names_in_archives_may_be_any_bytes(tmp_path):
    raw = bytearray(tar({"x.txt": b"text", "y.txt": b"\xff"}))
    for start, letter in ((0, "x"), (1024, "y")):
        raw[start] = 0xE9  # and the sum in the header, which is of its bytes
        total = int(raw[start + 148:start + 154], 8) + 0xE9 - ord(letter)
        raw[start + 148:start + 154] = b"%06o" % total
    document, bad = read(tmp_path / "a.tar", bytes(raw))
    assert (document.name, bad.position) == ("a.tar:\ufffd.txt", "member \ufffd.txt, byte 0")


# ------------------------------------------------------------------------------------------------ in small memory


def test_files_are_read_as_streams(tmp_path):
    """8 MB of text each, of which some hundred kB are held."""
    lines = [hashlib.shake_128(str(i).encode()).hexdigest(1000) for i in range(4000)]
    files = {"a.tar": tar({"a": gzip.compress(tar({f"{i}": line.encode() for i, line in enumerate(lines)}), 1)}),
             "b.jsonl.gz": gzip.compress(jsonl([{"text": line} for line in lines]), 1),
             "d.json": json.dumps([{"text": line} for line in lines]).encode(),
             "e.json": "\n".join(json.dumps({"text": line}, indent=1) for line in lines).encode(),
             "c.txt.zst": PACK[".zst"]("\n".join(lines).encode())}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
        records = Reader(txt_documents="line" if name == "c.txt.zst" else "file").read(str(tmp_path / name))
        next(records)
        tracemalloc.start()
        try:
            count = sum(1 for _ in records)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == len(lines) - 1 and peak < 1.5e6, (name, peak)


# ------------------------------------------------------------------------- files that unpack to no end of bytes


def bomb(suffix: str, size: int, byte: bytes = b"0") -> bytes:
    """So many times one byte, packed piece by piece."""
    packer = {".gz": lambda: zlib.compressobj(9, wbits=31), ".xz": lzma.LZMACompressor, ".bz2": bz2.BZ2Compressor,
              ".zst": zstandard.ZstdCompressor().compressobj}[suffix]()
    return b"".join([packer.compress(byte * (1 << 20)) for _ in range(size >> 20)]) + packer.flush()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_few_bytes_unpack_to_no_end_of_them(tmp_path, suffix, monkeypatch):
    """Each kind of file, plain and as a member: the same line, however much is packed, and little memory."""
    monkeypatch.setattr(archives, "FREE", 1 << 21)
    monkeypatch.setattr(archives, "PIECE", 1 << 16)
    monkeypatch.setattr(archives, "MOST_RATIO", 500)
    zeros = bomb(suffix, 1 << 26)
    for name, how in (("a.txt", "file"), ("a.txt", "line"), ("a.txt", "blank_line"), ("a.jsonl", "file"),
                      ("a.json", "file"), ("a.tar", "file")):
        raw = tar({f"in.txt{suffix}": zeros, "b.txt": b"more"}) if name == "a.tar" else zeros
        (tmp_path / f"{name}{suffix}").write_bytes(PACK[suffix](raw) if name == "a.tar" else raw)
        read(tmp_path / "warm.txt", b"what is imported once")
        tracemalloc.start()
        try:
            bad, *more = read(tmp_path / f"{name}{suffix}", txt_documents=how)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert "it unpacks to more than 500 times its size, as no text does; if it is" in str(bad), (name, str(bad))
        assert f"{name}{suffix}" in str(bad) and "\n" not in str(bad) and peak < 3e7, (name, peak)
        assert texts(more) == ["more"] * (name == "a.tar")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_call_unpacks_a_piece_alone(tmp_path, suffix):
    """Of however little is given; together they are all of it."""
    pieces = archives._decompressed(io.BufferedReader(io.BytesIO(bomb(suffix, 1 << 23))),
                                    archives.decompressor(suffix, "a"))
    sizes = [len(piece) for piece in pieces]
    assert sum(sizes) == 1 << 23 and max(sizes) <= (1 << 20 if suffix != ".zst" else 1 << 25)


def test_packed_again_and_again(tmp_path):
    """Compressions, and archives inside each other: a few are read, more are one line, without end or not."""
    packed, nested, both = b"text", b"text", b"text"
    for layer in range(1, 9):
        packed, nested = gzip.compress(packed), tar({"a.tar" if layer > 1 else "a.txt": nested})
        both = gzip.compress(tar({"a.tgz" if layer > 1 else "a.txt": both}))
        for name, raw, line in (("a.txt.gz", packed, "it is packed more than 4 times over; unpack it first"),
                                ("a.tar", nested, "more than 4 archives inside each other; unpack it first"),
                                ("a.tgz", both, "more than 4 archives inside each other; unpack it first")):
            (found,) = read(tmp_path / name, raw)
            assert found.text == "text" if layer <= 4 else str(found).endswith(line), (name, layer, found)


def test_a_sparse_member_is_no_text(tmp_path):
    """Its header alone says how many zeros it is."""
    header = tarfile.TarInfo("a.txt")
    header.type, raw = tarfile.GNUTYPE_SPARSE, bytearray(header.tobuf(tarfile.GNU_FORMAT))
    raw[156:157] = tarfile.GNUTYPE_SPARSE
    raw[483:495] = b"77777777777\0"  # bytes it stands for
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    bad, good = read(tmp_path / "a.tar", bytes(raw) + tar({"b.txt": b"b"}))
    assert str(bad).endswith("member a.txt: a sparse file, as no text is; unpack the archive first")
    assert good.text == "b"


@pytest.mark.parametrize("name, how, position, others", [
    ("a.txt", "file", "byte 1000", 0), ("a.txt", "line", "line 2", 2), ("a.txt", "blank_line", "line 3", 2),
    ("a.jsonl", "file", "line 2", 2), ("a.json", "file", "record 2", 1), ("a.parquet", "file", "row 2", 2),
])
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_document_may_not_be_longer_than_memory_holds(tmp_path, name, how, position, others, suffix, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 1000)
    monkeypatch.setattr(documents, "BUFFER", 300)
    rows = [{"text": "a" * n} for n in (900, 5000, 900)]
    end = "\n" + "\n" * (how == "blank_line")
    raw = {"a.txt": "".join(row["text"] + end for row in rows).encode(), "a.jsonl": jsonl(rows),
           "a.json": json.dumps(rows).encode(), "a.parquet": parquet({"text": [row["text"] for row in rows]})}[name]
    found = read(tmp_path / f"{name}{suffix}", pack(raw, suffix), txt_documents=how)
    (bad,) = [record for record in found if isinstance(record, Bad)]
    assert position in bad.position + bad.reason and "longer than 1,000 bytes; cut it" in bad.reason
    assert [record.text for record in found if record is not bad] == ["a" * 900] * others


def test_many_lines_without_a_blank_one_are_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 1000)
    bad, good = read(tmp_path / "a.txt", b"\n" + b"abc\n" * 900 + b"\n\nlast", txt_documents="blank_line")
    assert (bad.position, good.text) == ("line 2", "last") and "document is longer than 1,000 bytes" in bad.reason


def test_blanks_before_a_value_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 1 << 20)
    assert texts(read(tmp_path / "a.json", b"[" + b" " * (1 << 22) + b'{"text": "a"}]')) == ["a"]


def test_a_number_of_thousands_of_digits(tmp_path):
    (bad,) = read(tmp_path / "a.json", b'[{"text": ' + b"1" * 6000 + b"}]")
    assert str(bad).startswith(f"{tmp_path / 'a.json'}, record 1: not JSON (ValueError: Exceeds the limit")


def test_a_row_group_is_read_in_parts(tmp_path):
    rows = [hashlib.sha256(str(i).encode()).hexdigest() * 40 for i in range(8000)]
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet({"text": rows}, compression="none", use_dictionary=False))
    before, most = pyarrow.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for wanted, record in zip(rows, Reader().read(str(path)), strict=True):
            assert record.text == wanted
            most = max(most, pyarrow.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20e6 and most < 6e6 and peak < 6e6


# ----------------------------------------------------------------------------------------------- detokenizing


def test_text_and_prompt_are_detokenized(tmp_path):
    rows = jsonl([{"text": "Is it ?", "q": "They 've"}])
    (got,) = read(tmp_path / "a.jsonl", rows, prompt_field="q", detokenize="lm1b")
    assert (got.text, got.prompt) == ("Is it?", "They've")
    (got,) = read(tmp_path / "a.jsonl", rows, detokenize="lambada")
    assert (got.text, got.prompt) == ("\nIs it ?", "")


def test_local_books(data_dir):
    path = data_dir / "openstax" / "openstax_cc_by.valid.jsonl.xz"
    if not path.exists():
        pytest.skip(f"no {path.name} in the local data")
    found = read(path)
    assert len(texts(found)) == 82 and found[-1].name == "openstax_cc_by.valid.jsonl.xz:82"


def test_a_python_without_lzma_and_bz2_reads_all_else(tmp_path, root):
    """Some are built without these two: only files that need them want them."""
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("some text")
    code = ("import sys; sys.modules['lzma'] = sys.modules['bz2'] = None\n"
            "from hdlm_jax.data.documents import Reader; print([d.text for d in Reader().documents(sys.argv[1])])")
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt.gz"], capture_output=True, text=True, cwd=root)
    assert ran.stdout == "['some text']\n", ran.stderr
