"""A run behind HTTP: its texts are those of `Model.generate`, its limits hold, and nobody disturbs anybody."""
import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from tiny import SEQ_LEN, model, trained

from hdlm_jax.common.extras import package
from hdlm_jax.config import ConfigError, ServeConfig
from hdlm_jax.decoding import desk, slots, texts
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.report import page
from hdlm_jax.runs import serve
from hdlm_jax.training.state import build, placed

testclient = pytest.importorskip("starlette.testclient", reason="no starlette (pip install 'hdlm_jax[serve]')")
uvicorn = pytest.importorskip("uvicorn", reason="no uvicorn (pip install 'hdlm_jax[serve]')")
FEW = {"steps": 6, "batch_size": 8}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}}


def server_of(run, **settings):
    config = dataclasses.replace(run.config, serve=ServeConfig(batch=8, **settings),
                                 generate=dataclasses.replace(run.config.generate, steps=6))
    return serve.Server(dataclasses.replace(run, config=config), page.served(), page.about(str(trained()[1])))


@pytest.fixture(scope="module")
def server():
    return server_of(model().run)


@pytest.fixture(scope="module")
def client(server):
    with testclient.TestClient(server.app(), base_url="http://127.0.0.1") as opened:
        yield opened


def ask(client, chat=False, **body):
    answer = client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(client, **body):
    return [choice["text"] for choice in ask(client, **body)["choices"]]


def pieces(client, **body):
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:])["choices"][0] for line in lines[:-1]]


def test_seconds_of_a_stream_are_counted_to_its_end(client, server):
    pieces(client, prompt="The ", seed=1)  # compiled
    before, began = server.seconds, time.monotonic()
    pieces(client, prompt="The ", seed=2, n=8)
    took = time.monotonic() - began
    assert took / 2 < server.seconds - before < took + 0.01


def test_texts_are_those_of_generate_whoever_else_is_served(client):
    """Prompts, ends, several texts, blanks and schemas, all at once."""
    m = model()
    cases = [({"prompt": "The ", "seed": 3, "echo": True}, m.generate(1, prompt="The ", seed=3, **FEW)),
             ({"prompt": "a", "seed": 1, "n": 3, "echo": True}, m.generate(3, prompt="a", seed=1, **FEW)),
             ({"prompt": "", "seed": 2**32 - 1}, m.generate(1, seed=2**32 - 1, **FEW)),
             ({"template": "x[MASK:2] y[MASK]", "seed": 4}, m.infill("x[MASK:2] y[MASK]", seed=4, **FEW)),
             ({"template": "ab[LIKE:e] [LIKE:t]", "seed": 5}, m.infill("ab[LIKE:e] [LIKE:t]", seed=5, **FEW))]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda case: said(client, **case[0]), cases + cases))
    assert found == [wanted for _, wanted in cases] * 2
    shape = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    assert [json.loads(text) for text in said(client, response_format=shape, seed=6)] == m.json(SCHEMA, seed=6, **FEW)
    whole = ask(client, prompt="The ", max_tokens=5, seed=7)
    assert "The " + whole["choices"][0]["text"] == m.generate(1, prompt="The ", seed=7, length=9, **FEW)[0]
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9} and whole["seed"] == 7
    assert whole["choices"][0]["finish_reason"] == "length" and whole["object"] == "text_completion"


