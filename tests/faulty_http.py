"""A real HTTP server on loopback that serves a folder with byte ranges, and misbehaves as told."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[str, int], str | None]
"""(path, number of earlier requests for it) to what goes wrong: a status, "stall", "cut", "short", "whole"."""

STALL_S = 1.0


class Server:
    """Where the folder is served, and what was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.fault: Fault = lambda path, before: None
        self.lock = threading.Lock()


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with server.lock:
                before = server.asked[self.path]
                server.asked[self.path] += 1
            fault = server.fault(self.path, before)
            if fault is not None and fault.isdigit():
                self.send_error(int(fault))
                return
            if fault == "stall":
                time.sleep(STALL_S)
                self.close_connection = True
                return
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            self.answer(file.read_bytes(), fault)

        def answer(self, data: bytes, fault: str | None) -> None:
            if fault == "short":  # the file as somebody might have cut it, consistent in itself
                data = data[: len(data) // 2]
            asked = self.headers.get("Range")
            status = 200
            if asked and fault != "whole":
                low, high = asked.removeprefix("bytes=").split("-")
                if int(low) >= len(data):
                    self.send_error(416)
                    return
                status, data = 206, data[int(low) : int(high) + 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "cut":  # the connection breaks in the middle
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)
            with server.lock:
                server.sent += len(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
