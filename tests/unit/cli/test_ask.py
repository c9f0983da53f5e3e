"""`ask` against a scripted gateway: the answer as it comes, whatever characters it holds, and how it ended."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from epdctl.cli.ask import ask
from epdctl.cli.asking import Gateway, by_name
from epdctl.cli.console import plain
from epdctl.errors import RankError, Unreachable
from tests.support.leaks import GUARD_SECONDS

ENDS = "one\u2028two\u2029three\x85four"  # what Unicode calls ends of lines


class Answering(ThreadingHTTPServer):
    """Says ``words`` one by one, each when the one before has been shown."""

    def __init__(self, words: list[str], reason: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.words = words
        self.reason = reason
        self.shown = threading.Semaphore(1)
        self.unseen: list[str] = []  # said with nothing shown of what came before

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        self._begin()
        self.wfile.write(b'{"data": [{"id": "tiny"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._begin()
        for word in self.server.words:
            if not self.server.shown.acquire(timeout=GUARD_SECONDS):
                self.server.unseen.append(word)
            self._say({"content": word}, None)
        self._say({}, self.server.reason)
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self) -> None:
        self.send_response(200)
        self.end_headers()

    def _say(self, delta: dict[str, str], reason: str | None) -> None:
        chunk = json.dumps({"choices": [{"delta": delta, "finish_reason": reason}]}, ensure_ascii=False)
        self.wfile.write(f"data: {chunk}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """The test's output is enough."""


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, *words: str, reason: str = "stop") -> Iterator[Answering]:
    server = Answering(list(words), reason)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("epdctl.cli.ask._address", lambda *_: server.url)
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Terminal(io.StringIO):
    """Tells the gateway of each word that can be read here."""

    def __init__(self, server: Answering) -> None:
        super().__init__()
        self._server = server
        self._fresh = False

    def write(self, text: str) -> int:
        self._fresh = self._fresh or bool(text.strip())
        return super().write(text)

    def flush(self) -> None:
        if self._fresh:
            self._fresh = False
            self._server.shown.release()


def asked(monkeypatch: pytest.MonkeyPatch, server: Answering) -> str:
    terminal = Terminal(server)
    monkeypatch.setattr(sys, "stdout", terminal)
    ask(None, "what?")  # type: ignore[arg-type]
    return terminal.getvalue()


def test_each_word_is_shown_before_the_next_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(monkeypatch, "one", " two", " three") as server:
        assert asked(monkeypatch, server) == "one two three\n"
        assert server.unseen == []


def test_an_answer_may_hold_what_ends_a_line_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(monkeypatch, ENDS) as server:
        assert asked(monkeypatch, server) == ENDS.replace("\x85", "") + "\n"


@pytest.mark.parametrize(("reason", "said"), [("stop", ""), ("length", "note: the answer was cut; ")])
def test_whether_an_answer_was_cut_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str, said: str
) -> None:
    with answering(monkeypatch, "one", reason=reason) as server:
        asked(monkeypatch, server)
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert bool(told) == bool(said)


def test_an_empty_answer_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(monkeypatch) as server:
        assert asked(monkeypatch, server) == "\n"
    assert capsys.readouterr().err == "note: the model answered nothing (finish_reason: stop)\n"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("messages[0].content[1].image_url.url: not a picture", "b.png: not a picture"),
        ("messages[1].content[0]: too large", "a.png: too large"),
        ("messages[0].content[2]: too long", "the question: too long"),
    ],
)
def test_a_refusal_names_the_file(said: str, told: str) -> None:
    with pytest.raises(RankError) as refused, by_name([Path("a.png"), Path("b.png")]):
        raise RankError(said, hint="kept")
    assert (refused.value.message, refused.value.hint) == (told, "kept")


def test_a_gateway_that_is_not_there_gets_a_hint() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        gateway = Gateway(f"http://127.0.0.1:{closed.getsockname()[1]}", None, GUARD_SECONDS)
        with pytest.raises(Unreachable) as refused:
            gateway.whole({})
    assert "`epdctl status`" in (refused.value.hint or "")


def test_no_control_code_of_a_text_reaches_a_terminal() -> None:
    codes = {"\x1b[31mred\x1b[0m": "red", "\x9b31mred\x9b0m": "red", "\x9d0;title\x9cx": "x", "\x1b]0;t\x07x": "x"}
    for code, text in codes.items():
        assert plain(code) == text
    everything = "".join(map(chr, range(0x100)))
    assert [char for char in everything if plain(char)] == [
        char for char in everything if char in "\t\n" or (char >= " " and not "\x7f" <= char <= "\x9f")
    ]
