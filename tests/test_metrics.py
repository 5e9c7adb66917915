"""Image metrics: rows that depend on their own image alone, pixels against scikit-image, distances
against closed forms, and one clear line for weights that are missing or wrong.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from metric_weights import filled, images, noise
from var_compressor.evaluation.metrics import METRICS, MetricUnavailable, open_metric, weights
from var_compressor.evaluation.metrics.lpips import AlexNet
from var_compressor.evaluation.scores import frechet_distance
from var_compressor.models.tensor_files import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_on_this_machine(monkeypatch, tmp_path):
    """No caches, no environment, no hub: tests see only what they put somewhere themselves."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(weights.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def opened(name):
    return open_metric(name, weights_dir=None, device=CPU)


def rows_of(metric, image_B3YX, reference_B3YX):
    return metric.rows(image_B3YX, prompts=[], reference_B3YX=reference_B3YX)


# ---------------------------------------------------------------- pixels


@pytest.fixture(scope="module")
def pair():
    reference = images(3, 61, 88)
    step = (80 * (noise(tuple(reference.shape), 9) - 0.5)).round() * torch.tensor(
        [0.05, 0.4, 1.0]
    ).view(3, 1, 1, 1)
    return (reference + step).round().clamp(0, 255).to(torch.uint8), reference


def test_pixels_equal_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    as_gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    psnr, ssim = (rows_of(opened(name), *pair) for name in ("psnr", "ssim"))
    as_arrays = [x.permute(0, 2, 3, 1).numpy() for x in pair]
    for i, (image, reference) in enumerate(zip(*as_arrays, strict=True)):
        wanted = metrics.structural_similarity(
            image, reference, channel_axis=2, data_range=255, **as_gaussian
        )
        assert ssim[i] == pytest.approx(wanted, rel=1e-9)
        wanted = metrics.peak_signal_noise_ratio(image, reference, data_range=255)
        assert psnr[i] == pytest.approx(wanted, rel=1e-9)


def test_ssim_is_its_formula_window_by_window(pair):
    image, reference = (x[1, :, :13, :12].double().numpy() for x in pair)
    offsets = np.arange(11) - 5
    weights_11 = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(weights_11, weights_11) / weights_11.sum() ** 2
    found = []
    for c, y, x in np.ndindex(3, 3, 2):
        a, b = (one[c, y : y + 11, x : x + 11] for one in (image, reference))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        both = (window * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        found.append(
            (2 * mean_a * mean_b + c1)
            * (2 * both + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    cut = [x[1:2, :, :13, :12] for x in pair]
    assert rows_of(opened("ssim"), *cut).item() == pytest.approx(np.mean(found), rel=1e-9)


def test_an_equal_image_counts_as_100_db_and_a_grey_level_as_48(pair):
    psnr = opened("psnr")
    reference = pair[1].clamp(max=254)
    rows = rows_of(psnr, torch.cat([reference, reference + 1]), torch.cat([reference, reference]))
    assert rows[:3].tolist() == [100.0] * 3
    assert rows[3:].tolist() == pytest.approx([20 * math.log10(255)] * 3)
    assert psnr.value(rows) == pytest.approx((100 + 20 * math.log10(255)) / 2)
    assert rows_of(opened("ssim"), reference, reference).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_rows_do_not_depend_on_batch_mates(pair, name):
    metric = opened(name)
    together = rows_of(metric, *pair)
    alone = [rows_of(metric, *(x[i : i + 1] for x in pair)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert together.dtype == torch.float64 and len(together.unique()) == 3


# ---------------------------------------------------------------- what does not fit


def test_images_of_another_kind_are_refused(pair):
    with pytest.raises(ValueError, match=r"images are torch.float32 \(3, 3, 61, 88\)"):
        rows_of(opened("psnr"), pair[0].float(), pair[1])
    with pytest.raises(ValueError, match=r"images are \(3, 3, 61, 88\) and references \(2,"):
        rows_of(opened("psnr"), pair[0], pair[1][:2])
    with pytest.raises(ValueError, match="psnr compares with references"):
        opened("psnr").rows(pair[0], prompts=[])
    with pytest.raises(ValueError, match="ssim of images of 10 x 88"):
        rows_of(opened("ssim"), *(x[:, :, :10] for x in pair))
    with pytest.raises(ValueError, match="psnr got no rows"):
        opened("psnr").value(torch.empty(0))


def test_an_unknown_metric_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'psnrr'; there are psnr, ssim, lpips, fid"):
        opened("psnrr")


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", [name for name, spec in METRICS.items() if spec.files])
def test_missing_weights_are_one_clear_line(name, tmp_path):
    spec = METRICS[name]
    for folder in (None, tmp_path):
        with pytest.raises(MetricUnavailable) as caught:
            open_metric(name, weights_dir=folder, device=CPU)
        line = str(caught.value)
        # torchmetrics brings the heads of LPIPS along
        missing = [file for file in spec.files if not file.name.startswith("lpips_")]
        assert line.startswith(f"{name} lacks ") and "\n" not in line
        for file in missing:
            assert file.name in line and file.source in line
        assert line.endswith(
            f"put it into {tmp_path}"
            if folder
            else "put it into a folder and name it by --metric-weights"
        )
        assert folder is None or f"looked for in {tmp_path}" in line


def alexnet_file(folder: Path) -> Path:
    shapes = {name: tuple(x.shape) for name, x in AlexNet().state_dict().items()}
    extra = {"classifier.6.bias": torch.zeros(1000)}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(filled(shapes) | extra, folder / "alexnet-owt-7be5be79.pth")
    return folder / "alexnet-owt-7be5be79.pth"


@pytest.mark.parametrize("place", ["option", "environment", "torch"])
def test_where_weights_are_looked_for(place, tmp_path, monkeypatch):
    folder = tmp_path / "torch/hub/checkpoints" if place == "torch" else tmp_path / "weights"
    alexnet_file(folder)
    if place == "environment":
        monkeypatch.setenv(weights.WEIGHTS_VARIABLE, str(folder))
    metric = open_metric("lpips", weights_dir=folder if place == "option" else None, device=CPU)
    image = images(1, 64, 64)
    assert rows_of(metric, image, image).item() == 0
    assert 0.01 < rows_of(metric, image, 255 - image).item() < 2


def test_what_the_hub_has_cached_is_found_offline(tmp_path):
    file = METRICS["image_reward"].files[0]
    repo = tmp_path / "hub" / "models--THUDM--ImageReward"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("abc")
    snapshot = repo / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "med_config.json").write_text("{}")
    with pytest.raises(MetricUnavailable):
        weights.find_files("image_reward", (file,), None)
    (snapshot / file.name).write_bytes(b"weights")
    found = weights.find_files("image_reward", (file,), None)
    assert found == {file.name: snapshot / file.name}


def test_a_file_with_another_hash_is_refused(tmp_path):
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"an error page")
    with pytest.raises(MetricUnavailable, match=r"SHA-256 begins with .* download it again"):
        open_metric("fid", weights_dir=tmp_path, device=CPU)


def test_a_wrong_weights_folder_is_named(tmp_path):
    with pytest.raises(MetricUnavailable, match="nowhere: no such folder of metric weights"):
        open_metric("lpips", weights_dir=tmp_path / "nowhere", device=CPU)


class Malicious:
    def __reduce__(self):
        return (sys.exit, (3,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("features.3.bias"), "lacks features.3.bias"),
        (
            lambda state: state.update({"features.3.bias": torch.zeros(7)}),
            r"features.3.bias is \[7\], expected \[192\]",
        ),
        (lambda state: state.update(extra=torch.zeros(1)), "has extra, which"),
        (lambda state: state.update(evil=Malicious()), "not a readable file of weights"),
    ],
)
def test_weights_are_loaded_strictly(change, message, tmp_path):
    path = alexnet_file(tmp_path)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"7be5be79\.pth: .*{message}"):
        open_metric("lpips", weights_dir=tmp_path, device=CPU)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_file_is_refused(keep, tmp_path):
    path = alexnet_file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"7be5be79\.pth: not a readable file of weights"):
        open_metric("lpips", weights_dir=tmp_path, device=CPU)


