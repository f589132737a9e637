"""A server on 127.0.0.1 that speaks the chat and completion protocols, and misbehaves on demand.

Each request is answered by `script(body, attempt)`: a text, a `Reply` for something else, or None to drop the
connection. It counts what it answered.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What to send: a body (as it is when bytes), a status, headers, after some seconds."""

    body: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cut: bool = False  # close the connection in the middle of the body


Script = Callable[[dict[str, Any], int], "str | Reply | None"]


class JudgeServer:
    """Runs in threads; use as a context manager. `bodies` are the requests, in order; `answered` those given an answer."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.times: list[float] = []
        self.authorization: set[str] = set()
        self.most_in_flight = 0
        self._in_flight = 0
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge._answer(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def calls(self) -> int:
        return len(self.bodies)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        key = json.dumps(body, sort_keys=True)
        with self._lock:
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.authorization.add(handler.headers.get("Authorization", ""))
            self._attempts[key] += 1
            attempt = self._attempts[key]
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            reply = self.script(body, attempt)
            if isinstance(reply, str):
                reply = Reply(chat_reply(reply))
            if reply is None:
                _reset(handler)
                return
            time.sleep(reply.seconds)
        finally:
            with self._lock:
                self._in_flight -= 1
        if reply.status == 200 and not reply.cut:
            with self._lock:
                self.answered[key] += 1
        _send(handler, reply)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Close so that the client sees a reset, not an end."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()
    handler.wfile = handler.rfile = open("/dev/null", "r+b", buffering=0)  # noqa: SIM115 - closed by the handler


def _send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    try:
        handler.send_response(reply.status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if reply.cut else content)
        handler.wfile.flush()
    except (BrokenPipeError, ConnectionResetError):  # a client that timed out has gone
        pass
    if reply.cut:
        handler.close_connection = True


def chat_reply(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {
        "id": "x",
        "object": "chat.completion",
        "model": "served",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def error_reply(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """The body of an error."""
    return Reply(
        {"error": {"message": message, "code": code}},
        status,
        {k.replace("_", "-"): v for k, v in headers.items()},
    )
