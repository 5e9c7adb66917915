"""The studio's page in a real browser, and its server under many requests at once.

The browser is the system's Chromium. Without one these tests are skipped, unless VARC_NEED_BROWSER
is 1: where the whole suite must run, a missing browser is a failure.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from studio_model import make_smallest
from var_compressor.images import SETTINGS_KEY, read_settings
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.resident import resident_bytes
from var_compressor.studio import server
from var_compressor.studio.drawing import Painter
from var_compressor.studio.orders import Order
from var_compressor.studio.shelf import Opening

NEED_BROWSER = "VARC_NEED_BROWSER"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROMPT = "a big cyan dull torus on a wooden floor."
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script> ${window.hit=1} {{7*7}}'
PATIENCE_MS = 60_000
MAX_WAITING = 2
reached: set[str] = set()


def _note_connections(event, arguments):
    # the main thread is the test's, and may reach whatever it likes
    if event.startswith("socket.") and threading.current_thread() is not threading.main_thread():
        if event == "socket.connect":
            reached.add(str(arguments[1]))
        elif event == "socket.getaddrinfo":
            reached.add(str(arguments[0]))


class HeldPainter(Painter):
    """Draws, but waits at each report: a while, or for as long as it is held."""

    free, pause = threading.Event(), 0.0

    def __call__(self, order, report):
        def slow_report(progress):
            report(progress)
            time.sleep(self.pause)
            while not self.free.wait(0.01):
                report(progress)

        return super().__call__(order, slow_report)


@contextmanager
def running(sources, *, out, reports=(), max_waiting, password=None):
    """A server on a free port in this process: (its URL, its studio)."""
    opening = Opening(torch.float32, "auto", 16, False)
    started, found = threading.Event(), {}

    def on_start(url, stop):
        found.update(url=url, stop=stop)
        started.set()

    with server.new_studio(
        sources,
        [torch.device("cpu")],
        opening,
        out=out,
        reports=reports,
        max_waiting=max_waiting,
    ) as studio:
        address = server.Address("127.0.0.1", 0, password)
        options = {"on_start": on_start}
        thread = threading.Thread(target=server.serve, args=(studio, address), kwargs=options)
        thread.start()
        assert started.wait(60)
        try:
            yield found["url"], studio
        finally:
            found["stop"]()
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def studio(model_dir, artifact_dir, tmp_path_factory):
    """(URL, studio) with Infinity-Tiny, a random model and that model in 4 bits."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "profile").mkdir()
    page = f"<h1 id=title>the report</h1><script>title.textContent='hit'</script>{HOSTILE}"
    (folder / "profile" / "index.html").write_text(page)
    sys.addaudithook(_note_connections)
    patched = pytest.MonkeyPatch()
    patched.setattr(server, "Painter", HeldPainter)
    HeldPainter.free.set()
    sources = ["infinity-tiny", str(artifact_dir)]
    options = {"reports": [folder / "profile"], "max_waiting": MAX_WAITING}
    with running(sources, out=folder / "gallery", **options) as found:
        yield found
    patched.undo()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        missing = f"no browser: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get(NEED_BROWSER) == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # a container's root may not use the sandbox, and its shared memory is small
        options = {"args": ["--no-sandbox", "--disable-dev-shm-usage"], "executable_path": found}
        launched = playwright.chromium.launch(**options)
        yield launched
        launched.close()


@pytest.fixture
def page(browser, studio):
    """A new visitor's page; at the end nothing may have gone wrong or elsewhere in it."""
    context = browser.new_context(viewport={"width": 1360, "height": 1000})
    context.set_default_timeout(PATIENCE_MS)
    page, wrong, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(studio[0])
    page.wait_for_selector("#draw")
    fill(page, "prompt", PROMPT)
    yield page
    assert page.evaluate("window.hit") is None
    HeldPainter.free.set()
    context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith((studio[0], "data:", "blob:"))] == []


def status(page):
    return page.inner_text("#status").strip()


def wait_for_status(page, text):
    page.wait_for_function(
        "text => document.querySelector('#status').innerText.includes(text)", arg=text
    )