# ---------------------------------------------------------------- Fréchet distance


def with_moments(mean_F, factor_FF, rows, seed):
    """Rows whose mean and covariance are exactly these: whitened noise, then coloured."""
    x_NF = noise((rows, len(mean_F)), seed) - 0.5
    x_NF = x_NF - x_NF.mean(0)
    q_NF = torch.linalg.qr(x_NF).Q * (rows - 1) ** 0.5
    return q_NF @ factor_FF.T + mean_F


def test_frechet_distance_of_commuting_covariances_is_their_closed_form():
    """Tr sqrt(A B) is the sum of sqrt(a_i b_i) where A and B share their axes; eigenvalues span
    twelve decades, as those of features do.
    """
    basis_FF = torch.linalg.qr(noise((40, 40), 3) - 0.5).Q
    a_F = torch.logspace(-8, 4, 40, dtype=torch.float64)
    b_F = a_F.flip(0) * 0.37
    mean_F = 0.1 * noise((40,), 4)
    sets = [
        with_moments(mean, basis_FF * values.sqrt(), 300, seed)
        for seed, mean, values in ((5, mean_F, a_F), (6, -mean_F, b_F))
    ]
    expected = (2 * mean_F).square().sum() + (a_F + b_F - 2 * (a_F * b_F).sqrt()).sum()
    assert frechet_distance(*sets) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_equals_scipys_root_in_full_rank():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    a, b = (
        (noise((rows, 96), seed) - 0.5) @ (noise((96, 96), seed + 1) - 0.4)
        for rows, seed in ((700, 10), (500, 20))
    )
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = float(means) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [(3, 4), (4, 30), (2, 2)])
def test_frechet_distance_of_fewer_images_than_features_equals_50_digits(rows):
    """The eigenvalues of A B in 50 digits, most of them zero."""
    a, b = (noise((n, 8), seed) for n, seed in zip(rows, (30, 40), strict=True))
    with mpmath.workdps(50):
        moments = []
        for x in (a, b):
            x = mpmath.matrix(x.tolist())
            mean = [mpmath.fsum(x[:, j]) / x.rows for j in range(8)]
            centered = mpmath.matrix(x.rows, 8)
            for i, j in np.ndindex(x.rows, 8):
                centered[i, j] = x[i, j] - mean[j]
            moments.append((mean, centered.T * centered / (x.rows - 1)))
        (mean_a, cov_a), (mean_b, cov_b) = moments
        eigenvalues, _ = mpmath.eig(cov_a * cov_b)
        root = mpmath.fsum(mpmath.sqrt(abs(value.real)) for value in eigenvalues)
        traces = mpmath.fsum(cov_a[i, i] + cov_b[i, i] for i in range(8))
        gap = mpmath.fsum((p - q) ** 2 for p, q in zip(mean_a, mean_b, strict=True))
        expected = float(gap + traces - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
