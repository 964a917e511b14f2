"""A run behind HTTP: OpenAI's completions and chats, blanks, JSON schemas, and a page (docs/serving.md)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import jax

from hdlm_jax.common import jsons
from hdlm_jax.common.console import say
from hdlm_jax.common.extras import package
from hdlm_jax.common.jsons import Json
from hdlm_jax.config import Config, ServeConfig
from hdlm_jax.config.rules import rule
from hdlm_jax.decoding import desk, presets, sampler
from hdlm_jax.runs import orders
from hdlm_jax.training.loading import Run, load_run

MOST_BODY = 1 << 20  # bytes of a request
SLOW = 10.0  # seconds that a body may take to come
Request: TypeAlias = Any  # starlette's, which need not be installed
Response: TypeAlias = Any
STATUS = {"late": 504, "stopping": 503, "broken": 500}


class Refused(Exception):
    """An answer that is an error: its status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def loopback(host: str) -> bool:
    """Whether only this machine can come in there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """What the endpoints do.

    page: HTML. about: what the page is told of the run, which needs the token.
    """

    def __init__(self, run: Run, page: str, about: Json):
        self.run, self.page, self.settings = run, page, run.config.serve
        self.draw = sampler.sampler_of(run, sampler.load_helper(run, run.config.generate))
        self.desk = desk.Desk(self.draw, run.tokenizer, self.settings.batch, self.settings.queue)
        self.name = str(about.get("name", "run"))
        g, d = run.config.generate, run.config.data
        more = {"seq_len": run.config.model.seq_len, "step": run.step, "methods": methods(run),
                "features": [d.feature_places, d.feature_width],
                "chats": bool(run.tokenizer.chat_template),
                "default": {"method": g.method, "options": g.options, "steps": g.steps}}
        self.about = jsons.dumps(about | more, ensure_ascii=False).encode("utf-8", "replace")
        self.statuses: Counter[int] = Counter()
        self.seconds = 0.0
        self.http, self.responses = (package(f"starlette.{name}", "serve", "--mode=serve")
                                     for name in ("exceptions", "responses"))

    # -- what every request goes through

    def check(self, request: Request) -> None:
        """Refused unless it comes from where it may and, beyond the page, knows the token."""
        if loopback(self.settings.host):  # else any web page could ask through a name of its own that leads here
            if not loopback(request.url.hostname or ""):
                raise Refused(403, "this server is asked at localhost or 127.0.0.1 alone")
        if self.settings.token and request.url.path not in ("/", "/health"):
            given = request.headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.settings.token}".encode()):
                raise Refused(401, "this server needs its token: send Authorization: Bearer TOKEN")

    def guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def call(request: Request) -> Response:
            started = time.monotonic()
            try:
                self.check(request)
                response = await handler(request)
            except Refused as error:
                response = self.error(error.status, str(error))
            except desk.Busy as error:
                response = self.error(503 if "stopping" in str(error) else 429, str(error))
            except (ValueError, OverflowError) as error:
                response = self.error(400, " ".join(str(error).split()))
            except Exception as error:
                print(f"serve: {type(error).__name__}: {error}", file=sys.stderr)
                response = self.error(500, "the server could not do this; its own output says why")
            self.statuses[response.status_code] += 1
            self.seconds += time.monotonic() - started
            return response

        return call

    def error(self, status: int, message: str) -> Response:
        headers = dict.fromkeys((429, 503), {"Retry-After": "1"}) | {401: {"WWW-Authenticate": "Bearer"}}
        return self.json(failure(status, message), status, headers.get(status))

    def json(self, content: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        text = jsons.dumps(content, ensure_ascii=False) + "\n"
        return self.responses.Response(text.encode("utf-8", "replace"), status, headers, "application/json")

    async def body(self, request: Request) -> Json:
        """The request's JSON; Refused where it is none, too much or too slow."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "send JSON, with Content-Type: application/json")
        found = bytearray()
        try:
            async with asyncio.timeout(SLOW):
                async for part in request.stream():
                    found += part
                    if len(found) > MOST_BODY:
                        raise Refused(413, f"body: more than {MOST_BODY:,} bytes")
        except TimeoutError:
            raise Refused(408, f"body: not here after {SLOW:g} seconds") from None
        return orders.parse(bytes(found))

    # -- texts

    async def write(self, request: Request, chat: bool) -> Response:
        """Completions, or chats, whole or as a stream."""
        body, loop, news = await self.body(request), asyncio.get_running_loop(), asyncio.Queue[tuple[int, desk.News]]()
        found = await asyncio.to_thread(orders.order, self.run, body, chat)

        def tell(number: int, what: desk.News) -> None:
            with contextlib.suppress(RuntimeError):  # the server is gone
                loop.call_soon_threadsafe(news.put_nowait, (number, what))

        jobs = desk.jobs_of(self.draw, found.asked, found.g, tell=tell, front=found.front, stops=found.stops,
                            streams=found.stream, watches=found.stream and found.canvas,
                            deadline=time.monotonic() + self.settings.timeout)
        self.desk.put(jobs)
        shape = _Shape(chat, self.name, found, f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}")
        if found.stream:
            return self.responses.StreamingResponse(self.stream(shape, jobs, news), media_type="text/event-stream",
                                                    headers={"Cache-Control": "no-store"})
        try:
            return await self.whole(request, shape, jobs, news)
        finally:
            self.leave(jobs)

    def leave(self, jobs: list[desk.Job]) -> None:
        """Nobody waits for them any more."""
        for job in jobs:
            job.left = True
        self.desk.wake()

    async def whole(self, request: Request, shape: _Shape, jobs: list[desk.Job],
                    news: asyncio.Queue[tuple[int, desk.News]]) -> Response:
        written: dict[int, desk.Written] = {}

        async def collect() -> None:
            while len(written) < len(jobs):
                number, what = await news.get()
                if isinstance(what, desk.Failed):
                    raise Refused(STATUS[what.why], what.message)
                if isinstance(what, desk.Written):
                    written[number] = what

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = asyncio.create_task(collect()), asyncio.create_task(gone())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise Refused(499, "the client has left")
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
        return self.json(shape.whole([written[i] for i in range(len(jobs))]))

    async def stream(self, shape: _Shape, jobs: list[desk.Job], news: asyncio.Queue[tuple[int, desk.News]]
                     ) -> AsyncIterator[bytes]:
        """Server-sent events: pieces of the texts and, where asked for, what the canvas shows."""
        sent, left, began = Counter[int](), len(jobs), time.monotonic()
        try:
            while left:
                number, what = await news.get()
                if isinstance(what, desk.Failed):
                    yield event(failure(STATUS[what.why], what.message))
                    break
                if isinstance(what, desk.Frame):
                    start = {} if what.start is None else {"start": what.start}
                    canvas = {"call": what.call, "t": round(what.t, 4), "changes": what.changes} | start
                    yield event(shape.piece(number, "", canvas=canvas))
                    continue
                text = what if isinstance(what, str) else what.text[sent[number] :]
                sent[number] += len(text)
                done = None if isinstance(what, str) else what
                left -= done is not None
                yield event(shape.piece(number, text, done))
            yield b"data: [DONE]\n\n"
        finally:
            self.seconds += time.monotonic() - began  # `guarded` has counted up to here
            self.leave(jobs)

    # -- what else there is

    async def show_page(self, request: Request) -> Response:
        policy = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
                  "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        return self.responses.HTMLResponse(self.page, headers={"Content-Security-Policy": policy,
                                                               "X-Content-Type-Options": "nosniff"})

    async def health(self, request: Request) -> Response:
        alive = self.desk.alive
        return self.json({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        return self.json({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "hdlm_jax"}]})

    async def tell_run(self, request: Request) -> Response:
        return self.responses.Response(self.about, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        """In the text format of Prometheus."""
        lines = [f'hdlm_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.statuses.items())]
        d = self.desk
        lines += [f"hdlm_{name} {value}" for name, value in {
            "request_seconds_sum": self.seconds, "request_seconds_count": self.statuses.total(),
            "texts_running": d.running, "texts_waiting": d.waiting, "texts_total": d.texts,
            "tokens_total": d.tokens}.items()]
        return self.responses.PlainTextResponse("\n".join(lines) + "\n")

    def app(self) -> Any:
        """The ASGI application."""
        routing = package("starlette.routing", "serve", "--mode=serve")
        applications = package("starlette.applications", "serve", "--mode=serve")
        gets = {"/": self.show_page, "/health": self.health, "/metrics": self.metrics, "/v1/models": self.models,
                "/v1/run": self.tell_run}
        routes = [routing.Route(path, self.guarded(handler), methods=["GET"]) for path, handler in gets.items()]
        for path, chat in (("/v1/completions", False), ("/v1/chat/completions", True)):
            async def write(request: Request, chat: bool = chat) -> Response:
                return await self.write(request, chat)

            routes.append(routing.Route(path, self.guarded(write), methods=["POST"]))

        async def other(request: Request, error: Any) -> Response:
            return self.error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.desk.close)

        return applications.Starlette(routes=routes, exception_handlers={self.http.HTTPException: other},
                                      lifespan=lifespan)


def failure(status: int, message: str) -> Json:
    """OpenAI's shape of an error."""
    message = message if len(message) <= 500 else message[:497] + "..."
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def event(content: Json) -> bytes:
    text = jsons.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("utf-8", "replace")


@dataclasses.dataclass
class _Shape:
    """OpenAI's shapes of an answer."""

    chat: bool
    model: str
    order: orders.Order
    id: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self, stream: bool) -> Json:
        kind = ("chat.completion" + ".chunk" * stream) if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "seed": self.order.g.seed}

    def usage(self, written: int) -> Json:
        given = self.order.prompt_tokens
        return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}

    def whole(self, written: list[desk.Written]) -> Json:
        said = [{"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
                for one in written]
        choices = [{"index": i, **text, "finish_reason": one.reason, "logprobs": None}
                   for i, (text, one) in enumerate(zip(said, written, strict=True))]
        return self.head(False) | {"choices": choices, "usage": self.usage(sum(one.tokens for one in written))}

    def piece(self, number: int, text: str, done: desk.Written | None = None, **more: Any) -> Json:
        said = {"delta": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": number, **said, "finish_reason": done.reason if done else None, **more}
        return self.head(True) | {"choices": [choice]} | ({"usage": self.usage(done.tokens)} if done else {})


def methods(run: Run) -> list[Json]:
    """Name, options and first sentence of the methods that this run can be served with."""
    out: list[Json] = []
    if not run.process.unmasks:
        out = [{"name": name, "options": "", "steps": name == "ancestral" and not run.process.causal, "about": ""}
               for name in run.process.methods or ("ancestral",)]
    for name, make in presets.METHODS.items():
        method = make()
        if not (run.config.decoder.loops if name == "diagonal" else run.process.unmasks):
            continue
        own = method.needs in run.config.model.chooses
        if method.needs and not (own or method.needs in presets.HELPERS and run.config.generate.helper):
            continue
        options = presets.options_of(name)
        about = " ".join((make.__doc__ or "").split()).partition(". ")[0].rstrip(".").replace("`", "")
        out.append({"name": name, "steps": "steps" in options, "about": about,
                    "options": " ".join(f"{k}={v}" for k, v in options.items() if k != "steps")})
    return out


def listen(settings: ServeConfig) -> socket.socket:
    """A socket at serve.host and serve.port; ConfigError, or an OSError of one line, where there can be none."""
    rule(bool(settings.token) or loopback(settings.host), "serve.host", settings.host, "others can come in there, so "
         "set serve.token (--config.serve.token='$NAME' reads it from the environment), or stay at 127.0.0.1")
    rule("$" not in settings.token, "serve.token", settings.token, "this variable is not set")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"serve.host={settings.host!r} serve.port={settings.port}: cannot be listened at "
                      f"({os.strerror(error.errno or 0)}); give another --port") from error


def serve(config: Config, workdir: str, page: str, about: Json) -> None:
    """Serves the run until it is stopped (Ctrl-C, SIGTERM); page, about: as Server's."""
    uvicorn = package("uvicorn", "serve", "--mode=serve")
    rule(jax.process_count() == 1, "serve", jax.process_count(), "one process serves; start it without --distributed")
    with contextlib.closing(listen(config.serve)) as sock:
        run = load_run(config, workdir, config.generate.checkpoint)
        server = Server(run, page, about)
        host, port = sock.getsockname()[:2]
        say(f"serve: {server.name}, step {server.run.step}, at http://{f'[{host}]' if ':' in host else host}:{port} "
            "(a page to look at, /v1/completions, /v1/chat/completions, /health, /metrics); Ctrl-C stops")
        settings = uvicorn.Config(server.app(), log_level="warning", access_log=False, timeout_keep_alive=30,
                                  limit_concurrency=config.serve.queue + 1024, timeout_graceful_shutdown=5)
        uvicorn.Server(settings).run(sockets=[sock])
