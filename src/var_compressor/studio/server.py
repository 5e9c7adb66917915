"""The studio as a server: one process, one port, one address, nothing that leaves the machine."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from var_compressor.prompts import load_prompts
from var_compressor.studio.drawing import Painter
from var_compressor.studio.engine import Engine
from var_compressor.studio.gallery import Gallery
from var_compressor.studio.orders import Order
from var_compressor.studio.reports import Reports
from var_compressor.studio.shelf import Opening, Shelf, offers

if TYPE_CHECKING:
    from var_compressor.studio.page import Studio

MAX_BODY_BYTES = 24 * 2**20
MAX_UPLOAD = "20mb"
# it knows nothing but the scenes that it was trained on
EMBEDDED, EXAMPLES, NUM_EXAMPLES = "infinity-tiny", "tiny", 4
SHUTDOWN_SECONDS = 3
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass(frozen=True)
class Address:
    """Where the studio listens. ``port`` 0 is any that is free; ``password`` None asks for none."""

    host: str
    port: int
    password: str | None


@contextmanager
def new_studio(
    sources: Sequence[str],
    devices: Sequence[torch.device],
    opening: Opening,
    *,
    out: Path,
    reports: Sequence[Path],
    max_waiting: int,
) -> Iterator[Studio]:
    """Everything behind the page: one worker per device, stopped at the end.

    Raises: ValueError for a source that is no model or a folder that is none.
    """
    _import_gradio()
    from var_compressor.studio.page import Studio

    offered, shown, gallery = offers(sources), Reports(reports), Gallery(out)
    painters = [Painter(Shelf(offered, device, opening), gallery) for device in devices]
    kinds = "torch's tensors" if devices[0].type == "cuda" else "the whole process"
    bases = {offer.source for offer in offered if not offer.is_compressed}
    examples = load_prompts(EXAMPLES).values() if bases == {EMBEDDED} else ()
    engine: Engine[Order] = Engine(painters, max_waiting=max_waiting)
    try:
        yield Studio(
            engine,
            gallery,
            shown,
            offered,
            f"{_machine(devices)} · images are kept in {out}",
            kinds,
            sorted(examples, key=len)[:NUM_EXAMPLES],
        )
    finally:
        engine.close()


def serve(
    studio: Studio,
    address: Address,
    *,
    on_start: Callable[[str, Callable[[], None]], None],
) -> None:
    """Serve until interrupted; ``on_start`` gets the page's URL, and a function that ends it.

    Raises: ValueError naming the address when it is taken or not ours.
    """
    import uvicorn

    with bound(address) as listener:
        app = web_app(studio, address)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        )

        def stop() -> None:
            server.should_exit = True

        host, port = listener.getsockname()[:2]
        on_start(f"http://{_printed(host)}:{port}", stop)
        server.run(sockets=[listener])


def web_app(studio: Studio, address: Address) -> Any:
    """The page as an ASGI application."""
    gr = _import_gradio()
    from fastapi import FastAPI

    from var_compressor.studio import panels
    from var_compressor.studio.page import TITLE, build_page

    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    system = ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    return gr.mount_gradio_app(
        app,
        build_page(studio),
        path="/",
        auth=None if address.password is None else _login(address.password),
        auth_message="Any name, and the password that the studio was started with.",
        allowed_paths=[str(studio.gallery.folder)],
        max_file_size=MAX_UPLOAD,
        show_error=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=system, font_mono=mono),
        css=panels.CSS,
    )


class Guard:
    """Refuses bodies that are too large, and tells browsers to load nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and (not lengths[0].isdigit() or int(lengths[0]) > MAX_BODY_BYTES):
            await _refuse(send)
            return
        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY_BYTES:
                return {"type": "http.disconnect"}
            return message

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        await self.app(scope, counted, guarded)


async def _refuse(send: Any) -> None:
    text = f"the request is larger than {MAX_BODY_BYTES >> 20} MiB".encode()
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@contextmanager
def bound(address: Address) -> Iterator[socket.socket]:
    """A listening socket. Raises: ValueError naming the address and the way out."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
            # who hears of the address may connect before the first event is handled
            listener.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"{address.host}:{address.port}: {reason}; give another --port (0: any free one) "
                "or --host"
            ) from None
        yield listener


def open_browser(url: str) -> None:
    """Where there is a screen: a text browser would take the terminal away."""
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


@lru_cache
def _cache_folder() -> tempfile.TemporaryDirectory:
    """Where files on their way to and from browsers are kept; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="varc-studio-")


def _import_gradio() -> Any:
    """Gradio, told before it is read to phone nobody and where to keep files.

    Raises: ValueError when it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # after every event it would sum up all events so far, for a page that is not served here
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["GRADIO_TEMP_DIR"] = _cache_folder().name
    try:
        import gradio
    except ImportError:
        raise ValueError("the studio needs Gradio: pip install 'var-compressor[studio]'") from None
    return gradio


def _login(password: str) -> Callable[[str, str], bool]:
    def is_right(name: str, given: str) -> bool:
        return secrets.compare_digest(given.encode(), password.encode())

    return is_right


def _machine(devices: Sequence[torch.device]) -> str:
    names = [
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU" for device in devices
    ]
    return ", ".join(names)


def _printed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