def fill(page, name, text):
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def value(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first.input_value()


def choose(page, name, option):
    page.click(f"#{name} input")
    page.locator(f"#{name}").get_by_role("option", name=option, exact=True).click()


def draw(page):
    page.click("#draw button, button#draw")
    wait_for_status(page, "done")


def pixels(image):
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


def shown_image(page, selector):
    """What the page really shows there, fetched as its download button would."""
    return page.context.request.get(page.get_attribute(selector, "src")).body()


def test_a_prompt_becomes_previews_and_then_the_image(page, monkeypatch):
    said = page.evaluate_handle(
        """() => { const seen = {texts: new Set(), images: new Set()};
        new MutationObserver(() => {
          seen.texts.add(document.querySelector('#status').innerText.trim());
          const image = document.querySelector('#image img'); if (image) seen.images.add(image.src);
        }).observe(document.body, {subtree: true, childList: true, attributes: true});
        return seen; }"""
    )
    fill(page, "prompt", PROMPT)
    fill(page, "seed", "7")
    monkeypatch.setattr(HeldPainter, "pause", 0.2)
    draw(page)
    page.wait_for_selector("#details img")
    texts, images = page.evaluate("seen => [[...seen.texts], [...seen.images]]", said)
    assert sum("of 7" in text for text in texts) >= 5
    # of six previews and the image itself
    assert len(images) >= 5
    shown = shown_image(page, "#image img")
    with Image.open(io.BytesIO(shown)) as image:
        settings = json.loads(image.text[SETTINGS_KEY])
        drawn = pixels(image)
    assert (settings["prompt"], settings["seed"]) == (PROMPT, 7)
    pipeline = InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    assert drawn == pixels(pipeline.generate([PROMPT], seed=7).pil[0])
    assert page.locator("#details img").count() == 7
    assert page.locator("#details tr").count() == 1 + 7 + 3 + 3


def test_two_models_are_compared_at_one_seed(page, studio):
    names = [offer.name for offer in studio[1].offers]
    fill(page, "prompt", "a red cat")
    choose(page, "model", names[1])
    choose(page, "other", names[2])
    draw(page)
    page.wait_for_selector("#compared .agreement tr")
    assert page.locator("#compared .agreement tr").count() == 1 + 7 + 1
    shares = page.locator("#compared .agreement tr.total td").all_inner_texts()
    assert shares[0] == "all" and all("%" in share for share in shares[2:])
    one, other = (page.locator("#pair img").nth(index).get_attribute("src") for index in (0, 1))
    fetched = [page.context.request.get(url).body() for url in (one, other)]
    images = [np.asarray(Image.open(io.BytesIO(body)), dtype=float) for body in fetched]
    mean = abs(images[0] - images[1]).mean()
    assert mean > 0.1 and f"mean {mean:.1f}" in page.inner_text("#compared .vs-legend")
    assert page.locator("#difference img").count() == 1
    assert f"{names[1]}  |  {names[2]}" in page.locator("#pair").text_content()


def test_cancel_stops_between_levels_and_the_next_image_comes(page, studio):
    HeldPainter.free.clear()
    page.click("#draw")
    page.wait_for_selector("#status .busy")
    page.click("#cancel")
    wait_for_status(page, "cancelled")
    assert studio[1].engine.num_running == 0
    HeldPainter.free.set()
    draw(page)


def test_a_full_queue_refuses_and_a_waiting_visitor_sees_the_position(page, studio):
    engine, name = studio[1].engine, studio[1].offers[0].name
    HeldPainter.free.clear()
    others = [engine.submit(Order("a", (name,)), "another")]
    while engine.num_running == 0:
        page.wait_for_timeout(10)
    others += [engine.submit(Order("a", (name,)), "another") for _ in range(MAX_WAITING)]
    page.click("#draw")
    wait_for_status(page, "the queue is full: 2 drawings wait already")
    others[1].cancel()
    page.click("#draw")
    wait_for_status(page, "waiting: number 2 in the queue")
    others[2].cancel()
    wait_for_status(page, "waiting: number 1 in the queue")
    engine.cancel_all_of("another")
    HeldPainter.free.set()
    wait_for_status(page, "done")


def test_a_visitor_who_leaves_gives_up_the_turn(page, browser, studio):
    engine = studio[1].engine
    HeldPainter.free.clear()
    page.click("#draw")
    page.wait_for_selector("#status .busy")
    page.goto("about:blank")
    for _ in range(600):
        if engine.num_running + engine.num_waiting == 0:
            break
        page.wait_for_timeout(50)
    assert engine.num_running + engine.num_waiting == 0


def drop(page, content, name):
    """Drag a file from the desktop onto the page."""
    transfer = page.evaluate_handle(
        """([content, name]) => { const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), one => one.charCodeAt(0));
        transfer.items.add(new File([bytes], name, {type: 'image/png'})); return transfer; }""",
        [base64.b64encode(content).decode(), name],
    )
    target = page.locator("#restore button").first
    target.dispatch_event("drop", {"dataTransfer": transfer})


def test_a_png_brings_its_settings_back(page, studio):
    name = studio[1].offers[2].name
    fill(page, "prompt", 'a "red" cat')
    fill(page, "negative", "a cat")
    fill(page, "seed", str(2**63 - 1))
    choose(page, "model", name)
    choose(page, "ratio", "2:1 wide")
    draw(page)
    png = shown_image(page, "#image img")
    first = pixels(Image.open(io.BytesIO(png)))
    page.reload()
    page.wait_for_selector("#draw")
    assert value(page, "seed") == "0"
    drop(page, png, "some.png")
    wait_for_status(page, "settings restored")
    restored = [value(page, one) for one in ("prompt", "negative", "seed", "model", "ratio")]
    assert restored == ['a "red" cat', "a cat", str(2**63 - 1), name, "2:1 wide"]
    draw(page)
    assert pixels(Image.open(io.BytesIO(shown_image(page, "#image img")))) == first


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"hello", "x.png", "x.png: is not a readable PNG"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", HOSTILE + ".png", "is not a readable PNG"),
        (None, "x.png", "carries no settings"),
    ],
)
def test_wrong_files_are_refused(page, content, name, said):
    if content is None:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        content = buffer.getvalue()
    drop(page, content, name)
    wait_for_status(page, said)
    # and the next one may come
    assert page.locator("#restore input[type=file]").count() == 1


