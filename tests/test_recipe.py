"""Recipes: merging, provenance, strictness, and the ones that come with the package."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from var_compressor.prompts import built_in_sets, load_prompts, select_prompts
from var_compressor.recipe import RecipeError, load_recipe, recipes_dir, split_arguments
from var_compressor.spec import MODULES, PRESETS, QuantSpec, WeightSpec

# those of `varc reproduce` name recipes, they are none
SHIPPED = sorted(
    path.relative_to(recipes_dir().parent)
    for path in recipes_dir().rglob("*.yaml")
    if path.parent.name != "reproduce"
)
MODELS = [path for path in SHIPPED if path.parent.name == "model"]
INT4 = "recipes/svdquant/int4.yaml"
GPTQ = "recipes/svdquant/gptq.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_recipe_loads_from_any_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe([path], [])
    assert load_prompts(recipe.collect.prompts)


def test_shipped_recipes_agree_with_the_built_in_defaults() -> None:
    assert load_recipe(["recipes/svdquant/__default__.yaml"], []).quant == QuantSpec()
    assert load_recipe([INT4], []).quant == PRESETS["svdquant"]
    assert load_recipe(["recipes/svdquant/int8.yaml"], []).quant == PRESETS["w8a8"]
    assert load_recipe(["recipes/svdquant/nvfp4.yaml"], []).quant == PRESETS["nvfp4"]
    assert load_recipe([GPTQ], []).quant == PRESETS["gptq"]


@pytest.mark.parametrize("model", ["infinity-2b", "infinity-tiny"])
@pytest.mark.parametrize(
    ("ablation", "preset"), [("naive", "naive"), ("smoothquant", "smoothquant"), ("w16", "w4a16")]
)
def test_an_ablation_survives_the_recipes_that_follow_it(
    model: str, ablation: str, preset: str
) -> None:
    quant = load_recipe([f"recipes/model/{model}-{ablation}.yaml", INT4], []).quant
    for name in MODULES:
        assert quant.for_module(name) == PRESETS[preset].for_module(name)


def test_every_model_goes_with_every_format() -> None:
    formats = [path for path in SHIPPED if path.parent.name == "svdquant"]
    for model, number_format in itertools.product(MODELS, formats):
        assert load_recipe([model, number_format], []).model.name in model.stem


def test_later_files_override_earlier_ones_then_the_command_line(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "quant: {low_rank: {rank: 64, patience: 9}}")
    recipe = load_recipe([INT4, mine, GPTQ], ["quant.low_rank.rank=16", "collect.cfg=[1,2.5]"])
    assert recipe.quant.low_rank.rank == 16
    assert recipe.quant.low_rank.patience == 9
    assert recipe.quant.weight == WeightSpec(rounding="gptq")
    assert recipe.collect.cfg == (1.0, 2.5)
    assert recipe.provenance["quant.low_rank.rank"] == "command line"
    assert recipe.provenance["quant.low_rank.patience"] == str(mine)
    assert recipe.provenance["quant.weight.rounding"] == GPTQ
    assert recipe.provenance["quant.weight.format"] == INT4
    assert recipe.provenance["quant.smooth.num_grids"] == "recipes/svdquant/__default__.yaml"
    assert "model.name" not in recipe.provenance


def test_printed_recipe_shows_origins_and_loads_again(tmp_path: Path) -> None:
    model = "recipes/model/infinity-tiny-w16.yaml"
    recipe = load_recipe([model, INT4], ["model.path='a: b # c'", "collect.tau=[0.5, 1]"])
    text = recipe.to_yaml()
    assert f'format: "sint4"  # {INT4}' in text
    assert 'path: "a: b # c"  # command line' in text
    assert "vae_path: null  # default" in text
    again = load_recipe([write(tmp_path / "again.yaml", text)], [])
    assert again == recipe


def test_a_file_in_the_current_directory_wins_over_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe([INT4], []).quant.low_rank.rank == 32
    (tmp_path / "recipes" / "svdquant").mkdir(parents=True)
    write(tmp_path / INT4, "quant: {low_rank: {rank: 5}}")
    recipe = load_recipe([INT4], [])
    assert recipe.quant.low_rank.rank == 5
    # the packaged defaults belong to the packaged folder
    assert set(recipe.provenance) == {"quant.low_rank.rank"}


def test_defaults_beside_a_file_come_before_every_file(tmp_path: Path) -> None:
    write(tmp_path / "__default__.yaml", "quant: {low_rank: {rank: 7, patience: 7}}")
    last = write(tmp_path / "last.yaml", "quant: {low_rank: {max_iters: 7}}")
    first = write(tmp_path.parent / "first.yaml", "quant: {low_rank: {rank: 1}}")
    low_rank = load_recipe([first, last], []).quant.low_rank
    assert (low_rank.rank, low_rank.patience, low_rank.max_iters) == (1, 7, 7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quant: {wieght: {format: sint4}}", "quant.wieght: unknown key; did you mean 'weight'?"),
        ("qaunt: {}", "qaunt: unknown key; did you mean 'quant'?"),
        ("provenance: {}", "provenance: unknown key"),
        ("quant: {low_rank: {rank: many}}", "quant.low_rank.rank: expected an integer, got 'many'"),
        ("quant: {low_rank: 3}", "quant.low_rank: expected a group of settings, got 3"),
        ("quant:", "quant: expected a group of settings, got null"),
        ("model: {dtype: float8}", "model.dtype: expected auto or bfloat16 or float32"),
        ("collect: {cfg: high}", "collect.cfg: expected a number or a list, got 'high'"),
        ("collect: {top_p: .nan}", "collect.top_p: expected a number"),
        ("collect: {tau: 0}", "collect.tau: expected above 0, got 0.0"),
        ("collect: {tau: []}", "collect.tau: expected above 0"),
        ("quant: {low_rank: {rank: -2}}", "quant.low_rank.rank: expected 0 to 1024, got -2"),
        ("quant: {modules: [{pattern: nope}]}", "quant.modules[0].pattern: 'nope' matches no"),
        ("quant: {act: {}, act: {}}", "duplicate key"),
        ("model: {path: '${oc.env:HOME}'}", "model.path: write the value out"),
        ("model: {path: '${collect.prompts}'}", "model.path: write the value out"),
        ("model: {path: '${'}", "${"),
        ("model: {path: '???'}", "model.path: write the value out"),
        ("model: {path: !!python/object/apply:os.getcwd []}", "not a readable YAML file"),
        ("a: [1", "not a readable YAML file"),
        ("\tx: 1", "not a readable YAML file"),
        ("- 1\n- 2", "expected model, collect and quant settings"),
        ("just words", "just words: unknown key"),
        ("42", "not a"),
        ("", "holds no settings"),
        ("# nothing\n", "holds no settings"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(text: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe([INT4, path], [])
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert says in line
    assert "\n" not in line


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match=r"weights\.yaml: not a readable YAML file"):
        load_recipe([path], [])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("recipes/svdquant/itn4.yaml", "did you mean 'recipes/svdquant/int4.yaml'?"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
        (".", "is a directory"),
        ("recipes", "no such recipe"),
    ],
)
def test_a_missing_recipe_says_so(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe([path], [])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("quant.low_rank.rnak=3", "quant.low_rank.rnak: unknown key; did you mean 'rank'?"),
        ("quant.low_rank.rank=abc", "quant.low_rank.rank: expected an integer"),
        ("quant.low_rank.rank=", "quant.low_rank.rank: expected an integer"),
        ("quant.low_rank", "expected key=value"),
        ("=3", "expected key=value"),
        ("quant..rank=3", "expected key=value"),
        ("quant=[", "not a YAML value"),
        ("model.path=${oc.env:HOME}", "write the value out"),
        ("quant.weight.group_size=100", "a multiple of 16"),
    ],
)
def test_a_bad_override_is_one_line(override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe([INT4], [override])
    assert str(caught.value).startswith("command line: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_told_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rank=8.yaml", "quant: {low_rank: {rank: 8}}")
    paths, overrides = split_arguments(["a.yaml", "model.path=x=y", "rank=8.yaml"])
    assert (paths, overrides) == (["a.yaml", "rank=8.yaml"], ["model.path=x=y"])
    assert load_recipe([], ["model.path=x=y"]).model.path == "x=y"


def test_recipes_with_the_same_values_are_equal_wherever_those_came_from() -> None:
    recipe = load_recipe([INT4], [])
    assert recipe == load_recipe([INT4], ["quant.low_rank.rank=32"])
    assert recipe != load_recipe([INT4], ["quant.low_rank.rank=33"])
    assert replace(recipe, provenance={}) == recipe


# ---- prompts


def test_built_in_prompts_are_distinct_texts() -> None:
    assert {"varied", "tiny"} <= set(built_in_sets())
    for name in built_in_sets():
        texts = list(load_prompts(name).values())
        assert len(texts) == len(set(texts)) == 128


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.yaml", "a: one\nb: two: three", None),
        ("p.yaml", "a: one\nb: two", {"a": "one", "b": "two"}),
        ("p.yaml", "- one\n- two", {"0000": "one", "0001": "two"}),
        ("p.json", '{"a": "one"}', {"a": "one"}),
        ("p.json", '["one"]', {"0000": "one"}),
        ("p.json", "[1]", None),
        ("p.json", "{", None),
        ("p.txt", "one\n\n two \n", {"0000": "one", "0001": "two"}),
        ("p.txt", "", None),
        ("p.csv", 'id,prompt\nx,"one, two"\n', {"x": "one, two"}),
        ("p.csv", "prompt\none\n", {"0000": "one"}),
        ("p.csv", "text\none\n", None),
        ("p.csv", "id,prompt\nx\n", None),
        ("p.png", "x", None),
    ],
)
def test_prompt_files(name: str, text: str, expected: dict | None, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    if expected is not None:
        assert load_prompts(str(path)) == expected
        return
    with pytest.raises(ValueError, match=name) as caught:
        load_prompts(str(path))
    assert "\n" not in str(caught.value)


def test_prompts_are_drawn_by_seed() -> None:
    prompts = load_prompts("varied")
    drawn = select_prompts(prompts, num_prompts=8, seed=3)
    assert drawn == select_prompts(dict(reversed(prompts.items())), num_prompts=8, seed=3)
    assert drawn != select_prompts(prompts, num_prompts=8, seed=4)
    assert list(drawn) == sorted(drawn)
    with pytest.raises(ValueError, match="only 128"):
        select_prompts(prompts, num_prompts=129, seed=0)
