"""The pages: self-contained, true to the files they show, and working in a browser."""

import html.parser
import json
import math
import re
import shutil
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from tiny import model, read_recipe, trained

from hdlm_jax.config import ConfigError
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.report import __main__ as report
from hdlm_jax.report import compare, page, run_files, watch
from hdlm_jax.runs import generate
from hdlm_jax.training.metrics import read_metrics

EVALUATED = {"nelbo": 5.5, "se": 0.0123, "perplexity": 244.7, "perplexity_se": 3.0, "whole_split": True,
             "bits_per_byte": 2.25, "bits_per_byte_se": 0.01, "hierarchy": [257, 8, 1], "unigram_nelbo": 6.5,
             "step": 3, "params": 12345}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with samples, not evaluated."""
    workdir = shutil.copytree(trained()[1], tmp_path_factory.mktemp("report") / "run")
    generate.generate(read_recipe(trained()[0]), str(workdir))
    return workdir


class Reader(html.parser.HTMLParser):
    """Ids, addresses, texts of elements; and that what is opened is closed."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags, self.texts = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append((tag, given.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def data(self):
        return json.loads("".join(self.texts[("script", "data")]))


def read(path):
    text = path.read_text(encoding="utf-8")
    reader = Reader(text)
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.addresses == ["data:,"], "nothing is fetched"
    without_data = re.sub(r'(?s)<script type="application/json".*?</script>', "", text)
    assert set(re.findall(r"https?://[^\s\"']+", without_data)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|import\(", without_data)
    assert not re.search(r"\{\{(title|body|program)", text)
    return text, reader


def states(film):
    """[n, F+1, S] from what a page holds of trajectories."""
    out = np.array([[s["start"]] * len(film["call"]) for s in film["samples"]])
    for sample, frames in zip(out, film["samples"], strict=True):
        for i, flat in enumerate(frames["frames"]):
            for place, symbol, _ in np.reshape(flat, (-1, 3)):
                sample[i + 1 :, place] = symbol
    return out


def counts_per_level(z):
    """[.., K+1] of z [.., S]."""
    level = model().hierarchy.level_of(z)
    return np.stack([(level == k).sum(-1) for k in range(level.max() + 1)], -1)


def test_the_page_holds_what_the_files_say(run):
    path = page.write_run_page(str(run))
    text, reader = read(run / "report.html")
    assert path == str(run / "report.html") and {"viewer", "curves", "levels", "clusters"} <= set(reader.ids)
    data = reader.data()["run"]
    with np.load(run / "trajectories.npz") as film:
        z, sure, call = film["z"], film["confidence"], film["call"]
    np.testing.assert_array_equal(states(data["trajectories"]), z)
    assert data["trajectories"]["call"] == call.tolist()
    place, symbol, thousandths = data["trajectories"]["samples"][1]["frames"][-1][:3]
    assert symbol == z[1, -1, place] and thousandths == pytest.approx(1000 * sure[1, -1, place], abs=0.5001)
    h = model().hierarchy
    assert data["hierarchy"]["sizes"] == list(h.sizes) and data["hierarchy"]["offsets"] == list(h.offsets)
    np.testing.assert_array_equal(data["hierarchy"]["parents"], [h.parents[0]])
    assert len(data["hierarchy"]["words"]) == 257 and sum(data["hierarchy"]["counts"]) == 1390
    share = counts_per_level(np.moveaxis(z, 1, 0)).sum(1) / z[:, 0].size
    np.testing.assert_allclose(data["occupancy"]["points"]["share"], share, atol=1e-6)
    t, beta = np.array(data["occupancy"]["t"]), np.array(data["occupancy"]["beta"])
    np.testing.assert_allclose(beta, np.stack([1 - t, -(1 - t) * np.log1p(-np.minimum(t, 1 - 1e-12)),
                                               t + (1 - t) * np.log1p(-np.minimum(t, 1 - 1e-12))], -1), atol=2e-6)
    assert data["unigram"] > 1
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert data["curves"]["train"]["loss"] == [v for v in losses if v is not None]
    assert "Not evaluated yet" in text and f"--workdir={run} --mode=evaluate" in text


def test_what_is_missing_is_named_with_its_command(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    (workdir / "trajectories.npz").unlink()
    (workdir / "metrics.jsonl").unlink()
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"data": config["data"] | {"dir": "/gone"}}))
    page.write_run_page(str(workdir))
    text, reader = read(workdir / "report.html")
    for mode in ("evaluate", "generate", "train"):
        assert f"--workdir={workdir} --mode={mode}</code>" in text
    data = reader.data()["run"]
    assert data["trajectories"] is None and data["curves"] is None and data["hierarchy"]["counts"] is None
    assert data["occupancy"]["points"] is None and "in the tokenizer's order" in text
    (workdir / "hierarchy.npz").unlink()
    page.write_run_page(str(workdir))
    assert f"--workdir={workdir} --mode=cluster</code>" in read(workdir / "report.html")[0]
    with pytest.raises(ConfigError, match="train first"):
        page.write_run_page(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_earlier_samples_are_kept_with_a_number(run, tmp_path):
    for name in generate.FILES:
        shutil.copy(run / name, tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in generate.FILES}
    generate.keep_earlier(str(tmp_path))
    generate.keep_earlier(str(tmp_path))  # there is nothing more to keep
    kept = ("generate-1.json", "samples-1.jsonl", "trajectories-1.npz", "samples-1.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    assert [(tmp_path / name).read_bytes() for name in kept] == list(before.values())
    (tmp_path / "samples.txt").write_text("others")
    generate.keep_earlier(str(tmp_path))
    assert (tmp_path / "samples-2.txt").read_text() == "others" and (tmp_path / "samples-1.txt").exists()


def test_numbers_of_others_are_shown(run, tmp_path):
    """evaluate.json, what a judge says in generate.json, and the rows of tasks.json."""
    workdir = shutil.copytree(run, tmp_path / "run")
    (workdir / "evaluate.json").write_text(json.dumps(EVALUATED))
    made = json.loads((workdir / "generate.json").read_text())
    made["judge"] = {"judge": "big <model>", "perplexity": 87.65, "unigram_entropy": 5.4321}
    (workdir / "generate.json").write_text(json.dumps(made))
    text = {"kind": "perplexity", "task": "a&b", "protocol": "packed", "limited": True, "detokenizer": None,
            "made_from": {"step": 3}, "nelbo": 5.0, "se": 0.1, "perplexity": 148.41, "perplexity_se": 14.8,
            "tokens": 1200, "documents": 7, "draws": 2}
    asked = {"kind": "ranking", "task": "quiz", "made_from": {"step": 3}, "limited": False, "accuracy": 0.5,
             "accuracy_se": 0.05, "questions": 100, "draws": 8.0, "reached": 0.9, "cut": 0, "chance": 0.25}
    (workdir / "tasks.json").write_text(json.dumps({"a&b/packed": text, "quiz": asked}))
    page.write_run_page(str(workdir))
    text, _ = read(workdir / "report.html")
    for said in ("5.5000", "± 0.0123 nats/token", "244.7", "2.2500", "12,345", "87.7", "under big &lt;model&gt;",
                 "5.43", '<td data-name="text">a&amp;b*</td>',
                 '<td class=n data-name="accuracy %">50.0 [40.4, 59.6]</td>',
                 '<td class=n data-name="chance %">25.0</td>', '<td class=n data-name="tokens">1,200</td>',
                 "148.41 ± 14.80"):
        assert said in text.replace("\xa0", " "), said
    assert "Not evaluated" not in text
    other = shutil.copytree(workdir, tmp_path / "other")  # as many tokens, another corpus
    (other / "evaluate.json").write_text(json.dumps(EVALUATED | {"data": "another"}))
    for folder in (workdir, other):
        np.savez(folder / "evaluate_rows.npz", nats=np.ones(4), tokens=np.full(4, 16))
    with pytest.raises(ValueError, match="data differs"):
        compare.paired_difference(str(workdir), str(other))


NASTY = ["</script>", '"quoted"', "<b>&amp;", "\x00\x1b", "\u2028\u2029", "a\u202eb", "--><!--", "{{data}}", "\\u003c"]


def test_any_text_is_only_text(run, tmp_path):
    for raw, shown in [(b" the", " the"), (b"\n\n", "↵↵"), (b"\t", "⇥"), (b"\xe2\x80", r"\xe2\x80"), (b"\x00", r"\x00"),
                       ("\u2028".encode(), r"\u2028"), ("é‮".encode(), r"é\u202e"), (b"</script>", "</script>")]:
        assert run_files.show_word(raw) == shown and shown.isprintable()
    assert [run_files.show_word(w, True) for w in (b"the", b"##ing", b"[SEP]")] == [" the", "ing", "[SEP]"]
    text = page.embed({"words": NASTY, "n": 1})
    assert not re.search("[<>&\u2028\u2029]", text) and json.loads(text) == {"words": NASTY, "n": 1}
    assert page.embed({"a": [1.0, math.nan, (math.inf,)]}) == '{"a":[1.0,null,[null]]}'

    found = run_files.gather(str(run))
    found["hierarchy"]["words"][: len(NASTY)] = NASTY
    asked = {"kind": "ranking", "made_from": {"step": 3}, "limited": False, "accuracy": 0.5, "questions": 1,
             "draws": 8.0, "reached": 0.9, "cut": 0}
    found["name"] = "</h1><script>alert(1)</script>"
    found["tasks"] = {name: asked | {"task": f"</table>{name}"} for name in NASTY}
    (tmp_path / "nasty.html").write_text(page.run_page(found), encoding="utf-8")
    _, reader = read(tmp_path / "nasty.html")
    assert reader.data()["run"]["hierarchy"]["words"][: len(NASTY)] == NASTY
    assert reader.tags.count("script") == 2 and reader.tags.count("h1") == 1 and reader.tags.count("table") == 1


def test_occupancy_of_a_long_recording():
    """Levels drawn by the chain itself: its shares are the theory's; given tokens do not count."""
    rates, n, length = (1.0, 2.0, 0.5), 40, 500
    rng, t = np.random.default_rng(0), np.linspace(1, 0, 6)
    times = np.cumsum(rng.exponential(1 / np.array(rates), (n, 1, length, 3)), -1)
    with np.errstate(divide="ignore"):
        level = (times <= -np.log1p(-t)[None, :, None, None]).sum(-1)
    level[:, :, :7] = 0
    film = {"z": np.array([0, 9, 12, 14])[level], "time": np.tile(t, (n, 1))}
    found = run_files.occupancy(rates, film, (0, 9, 12, 14))
    assert found["tokens"] == n * (length - 7)
    with np.errstate(divide="ignore"):
        expect = LevelChain(rates).beta(-np.log1p(-t), np)
    off = np.abs(np.array(found["points"]["share"]) - expect)
    assert (off <= 5 * np.sqrt(expect * (1 - expect) / found["tokens"]) + 1e-6).all()


def test_runs_side_by_side(run, tmp_path, capsys):
    for name, nelbo in (("a", 5.5), ("b", 5.25), ("c", 5.0)):
        shutil.copytree(run, tmp_path / name)
        tokens = np.full(20, 16 if name != "c" else 17)
        noise = np.random.default_rng(len(name)).normal(0, 1, 20)
        np.savez(tmp_path / name / "evaluate_rows.npz", nats=tokens * nelbo + noise, tokens=tokens)
        (tmp_path / name / "evaluate.json").write_text(json.dumps(EVALUATED | {"nelbo": nelbo}))
    shutil.copytree(trained()[1], tmp_path / "d")
    (tmp_path / "d" / "generate.json").unlink(missing_ok=True)
    report.main([f"--html={tmp_path / 'all.html'}", *(str(tmp_path / name) for name in "abcd")])
    text, reader = read(tmp_path / "all.html")
    assert [r["name"] for r in reader.data()["runs"]] == list("abcd")
    text = text.replace("\xa0", " ")
    assert "5.5000 ± 0.0123" in text and "other sequences" in text
    assert "{:+.4f} ± {:.4f}".format(*compare.paired_difference(str(tmp_path / "a"), str(tmp_path / "b"))) in text
    last = json.loads((tmp_path / "d" / "metrics.jsonl").read_text().splitlines()[-1])  # not evaluated
    rate = run_files.bits_per_nat(read_recipe(trained()[0]), str(tmp_path / "d")) * last["valid_nelbo"]
    for said in (f"{last['valid_nelbo']:.4f} ± {last['valid_se']:.4f} †", f"≈ {rate:.4f} ± ", "2.2500 ± 0.0100",
                 "† measured in training"):
        assert said in text, said
    assert "generative perplexity" not in text, "nobody judged"
    assert f"--workdir={tmp_path / 'd'} --mode=generate" in text and reader.data()["unigram"] == 6.5
    assert reader.data()["runs"][0]["curves"] == run_files.curves_of(read_metrics(str(run / "metrics.jsonl")))
    for wrong in (["--html=x"], ["--html=", "a"], ["--page=x", "a"]):
        with pytest.raises(SystemExit, match="2"):
            report.main(wrong)
        assert capsys.readouterr().err.startswith("usage: python -m hdlm_jax.report")
    with pytest.raises(SystemExit, match="report: .*train first"):
        report.main([f"--html={tmp_path / 'x.html'}", str(tmp_path / "nowhere")])


def test_tasks_and_judges_side_by_side(tmp_path):
    text = {"kind": "perplexity", "perplexity": 100.04, "perplexity_se": 2.0, "limited": True, "made_from": {"step": 9}}
    asked = {"kind": "ranking", "accuracy": 0.0, "questions": 10, "chance": 0.5, "limited": False,
             "made_from": {"step": 9}}
    old = text | {"made_from": {"step": 5}}  # of an earlier checkpoint
    for name, tasks in (("a", {"old": old, "ptb/packed": text, "piqa": asked}),
                        ("b", {"ptb/packed": text | {"limited": False}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tasks.json").write_text(json.dumps(tasks))
    (tmp_path / "c").mkdir()
    assert compare.task_table([str(tmp_path / "c")]) == ""
    lines = compare.task_table([str(tmp_path / name) for name in "abc"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "ptb/packed (limited)", "piqa"] and cells[2] == ["a", "100.0 ± 2.0", "0.0 [0.0, 27.8] %"]
    assert cells[3] == ["b", "100.0 ± 2.0", "-"] and cells[4] == ["c", "-", "-"]
    assert cells[5] == ["chance", "-", "50.0 %"]
    exact = {"perplexity": 87.65, "perplexity_se": 1.5, "unigram_entropy": 5.4321, "distinct_2": 0.5}
    assert compare._judged({"judge": exact}) == ["87.7 ± 1.5", "5.432", "0.500"] and compare._judged({}) == ["-"] * 3
    bound = {"perplexity_bound": 87.65, "perplexity_se_bound": None, "unigram_entropy": None}
    assert compare._judged({"judge": bound}) == ["≤ 87.7", "-", "-"]


@pytest.fixture
def watched(tmp_path):
    """(a folder without a run yet, ask(path, host) -> (status, text) of the server that watches it)."""
    folder = tmp_path / "watched"
    folder.mkdir()
    server = watch.serve(str(folder), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def ask(path, host=""):
        asked = urllib.request.Request(address + path, headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(asked) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    ask.address = address
    yield folder, ask
    server.shutdown()
    server.server_close()


def record(folder, step, **more):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "tokens": 128 * step, "loss": 1.5, "nelbo": 6.25, "tokens_per_s": 64.0}
                              | more) + "\n")


def test_a_run_is_watched(run, watched, capsys):
    folder, ask = watched
    assert json.loads(ask("/state.json")[1]) == {"mark": "", "count": 0, "curves": None, "facts": []}
    assert "No run there yet" in ask("/")[1]
    shutil.copytree(run, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    begun = json.loads(ask("/state.json")[1])
    assert begun["mark"] and "compiling" in begun["facts"][0][2]
    record(folder, 1)
    record(folder, 2, valid_nelbo=5.5, valid_se=0.25)
    status, text = ask("/")
    data = Reader(text).data()
    assert status == 200 and data["live"]["count"] == 2 and data["run"]["curves"]["train"]["tokens"] == [128, 256]
    first = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])["text"]
    assert f"<pre>{page.html.escape(first)}</pre>" in text and "fetch(" in text
    assert "Weighted loss of the training batches" in text and '"Loss (weighted), nats per token"' in text
    record(folder, 3, nelbo=6.0)
    new = json.loads(ask("/state.json?since=2")[1])
    assert new["mark"] == data["live"]["mark"] and new["count"] == 3
    assert new["curves"]["train"] == {"tokens": [384], "loss": [1.5], "nelbo": [6.0]}
    assert new["curves"]["valid"] == {"tokens": [], "nelbo": []}
    told = {name: (value, unit) for value, unit, name in new["facts"]}
    assert told["step"] == ("3", "of 3, 100 %") and told["weighted loss"] == ("1.5000", "nats/token")
    assert told["NELBO, validation, step 2"] == ("5.5000", "± 0.2500 nats/token")
    assert told["NELBO, training batches (noisy)"] == ("6.0000", "nats/token")
    (folder / "latest_samples.json").write_text('{"step": 4, "texts": ["<new>"]}')
    assert json.loads(ask("/state.json?since=3")[1])["mark"] != new["mark"], "the page is to be loaded again"
    assert "<p>Of step 4.</p><pre>&lt;new&gt;</pre>" in ask("/")[1], "while it trains, of its own weights"
    (folder / "latest_samples.json").write_text('{"step": 3, "texts": ["<new>"]}')
    assert "&lt;new&gt;" not in ask("/")[1], "--mode=generate has been asked since"
    (folder / "latest_samples.json").unlink()
    (folder / "samples.jsonl").unlink()
    assert json.loads(ask("/state.json?since=3")[1])["mark"] != new["mark"], "the page is to be loaded again"
    assert "--mode=generate" in ask("/")[1]
    assert ask("/../recipe.py")[0] == 404 and ask("/", "evil.example:80")[0] == 403
    halfway = watch.facts([{"step": 50, "tokens": 5000, "loss": 1.0, "tokens_per_s": 10.0, "mfu": 0.5}], 200, 70, 60)
    assert ("25:00", "", "left") in halfway
    assert halfway[-2:] == [("50.0", "%", "MFU"), ("10 s", "ago", "newest record")]
    with pytest.raises(SystemExit, match="watch: 'nowhere': no such folder; give the --workdir of a run"):
        watch.main(["nowhere"])
    port = ask.address.rpartition(":")[2]
    with pytest.raises(SystemExit, match=f"watch: --port={port}: .*in use; give another one, or 0"):
        watch.main([str(folder), f"--port={port}"])


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def look(browser):
    """look(path, width, scheme) -> a page whose errors fail the test at its end."""
    wrong, pages = [], []

    def open_page(path, width=1280, scheme="light"):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(tab)
        tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-ready]")
        return tab

    yield open_page
    for tab in pages:
        tab.close()
    assert wrong == []


def set_frame(tab, frame):
    tab.locator("#frame").evaluate("(s, v) => { s.value = v; s.dispatchEvent(new Event('input')); }", frame)


def test_the_viewer_in_a_browser(run, look):
    page.write_run_page(str(run))
    with np.load(run / "trajectories.npz") as film:
        z, call = film["z"], film["call"]
    expect, tokenizer = counts_per_level(z), model().tokenizer
    tab, last = look(run / "report.html"), len(call) - 1
    status = tab.locator("#status")
    for sample in (0, 2):
        tab.locator(f"[data-sample='{sample}']").click()
        for frame in sorted({0, 1, last // 2, last}):
            set_frame(tab, frame)
            assert status.get_attribute("data-call") == str(call[frame])
            assert status.get_attribute("data-counts") == ",".join(map(str, expect[sample, frame]))
            for level, count in enumerate(expect[sample, frame]):
                assert tab.locator(f"#status [data-count='{level}']").inner_text() == str(count)
                assert tab.locator(f"#text .tok[data-level='{level}']").count() == count
    shown = tab.locator("#text .tok > .on").all_text_contents()
    words = [run_files.show_word(tokenizer.token_bytes(int(i))).strip() or "␣" for i in z[2, -1]]
    assert shown == words

    set_frame(tab, 0)
    slider = tab.locator("#frame")
    slider.focus()
    slider.press("ArrowRight")
    assert status.get_attribute("data-frame") == "1", "the slider's own keys"
    slider.evaluate("s => s.blur()")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowLeft")
    assert status.get_attribute("data-frame") == "2"
    tab.locator("#play").click()
    tab.wait_for_function("+document.getElementById('status').dataset.frame > 2")
    tab.wait_for_function(f"document.getElementById('status').dataset.frame === '{last}'")
    assert tab.locator("#play").get_attribute("aria-pressed") == "false", "it stops at the end"
    about = tab.locator("#text .tok").first.get_attribute("title")
    drop = r" at call \d+ \(p = [<\s.\d]+\)"
    assert re.fullmatch(rf"position 1: mask( → .+{drop})? → “.+”{drop}", about), about


def test_clusters_in_a_browser(run, look):
    page.write_run_page(str(run))
    tab, h = look(run / "report.html"), model().hierarchy
    word = int(model().tokenizer.encode("t")[0])
    tab.locator("#find").fill("t")
    card = tab.locator("[data-part=clusters] .cluster")
    assert card.get_attribute("data-cluster") == str(h.anc[1][word]) and card.get_attribute("data-level") == "1"
    assert tab.locator(f"[data-found] [data-word='{word}']").count() == 1
    other = next(w for w in range(97, 123) if h.anc[1][w] != h.anc[1][word])
    tab.locator("#find").fill(chr(other))
    assert card.get_attribute("data-cluster") == str(h.anc[1][other])
    tab.locator("#find").fill("no such word at all")
    assert "no such word" in tab.locator("[data-found]").inner_text()
    tab.locator("[data-node='5']").click()
    members = {int(b.get_attribute("data-word")) for b in card.locator("[data-word]").all()}
    assert card.get_attribute("data-cluster") == "5" and members <= set(np.flatnonzero(h.anc[1] == 5).tolist())
    frequent = tab.locator(".list button").first.get_attribute("data-node")
    counts = np.bincount(h.anc[1], run_files.gather(str(run))["hierarchy"]["counts"])
    assert int(frequent) == counts.argmax()
    first = card.locator("[data-word]").first
    first.click()
    assert card.get_attribute("data-cluster") == "5"


@pytest.mark.slow  # the page asks every two seconds
def test_a_watched_page_grows_in_a_browser(run, watched, browser):
    folder, ask = watched
    tab, wrong = browser.new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(ask.address)
    shutil.copytree(run, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    record(folder, 1)
    record(folder, 2)
    tab.wait_for_selector("[data-part=curves] path", state="attached")  # loaded again by itself
    before = tab.locator("[data-part=curves] path").first.get_attribute("d")
    record(folder, 3, nelbo=4.0, valid_nelbo=4.5, valid_se=0.1)
    tab.wait_for_selector("text=NELBO, validation, step 3")
    assert tab.locator(".chart h3").first.inner_text() == "Loss (weighted), nats per token"
    assert tab.locator(".legend").first.inner_text() == "weighted loss"
    assert tab.locator("[data-part=curves] path").first.get_attribute("d") != before
    assert tab.locator("[data-part=live] b").first.inner_text() == "3" and wrong == []
    tab.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_pages_fit_and_say_no_error(run, look, tmp_path, width):
    page.write_run_page(str(run))
    found, film = run_files.gather(str(run)), run_files.read_trajectories(str(run))
    found["hierarchy"]["words"][: len(NASTY)] = NASTY
    found["hierarchy"]["words"][len(NASTY) : 120] = ["long" * 100] * (120 - len(NASTY))
    found["trajectories"] = run_files.changes(film | {k: np.tile(film[k], 20) for k in ("z", "confidence")})
    (tmp_path / "nasty.html").write_text(page.run_page(found), encoding="utf-8")
    judged = shutil.copytree(run, tmp_path / "a_name_of_a_run_that_is_long")  # with all columns that there are
    large = {"params": 134637888, "hierarchy": [49152, 256, 16, 1]}
    (judged / "evaluate.json").write_text(json.dumps(EVALUATED | large))
    made, judge = json.loads((judged / "generate.json").read_text()), {"perplexity": 3485.04, "perplexity_se": 521.94}
    (judged / "generate.json").write_text(json.dumps(made | {"judge": judge | {"judge": "x", "unigram_entropy": 5.4}}))
    report.main([f"--html={tmp_path / 'all.html'}", str(run), str(judged)])
    lacking = shutil.copytree(run, tmp_path / "lacking")
    for name in ("trajectories.npz", "metrics.jsonl", "generate.json"):
        (lacking / name).unlink()
    page.write_run_page(str(lacking))
    for path in (run / "report.html", tmp_path / "nasty.html", tmp_path / "all.html", lacking / "report.html"):
        scheme = "dark" if path.parent == tmp_path else "light"
        tab = look(path, width, scheme)
        for table in tab.locator(".wide").all():
            assert table.evaluate("t => t.scrollWidth <= t.clientWidth") or path.name != "all.html", "no column is cut"
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
        charts = tab.locator(".chart")
        if "lacking" not in str(path):
            assert charts.first.locator("h3").inner_text() == "Loss (weighted), nats per token"
            assert path.name == "all.html" or charts.first.locator(".legend").inner_text() == "weighted loss"
        for chart in charts.all():
            chart.locator("svg").hover()
            assert re.search(r"at (tokens|t) [\d.]+", chart.locator(".legend").inner_text())
        assert charts.count() == {"all.html": 3}.get(path.name, 1 if "lacking" in str(path) else 4)


def test_a_text_plays_in_a_frame_of_its_own(look, tmp_path):
    """As in a notebook: from the first call to the last, as high as it is, its names and styles not the notebook's."""
    film = model().show("The ", steps=6, batch_size=8)
    (tmp_path / "cell.html").write_text("<html data-ready=yes><body><p id=play>mine</p>" + film._repr_html_(), "utf-8")
    tab = look(tmp_path / "cell.html", 400)
    inside = tab.frame_locator("iframe")
    inside.locator(f"#status[data-call='{film.calls}']").wait_for(timeout=20_000)
    assert inside.locator("#play").inner_text() == "▶ Play" and tab.locator("#play").inner_text() == "mine"
    height, wide = inside.locator("body").evaluate("b => [b.offsetHeight, b.scrollWidth <= innerWidth]")
    assert wide and abs(tab.locator("iframe").evaluate("f => f.clientHeight") - height) <= 1
    written = "".join(inside.locator("#text .tok > .on").all_inner_texts())
    assert written.startswith("The") and inside.locator("#text").get_attribute("class") == "text settled"