def test_a_prompt_of_a_megabyte_is_refused_politely(page):
    fill(page, "prompt", "x" * 2**20)
    page.click("#draw")
    wait_for_status(page, "the prompt has 1,048,576 characters; at most 2,000 are taken")
    fill(page, "prompt", PROMPT)
    draw(page)


def test_html_in_a_prompt_is_text(page, studio):
    fill(page, "prompt", HOSTILE)
    fill(page, "negative", HOSTILE)
    draw(page)
    page.get_by_role("tab", name="Gallery").click()
    page.wait_for_selector("#gallery .thumbnail-item, #gallery button img")
    page.locator("#gallery button img").first.click()
    page.wait_for_selector("#chosen td")
    assert HOSTILE in page.locator("#chosen td").all_inner_texts()
    assert HOSTILE[:40] in page.inner_text("#gallery")
    page.click("#reuse")
    wait_for_status(page, "settings restored")
    assert value(page, "prompt") == HOSTILE


def test_reports_are_browsed_but_run_nothing(page):
    page.get_by_role("tab", name="Reports").click()
    frame = page.frame_locator("iframe.report")
    frame.locator("h1").wait_for()
    assert frame.locator("h1").inner_text() == "the report"
    assert value(page, "report-name") == "profile/index.html"


def test_nothing_has_left_the_machine(studio):
    allowed = ("127.0.0.1", "localhost", "('127.0.0.1'", "('::1'", "/")
    assert [one for one in reached if not one.startswith(allowed)] == []


# --- over HTTP -----------------------------------------------------------------------------------


def answers(model, prompt, seed, cfg):
    """The form's values in its order."""
    return [prompt, "", model, "none", str(seed), 1.0, "full", cfg, 0.5, 0.97]


async def ask(client, data):
    """(the last status, the image's URL or None) of one call of the endpoint `draw`."""
    called = await client.post("/gradio_api/call/draw", json={"data": data})
    called.raise_for_status()
    event, last = called.json()["event_id"], None
    async with client.stream("GET", f"/gradio_api/call/draw/{event}") as stream:
        kind = ""
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: ") and kind in ("generating", "complete", "error"):
                last = json.loads(line.removeprefix("data: ")) or last
                if kind != "generating":
                    break
    assert kind == "complete", (kind, last)
    return last


def test_200_requests_at_once_get_their_own_images(tmp_path):
    model = make_smallest(tmp_path / "model")
    words = ["a", "red", "cat", "a red", "red cat", "a cat", "cat red", "a red cat"]
    asked = [(words[seed % 8], seed, 1.0 + seed % 3) for seed in range(200)]
    refused, got = [], {}

    async def visit(client, name, index):
        while True:
            image, said = (await ask(client, answers(name, *asked[index])))[:2]
            if "queue is full" not in said:
                break
            refused.append(said)
            await asyncio.sleep(0.3 + index % 10 / 10)
        assert "done" in said, said
        got[index] = (await client.get(image["url"])).content

    async def all_visit(url, name):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(visit(client, name, index) for index in range(200)))

    with running([str(model)], out=tmp_path / "gallery", max_waiting=150) as (url, studio):
        before = resident_bytes()
        # Playwright keeps a loop in this thread
        everybody = all_visit(url, studio.offers[0].name)
        with ThreadPoolExecutor(1) as other_thread:
            other_thread.submit(asyncio.run, everybody).result()
        assert resident_bytes() - before < 300 * 2**20
        assert studio.engine.num_waiting == studio.engine.num_running == 0
    assert refused and len(got) == 200
    pipeline = InfinityPipeline.from_pretrained(model, dtype=torch.float32)
    hashes = set()
    for index, body in got.items():
        image = Image.open(io.BytesIO(body))
        settings = json.loads(image.text[SETTINGS_KEY])
        prompt, seed, cfg = asked[index]
        assert [settings[key] for key in ("prompt", "seed", "cfg")] == [prompt, seed, cfg]
        hashes.add(pixels(image))
        if index % 8 == 0:
            alone = pipeline.generate([prompt], seed=seed, sampling=Sampling(cfg=cfg))
            assert pixels(image) == pixels(alone.pil[0])
    assert len(hashes) == 200