def test_what_is_shown_while_it_is_written(client, server):
    """The canvas of a stream goes from masks to the text, and the pieces are the text."""
    whole = said(client, prompt="The ", seed=3)[0]
    seen = pieces(client, prompt="The ", seed=3, canvas=True)
    z = np.array(seen[0]["canvas"]["start"])
    h = model().hierarchy
    assert (z[4:] == h.mask_id).all() and len(z) == SEQ_LEN
    sure = []
    for canvas in [one["canvas"] for one in seen if "canvas" in one][1:]:
        at, states, thousandths = np.array(canvas["changes"]).reshape(-1, 3).T
        assert (h.level_of(states) < h.level_of(z[at])).all(), "states fall"
        z[at] = states
        sure += thousandths.tolist()
    assert model().tokenizer.decode(z) == "The " + whole and max(sure) > 0
    assert "".join(one["text"] for one in seen) == whole and seen[-1]["finish_reason"] == "length"
    letter = next(c for c in whole[3:] if c != "\ufffd")
    cut = whole[: whole.index(letter)]
    assert said(client, prompt="The ", seed=3, stop=[letter, "never there"]) == [cut]
    seen = pieces(client, prompt="The ", seed=3, stop=letter)
    assert "".join(one["text"] for one in seen) == cut and seen[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(("body", "message"), [
    (b"{", "body: not JSON"), (b"[1]", "must be a JSON object, not list"), (b'{"seed": NaN}', "NaN is no JSON"),
    (b"[" * 100_000, "nested too deep"), (b'{"prompt": "\\ud800"}', "lone surrogate"), (b'\xff{"a":1}', "not JSON"),
    ({"prompt": 5}, "prompt=5: must be of type str"), ({"seed": True}, "seed=True: must be of type int"),
    ({"promt": "a"}, "'promt' is no field here.* did you mean 'prompt'"), ({"x" * 10_000: 1}, "is no field here"),
    ({"helper": "/etc"}, "'helper' is no field here"), ({"prompt": "a" * 5000}, "at most 16 tokens"),
    ({"prompt": "a" * 16}, "generate.prompt has 16 tokens"), ({"max_tokens": 0}, "room for 16"),
    ({"max_tokens": 10**30}, "room for 16"), ({"n": 9}, "must lie in 1..8"), ({"steps": 10**9}, "at most 4096"),
    ({"seed": -1}, "must lie in 0.."), ({"method": "foo"}, "method='foo': choose one of"),
    ({"method": "edlm"}, "needs a second run"), ({"method": "classifier"}, "needs a function"),
    ({"method": "ccd", "options": "depth=99999"}, "at most 16 here"), ({"options": "x" * 999}, "are at most 256"),
    ({"temperature": -1}, "generate.temperature"), ({"stop": [""]}, "texts of 1 to 256 characters"),
    ({"template": "a"}, "no blank in 'a'"), ({"template": "[MASK:99]"}, "at most 16 tokens"),
    ({"template": "[MASK]", "prompt": "a"}, "in place of a prompt"),
    ({"template": "[MASK]", "max_tokens": 2}, "the blanks, or the schema, say"),
    ({"features": [[1.0]]}, "features='1 vectors': this run knows none"),
    ({"response_format": {"type": "x"}}, "choose one of text, json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "any"}}}}, "schema at"),
])
def test_what_cannot_be_written_is_one_line(client, body, message):
    data = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400 and answer.text.count("\n") == 1
    assert re.search(message, error["message"]) and len(error["message"]) <= 500


def test_other_requests(client, server, monkeypatch):
    assert client.post("/v1/completions", content=b"{}").status_code == 415, "as a form of another page would send it"
    big = client.post("/v1/completions", content=b" " * (1 << 21), headers={"Content-Type": "application/json"})
    assert big.status_code == 413 and "more than 1,048,576 bytes" in big.text
    assert client.get("/nowhere").json()["error"]["code"] == 404
    assert client.get("/v1/completions").json()["error"]["code"] == 405
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "run"
    assert "default-src 'none'" in client.get("/").headers["Content-Security-Policy"]
    about = client.get("/v1/run").json()
    names = [method["name"] for method in about["methods"]]
    assert "ancestral" in names and "edlm" not in names and about["hierarchy"]["sizes"] == [257, 8, 1]
    no_chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert no_chat.status_code == 400 and "no chat template" in no_chat.text
    monkeypatch.setattr(server.desk, "most", 0)
    full = client.post("/v1/completions", json={"prompt": "a"})
    assert full.status_code == 429 and full.headers["Retry-After"] == "1" and "try again" in full.text
    monkeypatch.undo()
    monkeypatch.setattr(server, "settings", dataclasses.replace(server.settings, timeout=1e-9))
    late = client.post("/v1/completions", json={"prompt": "a"})
    assert late.status_code == 504 and "time limit" in late.text
    monkeypatch.setattr(server.draw, "prepare", lambda *_: 1 / 0)
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500, "and no word of what is inside"
    monkeypatch.undo()
    assert said(client, prompt="a", seed=1)
    idle = ("hdlm_texts_running 0\n", "hdlm_texts_waiting 0\n")
    until = time.monotonic() + 60  # the text that was late leaves its rows at the end of a call
    while not all(line in (metrics := client.get("/metrics").text) for line in idle) and time.monotonic() < until:
        pass
    assert re.search(r'hdlm_requests_total\{status="429"\} 1\n', metrics)
    assert all(line in metrics for line in idle)


def put(server, tell, **settings):
    """The job of one text, watched, on the server's desk."""
    g = texts.settings(server.run, settings, num_samples=1)
    job, = desk.jobs_of(server.draw, texts.prompted(server.run, g, "The "), g, watches=True, streams=True, tell=tell)
    server.desk.put([job])
    return job


def test_who_leaves_frees_the_row(client, server):
    told, held, done = [], threading.Event(), threading.Event()

    def first(number, news):
        told.append(news)
        held.wait(30)  # until it has been marked as left
    job = put(server, first, seed=1)
    job.left = True
    held.set()
    others = []
    put(server, lambda _, news: (others.append(news), done.set() if isinstance(news, desk.Written) else None), seed=3)
    assert done.wait(60)
    assert len(told) <= 1 and not any(isinstance(news, desk.Written) for news in told)
    assert others[-1].text == model().generate(1, prompt="The ", seed=3, **FEW)[0]
    assert server.desk.running == server.desk.waiting == 0

    async def leaves():
        """A request whose client is gone as soon as it is read."""
        body = json.dumps({"prompt": "a"}).encode()
        come = iter([{"type": "http.request", "body": body, "more_body": False}])
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": [
            (b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}

        async def receive():
            return next(come, {"type": "http.disconnect"})

        async def send(message):
            sent.append(message)

        sent = []
        await server.app()(scope, receive, send)
        return sent[0]["status"]

    with ThreadPoolExecutor(1) as thread:  # in this one a browser's loop may run
        assert thread.submit(asyncio.run, leaves()).result() == 499


def test_a_batch_that_breaks_takes_nobody_with_it(client, server, monkeypatch):
    advance = slots.Slots.advance
    monkeypatch.setattr(slots.Slots, "advance", lambda self, calls: 1 / 0)
    broken = client.post("/v1/completions", json={"prompt": "a", "seed": 1})
    assert broken.status_code == 500 and "ZeroDivisionError" in broken.text
    monkeypatch.setattr(slots.Slots, "advance", advance)
    assert said(client, prompt="The ", seed=3, echo=True) == model().generate(1, prompt="The ", seed=3, **FEW)


def test_others_need_the_token(monkeypatch):
    for host in ("0.0.0.0", "192.168.1.7", "example.org", "::"):
        with pytest.raises(ConfigError, match="serve.host=.*set serve.token"):
            serve.listen(ServeConfig(host=host))
    with pytest.raises(ConfigError, match="serve.token=.*not set"):
        serve.listen(ServeConfig(token="$NOT_THERE"))
    with serve.listen(ServeConfig(port=0)) as taken:
        with pytest.raises(OSError, match="serve.port=.*give another --port"):
            serve.listen(ServeConfig(port=taken.getsockname()[1]))
    assert serve.loopback("localhost") and serve.loopback("[::1]") and not serve.loopback("127.evil.example")
    with testclient.TestClient(server_of(model().run, host="0.0.0.0", token="secret").app()) as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for path in ("/v1/run", "/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secre"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401


@pytest.mark.slow
def test_methods_of_the_loop_join_a_batch_that_runs():
    """A cache, a canvas that grows and tokens that are taken back: as alone, whenever a row joins."""
    m = model()
    for method, options in (("dual_cache", "block=4 draw=sample"), ("daedal", "start=4 expand=2"), ("remdm", "")):
        g = [texts.settings(m.run, {"method": method, "options": options, "steps": 6, "batch_size": 8, "seed": seed},
                            num_samples=1) for seed in range(3)]
        asked = [texts.prompted(m.run, one, prompt) for one, prompt in zip(g, ("The ", "a", ""), strict=True)]
        alone = [m._draw(a.canvas, one) for a, one in zip(asked, g, strict=True)]
        rows = [slots.texts_of(m._draw, a.canvas, one)[0] for a, one in zip(asked, g, strict=True)]
        assert len({slots.kind_of(m._draw, a.canvas, one) for a, one in zip(asked, g, strict=True)}) == 1
        batch = slots.Slots(m._draw, g[0], asked[0].canvas, 8)
        for slot, row in enumerate(rows):  # the second when the first has had two calls, and so on
            batch.put({2 * slot: row})
            seen = batch.advance(2)
        seen = batch.advance(1000)
        assert not seen.busy.any()
        for slot, out in enumerate(alone):
            n = int(out["length"][0])
            assert seen.length[2 * slot] == n, method
            np.testing.assert_array_equal(seen.z[2 * slot, :n], out["tokens"][0, :n], method)


@pytest.mark.slow
def test_what_has_no_levels_is_drawn_together():
    """An autoregressive run: what waits is one batch, and each text is its seed's."""
    run = model().run
    c = run.config
    config = dataclasses.replace(
        c, diffusion=dataclasses.replace(c.diffusion, process="autoregressive"),
        hierarchy=dataclasses.replace(c.hierarchy, clusters=(1,)),
        model=dataclasses.replace(c.model, time_conditioning=False))
    flat = Hierarchy.from_parents([], vocab_size=257)
    network, process = build(config, flat)
    _, where = placed(lambda: network.init_params(jax.random.key(0), SEQ_LEN), run.mesh)
    params = jax.device_put(network.init_params(jax.random.key(0), SEQ_LEN), where)
    server = server_of(dataclasses.replace(run, config=config, trained=config, hierarchy=flat, network=network,
                                           process=process, params=params))
    with testclient.TestClient(server.app(), base_url="http://127.0.0.1") as client:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda seed: said(client, prompt="ab", seed=seed, n=2), range(3)))
        for seed, both in enumerate(found):
            g = texts.settings(server.run, {"seed": seed, "batch_size": 8}, num_samples=2)
            asked = texts.prompted(server.run, g, "ab")
            out = server.draw(asked.canvas, g)
            assert both == [asked.text(run.tokenizer, row, n).removeprefix("ab")
                            for row, n in zip(out["tokens"], out["length"], strict=True)]
        seen = pieces(client, prompt="ab", seed=0, canvas=True)
        assert len([one for one in seen if "canvas" in one]) == SEQ_LEN - 1
        error = client.post("/v1/completions", json={"template": "[MASK] b"})
        assert error.status_code == 400 and "cannot fill blanks" in error.text


def test_without_starlette_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"--mode=serve: needs the uvicorn package: pip install 'hdlm_jax\[serve\]'"):
        package("uvicorn", "serve", "--mode=serve")


