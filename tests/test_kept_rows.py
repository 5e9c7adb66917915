"""Rows are kept through a kill, and never taken for what they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from var_compressor.evaluation import kept_rows
from var_compressor.evaluation.kept_rows import KeptRows, row_key

CPU = torch.device("cpu")
JUDGE = {"metric": "psnr"}


def row(number: int) -> dict[str, torch.Tensor]:
    return {
        "one": torch.tensor(1 / (number + 3), dtype=torch.float64),
        "many": torch.full((5,), number + 0.1),
    }


def unexpected():
    raise AssertionError("measured again")


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def fill(root: Path, numbers, judge=JUDGE) -> None:
    with KeptRows(root, judge, CPU) as kept:
        for number in numbers:
            kept.get(row_key(b"%d" % number), lambda number=number: row(number))


def measured_of(root: Path, numbers, judge=JUDGE) -> list[int]:
    """Which rows had to be measured; all are right."""
    measured = []

    def measure(number):
        measured.append(number)
        return row(number)

    with KeptRows(root, judge, CPU) as kept:
        for number in numbers:
            found = kept.get(row_key(b"%d" % number), lambda number=number: measure(number))
            assert found.keys() == row(number).keys()
            for name, wanted in row(number).items():
                assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted)
    return measured


def test_rows_are_the_same_to_the_bit_and_measured_once(tmp_path):
    fill(tmp_path, range(3))
    fill(tmp_path, range(2, 7))
    assert measured_of(tmp_path, range(8)) == [7]
    assert measured_of(tmp_path, range(8)) == []
    assert len(files(tmp_path)) == 3
    (judge,) = tmp_path.glob("*/judge.json")
    assert json.loads(judge.read_text())["metric"] == "psnr"


def test_memory_holds_what_waits_to_be_written_only(tmp_path):
    fill(tmp_path, range(4))
    with KeptRows(tmp_path, JUDGE, CPU) as kept:
        for number in range(6):
            kept.get(row_key(b"%d" % number), lambda number=number: row(number))
        assert set(kept.unsaved) == {row_key(b"4"), row_key(b"5")}


def test_a_folder_that_is_deleted_while_it_is_used_costs_time_only(tmp_path):
    fill(tmp_path, range(3))
    with KeptRows(tmp_path, JUDGE, CPU) as kept:
        shutil.rmtree(tmp_path)
        for number in range(3):
            found = kept.get(row_key(b"%d" % number), lambda number=number: row(number))
            assert torch.equal(found["many"], row(number)["many"])
    assert measured_of(tmp_path, range(3)) == []


def test_what_was_measured_before_an_error_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), KeptRows(tmp_path, JUDGE, CPU) as kept:
        kept.get(row_key(b"0"), lambda: row(0))
        raise KeyboardInterrupt
    assert measured_of(tmp_path, [0, 1]) == [1]


def test_rows_are_saved_while_others_are_measured(tmp_path, monkeypatch):
    """As a kill leaves no time to save them."""
    now = [0.0]
    monkeypatch.setattr(kept_rows, "monotonic", lambda: now[0])
    with KeptRows(tmp_path, JUDGE, CPU) as kept:
        for number, seconds in enumerate([4, 4, 4, 4, 4]):
            now[0] += seconds
            kept.get(row_key(b"%d" % number), lambda number=number: row(number))
        assert len(files(tmp_path)) == 1
        assert measured_of(tmp_path, range(5)) == [3, 4]
        # the rest of a day: what a kill costs grows with what it took, and files do not with it
        now[0] += 86_400
        kept.get(row_key(b"5"), lambda: row(5))
        num_files = len(files(tmp_path))
        for number in range(6, 36):
            now[0] += 100
            kept.get(row_key(b"%d" % number), lambda number=number: row(number))
        assert len(files(tmp_path)) == num_files


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_removed_and_its_rows_are_measured_again(tmp_path, damage):
    fill(tmp_path, range(4))
    fill(tmp_path, range(4, 6))
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    lost = {"cut": content[:-9], "flipped": content, "empty": b"", "foreign": b"[1, 2]"}[damage]
    path.write_bytes(bytes(lost))
    assert measured_of(tmp_path, range(6)) in ([0, 1, 2, 3], [4, 5])
    assert measured_of(tmp_path, range(6)) == []
    assert len(files(tmp_path)) == 2


def test_a_file_that_names_itself_rightly_and_is_nothing_of_ours_is_removed(tmp_path):
    import hashlib

    from safetensors.torch import save

    fill(tmp_path, [0])
    foreign = [
        b"",
        save({"keys": torch.zeros(2, 32).byte(), "one": torch.zeros(3)}),
        save({"one": torch.zeros(3)}),
        save({"keys": torch.zeros(2, 32).byte(), "one": torch.tensor(1.0)}),
        save({"keys": torch.zeros(2).byte(), "one": torch.zeros(2)}),
        save({"keys": torch.zeros(3, 32, dtype=torch.int64) - 1, "one": torch.zeros(3)}),
    ]
    for content in foreign:
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        (files(tmp_path)[0].parent / name).write_bytes(content)
    assert measured_of(tmp_path, [0]) == []
    assert len(files(tmp_path)) == 1


def test_nothing_is_taken_from_another_judge_device_or_code(tmp_path, monkeypatch):
    fill(tmp_path, range(3))
    assert measured_of(tmp_path, range(3), {"metric": "ssim"}) == [0, 1, 2]
    monkeypatch.setattr(kept_rows, "device_kind", lambda device: "another GPU")
    assert measured_of(tmp_path, range(3)) == [0, 1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(kept_rows, "code_versions", lambda: {"torch": "9"})
    assert measured_of(tmp_path, range(3)) == [0, 1, 2]
    monkeypatch.undo()
    assert measured_of(tmp_path, range(3)) == []


def test_keys_tell_where_one_part_ends():
    assert row_key(b"ab", b"c") != row_key(b"a", b"bc") != row_key(b"abc")
    assert row_key(b"a", b"b") != row_key(b"b", b"a")
    assert row_key(b"a", b"") != row_key(b"a")


def test_a_change_of_any_file_of_the_package_is_another_version(tmp_path, monkeypatch):
    found = []
    for content in ("x = 1", "x = 2"):
        (tmp_path / "__init__.py").write_text("")
        (tmp_path / "inner").mkdir(exist_ok=True)
        (tmp_path / "inner/module.py").write_text(content)
        monkeypatch.setattr(kept_rows.var_compressor, "__file__", str(tmp_path / "__init__.py"))
        kept_rows.code_versions.cache_clear()
        found.append(kept_rows.code_versions())
    monkeypatch.undo()
    kept_rows.code_versions.cache_clear()
    assert found[0]["var_compressor"] != found[1]["var_compressor"]
    assert found[0]["torch"] == torch.__version__