def test_without_the_password_nothing_is_drawn_or_shown(tmp_path):
    model = make_smallest(tmp_path / "model")
    options = {"out": tmp_path / "gallery", "max_waiting": 2, "password": "söhr geheim"}
    with running([str(model)], **options) as (url, studio), httpx.Client(base_url=url) as client:
        call = {"data": answers(studio.offers[0].name, "a cat", 0, 3.0)}
        kept = studio.gallery.add(Image.new("RGB", (4, 4)), {"seed": 1})
        for path in ("/config", f"/gradio_api/file={kept}", "/gradio_api/info"):
            assert client.get(path).status_code == 401, path
        assert client.post("/gradio_api/call/draw", json=call).status_code == 401
        wrong = client.post("/login", data={"username": "me", "password": "geheim"})
        assert wrong.status_code == 400
        assert client.post("/gradio_api/call/draw", json=call).status_code == 401
        right = client.post("/login", data={"username": "me", "password": "söhr geheim"})
        assert right.status_code == 200
        assert client.post("/gradio_api/call/draw", json=call).status_code == 200
        assert client.get(f"/gradio_api/file={kept}").status_code == 200
        assert client.get(f"/gradio_api/file={model / 'model_index.json'}").status_code == 403
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 403


def test_what_is_too_large_is_not_read(tmp_path):
    model = make_smallest(tmp_path / "model")
    large = b"x" * (server.MAX_BODY_BYTES + 1)
    with running([str(model)], out=tmp_path / "gallery", max_waiting=2) as (url, _):
        declared = httpx.post(f"{url}/gradio_api/call/draw", content=large)
        assert declared.status_code == 413 and "larger than 24 MiB" in declared.text
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{url}/gradio_api/call/draw", content=iter([large])).raise_for_status()
        policy = httpx.get(url).headers["content-security-policy"]
        assert "default-src 'self'" in policy


# --- the command ---------------------------------------------------------------------------------


def test_the_command_alone_draws_with_infinity_tiny_and_ends_when_told(tmp_path):
    words = [sys.executable, "-m", "var_compressor.cli", "studio", "--port", "0", "--no-browser"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "VARC_STUDIO_PASSWORD": "hushhush"}
    process = subprocess.Popen(
        [*words, "--out", "gallery"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = process.stdout.readline()
        url = line.split()[1]
        assert url.startswith("http://127.0.0.1:") and list(tmp_path.glob("varc-studio-*"))
        with httpx.Client(base_url=url, timeout=60) as client:
            client.post("/login", data={"username": "me", "password": "hushhush"})
            data = answers("infinity-tiny · full precision", PROMPT, 1, 3.0)
            event = client.post("/gradio_api/call/draw", json={"data": data}).json()["event_id"]
            client.get(f"/gradio_api/call/draw/{event}")
        (file,) = (tmp_path / "gallery").iterdir()
        assert read_settings(file)["prompt"] == PROMPT
    finally:
        process.terminate()
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "hushhush" not in line + rest
    assert "Traceback" not in rest and not list(tmp_path.glob("varc-studio-*"))


def test_a_taken_port_is_named(varc_fails, tmp_path):
    with server.bound(server.Address("127.0.0.1", 0, None)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        said = varc_fails("--port", port, "--out", tmp_path / "gallery")
    assert f"127.0.0.1:{port}: Address already in use; give another --port" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere-at-all",), "nowhere-at-all: no such directory"),
        (("--reports", "nowhere"), "nowhere: no such directory"),
        (("--password", ""), "the password is empty"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
        (("--text-encoder-bits", "3"), "3"),
        (("--host", "256.1.1.1", "--password", "x"), "256.1.1.1:7860"),
    ],
)
def test_a_wrong_option_is_one_line(varc_fails, tmp_path, words, said):
    assert said in varc_fails(*words, "--out", tmp_path / "gallery")


def test_without_gradio_the_command_says_what_to_install(varc_fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'var-compressor[studio]'" in varc_fails("--out", tmp_path / "gallery")


@pytest.fixture
def varc_fails(monkeypatch, capsys):
    """Runs `varc studio`, which must fail as errors of a user do; returns the line."""
    from var_compressor.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["varc", "studio", "--no-browser", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("varc:")]
        assert ended.value.code == 2 and len(lines) == 1
        return lines[0]

    return run