@pytest.fixture
def tab(server, client, browser):
    """The page of the served run at 400 pixels, whose errors, and requests to elsewhere, fail the test."""
    with serve.listen(ServeConfig(port=0)) as sock:
        http = uvicorn.Server(uvicorn.Config(server.app(), log_level="error", lifespan="off"))
        thread = threading.Thread(target=http.run, args=([sock],))
        thread.start()
        home, wrong = f"http://127.0.0.1:{sock.getsockname()[1]}/", []
        opened = browser.new_page(viewport={"width": 400, "height": 900})

        def note(text, bad):
            if bad and "status of 400" not in text:
                wrong.append(text)

        opened.on("console", lambda message: note(message.text, message.type in ("error", "warning")))
        opened.on("pageerror", lambda error: note(str(error), True))
        opened.on("request", lambda request: note(request.url, not request.url.startswith((home, "data:"))))
        try:
            opened.goto(home)
            opened.wait_for_selector("html[data-ready]")
            yield opened
        finally:
            opened.close()
            http.should_exit = True
            thread.join()
    assert wrong == []


def test_the_page_in_a_browser(client, tab):
    """By the keyboard alone: a prompt, two methods side by side, the way of a token; then blanks."""
    def press(*keys):
        for key in keys:
            tab.keyboard.press(key)

    def shown(number):
        tab.wait_for_selector("[data-state=done]")
        return "".join(tab.locator(f"#text{number} .tok > .on").all_text_contents())

    tab.keyboard.type("The ")
    press("Tab", "Tab")
    tab.keyboard.type("3")
    press("Tab", "Tab", "Space")  # past the button (the second one sleeps): two methods
    assert tab.locator("#method2").count() == 1
    tab.locator("#method2").focus()
    tab.keyboard.type("ancestral")
    press("Tab")
    tab.keyboard.type("3")
    press("Control+Enter")
    t = model().tokenizer
    for number, steps in ((1, 6), (2, 3)):
        found = model().generate(1, steps, "The ", seed=3, batch_size=8)[0]
        assert len(shown(number)) > 0 and tab.locator(f"#status{number} [data-count='0']").inner_text() == str(SEQ_LEN)
        letters = [c for c in found if c.isascii() and c.isalnum()]
        assert [c for c in shown(number) if c in letters and c.isalnum()][:3] == letters[:3] == list("The")
    tab.locator("#text1").focus()
    press(*["ArrowDown"] * 7)
    about = tab.locator(".pane .about").first.inner_text()
    assert re.search(r"position 7: mask .*at call \d \(p = ", about)
    press("ArrowLeft", "ArrowLeft")
    assert int(tab.locator("#status1").get_attribute("data-call")) < 6
    tab.locator("#text2 .tok").nth(9).hover()
    assert "position 10: mask" in tab.locator(".pane .about").last.inner_text()
    for width in (400, 800, 1600):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator("#prompt").fill("a[MASK:2]b")
    assert "2 blanks" not in tab.locator("#what").inner_text() and "1 blank is" in tab.locator("#what").inner_text()
    press("Control+Enter")
    tab.wait_for_selector("[data-state=done]")
    assert shown(1).startswith("a") and shown(1).endswith("b") and tab.locator("#text1 .tok").count() == 4
    tab.locator("#prompt").fill("a" * 99)
    press("Control+Enter")
    tab.wait_for_selector(".wrong")
    assert t.kind == "bytes" and "99 tokens: must be fewer" in tab.locator(".wrong").first.inner_text()


@pytest.mark.slow
def test_kill_and_restart(root):
    """A server that is killed leaves nothing behind: another one at the same port writes the same."""
    where, port, found = str(trained()[1]), "0", []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-m", "hdlm_jax.main", "serve", where, "--port", port], cwd=root,
                                   stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)})
        try:
            line = next(line for line in process.stdout if line.startswith("serve: "))
            port = re.search(r"http://127.0.0.1:(\d+)", line)[1]
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(
                {"prompt": "The ", "seed": 1, "steps": 6}).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                found.append(json.load(answer)["choices"][0]["text"])
        finally:
            process.send_signal(number)
            process.wait(30)
            process.stdout.close()
    assert len(set(found)) == 1 and len(found) == 3
