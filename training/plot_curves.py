"""Draw training/curves.png from the records in training/metrics.

python training/plot_curves.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

HERE = Path(__file__).parent
READER, VAE, SECOND = "#0072B2", "#009E73", "#D55E00"  # Okabe and Ito
NUM_LEVELS = 7


def curve(name: str) -> list[dict[str, float]]:
    """The points of one record; the readers' records count steps, not images."""
    record = json.loads((HERE / "metrics" / f"{name}.json").read_text())
    if "training" not in record:
        return record["curve"]
    batch_size = record["batch_size"]
    return [
        point | {"images": (point["step"] + 1) * batch_size}
        for point in record["training"]["curve"]
    ]


def draw(axes: Axes, points: list[dict[str, float]], value: str, **style: object) -> Line2D:
    (line,) = axes.plot([p["images"] / 1000 for p in points], [p[value] for p in points], **style)
    return line


def draw_readers(axes: Axes) -> None:
    draw(axes, curve("reader"), "loss", color=READER, label="shipped reader (seed 0)")
    draw(axes, curve("reader-perceptual"), "loss", color=SECOND, ls="--", label="second (seed 1)")
    axes.set(title="Readers", ylabel="loss of the training batch", yscale="log")
    axes.legend(frameon=False)


def draw_vae(axes: Axes) -> None:
    points, loss_axes = curve("vae"), axes.twinx()
    lines = [
        draw(axes, points, "psnr_db", color=VAE, label="PSNR (left)"),
        draw(loss_axes, points, "reading", color=SECOND, ls="--", label="reader's loss (right)"),
    ]
    axes.set(title="VAE", ylabel="PSNR of the training batch (dB)")
    loss_axes.set(yscale="log", ylabel="second reader's loss")
    loss_axes.spines["right"].set_visible(True)
    axes.legend(handles=lines, frameon=False, loc="center right")


def draw_transformer(axes: Axes, name: str, title: str) -> None:
    colors, points = plt.get_cmap("viridis"), curve(name)[1:]
    for level in range(NUM_LEVELS):
        color, dashes = colors(0.9 * level / (NUM_LEVELS - 1)), ("-", "--")[level % 2]
        draw(axes, points, f"level{level}", color=color, ls=dashes, label=f"level {level + 1}")
    axes.set(title=title, ylabel="cross-entropy (nats per bit)", ylim=(0, 0.6), xlim=(0, 1680))
    axes.legend(ncols=2, frameon=False, loc="upper right")


def main() -> None:
    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.titleweight": "bold"}
    figure, rows = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    draw_readers(rows[0, 0])
    draw_vae(rows[0, 1])
    draw_transformer(rows[1, 0], "transformer-1", "Transformer, first run: flips up to 25 %")
    draw_transformer(rows[1, 1], "transformer-2", "Transformer, second run: flips up to 15 %")
    for axes in rows.flat:
        axes.set_xlabel("training images (thousands)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    figure.savefig(HERE / "curves.png", dpi=130)


if __name__ == "__main__":
    main()
