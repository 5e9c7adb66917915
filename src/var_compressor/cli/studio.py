"""`varc studio`: the web page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from var_compressor.cli.app import Compute, ComputeOption, LowMemoryOption, app

TERMINATED = 143


@app.command()
def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Artifacts, or what `generate --model` takes; infinity-tiny if none."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 7860,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="VARC_STUDIO_PASSWORD",
            help="Asked of every visitor. Better by the environment: others see a command line.",
        ),
    ] = None,
    reports: Annotated[
        list[Path] | None, typer.Option(help="Folder of reports to browse; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder that images are kept in.")] = Path(
        "out/studio"
    ),
    queue: Annotated[int, typer.Option(min=1, help="Drawings that may wait.")] = 16,
    text_encoder_bits: Annotated[
        int, typer.Option(help="Of its weights: 16, 8 or 4; fewer take less memory.")
    ] = 16,
    compute: ComputeOption = Compute.auto,
    low_memory: LowMemoryOption = False,
    device: Annotated[
        list[str] | None,
        typer.Option(help="auto, cpu, cuda or cuda:1; repeated, each draws its own images."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    browser: Annotated[bool, typer.Option(help="Open the page, where there is a screen.")] = True,
) -> None:
    """Open a web page that draws images level by level and compares models at one seed.

    Example: varc studio out/demo/artifact --reports out/demo
    """
    import signal
    import sys

    from var_compressor.compress import choose_device, choose_dtype
    from var_compressor.layers.weight_only import weight_only
    from var_compressor.studio.server import LOOPBACK, Address, new_studio, open_browser, serve
    from var_compressor.studio.shelf import Opening

    if password == "":
        raise ValueError("the password is empty; give one, or leave --password away")
    devices = [choose_device(name) for name in dict.fromkeys(device or ["auto"])]
    weight_only(text_encoder_bits)
    opening = Opening(choose_dtype(dtype, devices[0]), compute.value, text_encoder_bits, low_memory)
    if host not in LOOPBACK and password is None:
        typer.echo(f"varc: listening on {host} without a password; see --password", err=True)

    def on_start(url: str, stop: Callable[[], None]) -> None:
        typer.echo(f"studio: {url}   (Ctrl-C ends it)")
        if browser:
            open_browser(url)

    # by default a process that is told to end would leave its files and its worker as they are
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    with new_studio(
        models or [], devices, opening, out=out, reports=reports or [], max_waiting=queue
    ) as behind:
        serve(behind, Address(host, port, password), on_start=on_start)
