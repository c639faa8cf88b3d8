"""The pages of a built site as a browser shows them, without a library for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOK = Path(__file__).with_name("look.html")


def find() -> str | None:
    """Return the path of a browser, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Server(ThreadingHTTPServer):
    """A site, the page that looks at its pages, and the report of that."""

    daemon_threads = True

    def __init__(self, site: Path, pages: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(site)))
        self.texts = {"/look.html": LOOK.read_bytes(), "/pages.json": json.dumps(pages).encode()}
        self.report: dict[str, Any] | None = None
        self.reported = threading.Event()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        text = self.server.texts.get(self.path)
        if text is None:
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        self.server.report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.reported.set()

    def log_message(self, *args: object) -> None:
        pass


def look(browser: str, site: Path, pages: list[str], profile: Path, timeout: float) -> Any:
    """Return what `look.html` reports of the pages."""
    server = Server(site, pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += [
        "--window-size=1400,1000",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
    ]
    address = f"http://127.0.0.1:{server.server_port}/look.html"
    process = subprocess.Popen(
        [browser, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        if not server.reported.wait(timeout):
            raise TimeoutError(f"{browser} has not reported within {timeout:g} s")
        return server.report
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
        server.server_close()
