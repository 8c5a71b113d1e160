from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep import Recipe, RecipeError
from samestep.config.model import MlpModel
from samestep.config.recipe import built_in_recipes, parse_override


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe that is valid."""
    global_batch = draw(st.integers(1, 4096))
    optimizer = draw(
        st.sampled_from(
            [
                {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
                {"name": "adam", "lr": 1e-3, "betas": [0.8, 0.99]},
                {"name": "adamw", "lr": 1, "weight_decay": 0.0, "max_grad_norm": 2.5},
            ]
        )
    )
    return Recipe.from_dict(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)),
            "seed": draw(st.integers(0, 2**63 - 1)),
            "epochs": draw(st.integers(1, 1000)),
            "global_batch": global_batch,
            "micro_batches": draw(st.integers(1, global_batch)),
            "model": {"hidden": draw(st.lists(st.integers(1, 999), max_size=4))},
            "optimizer": optimizer,
        }
    )


@given(recipes())
def test_a_recipe_survives_toml(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    file = tmp_path_factory.getbasetemp() / "recipe.toml"
    file.write_text(recipe.to_toml())
    again = Recipe.load(file)
    assert again == recipe
    assert again.digest == recipe.digest


@pytest.mark.parametrize("name", built_in_recipes())
def test_built_in_recipes_are_valid_and_named_like_their_files(name: str) -> None:
    assert Recipe.load(name).name == name


def test_the_digest_ignores_the_name_and_nothing_else() -> None:
    recipe = Recipe.load("mnist-mlp")
    assert recipe.digest == Recipe.load("mnist-mlp", {"name": "other"}).digest
    assert recipe.digest != Recipe.load("mnist-mlp", {"seed": 1}).digest


def test_overrides_reach_every_section() -> None:
    texts = ["optimizer.lr=0.5", "model.hidden=[8, 9]", "model.family=mlp", "seed=7"]
    recipe = Recipe.load("mnist-mlp", dict(map(parse_override, texts)))
    assert isinstance(recipe.model, MlpModel)
    assert (recipe.optimizer.lr, recipe.model.hidden, recipe.seed) == (0.5, (8, 9), 7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 3}, "there is no field `epoch`. Did you mean `epochs`?"),
        (
            {"optimizer.lrr": 3},
            "no field `optimizer.lrr`. Did you mean `optimizer.lr`?",
        ),
        ({"model.droput": 0.1}, "Did you mean `model.dropout`?"),
        ({"optimizer.learning_rate": 0.1}, "Did you mean `optimizer.lr`?"),
        ({"batch_size": 32}, "Did you mean `global_batch`?"),
        ({"model.a": 1, "model.b": 1}, "field `model.a`. There is no field `model.b`."),
        (
            {"model.family": "mlpp"},
            "`model.family` is one of mlp, cnn, resnet, rnn, vit, transformer; or name "
            "your own, `--model module:function`; received `mlpp`. Did you mean `mlp`?",
        ),
        (
            {"optimizer.name": "sgd", "optimizer.betas": [0.9, 0.9]},
            "`optimizer.betas`.",
        ),
        ({"optimizer.nesterov": True}, "no field `optimizer.nesterov`."),
        ({"epochs": 0}, "`epochs`: input should be greater than or equal to 1"),
        ({"global_batch": -64}, "received `-64`"),
        ({"epochs": "three"}, "`epochs`: input should be a valid integer"),
        ({"epochs": 1.5}, "`epochs`: input should be a valid integer"),
        ({"optimizer.lr": True}, "`optimizer.lr`: input should be a valid number"),
        ({"optimizer.lr": float("nan")}, "`optimizer.lr`: input should be a finite"),
        (
            {"optimizer.name": "adamm"},
            "one of sgd, adam, adamw, muon, adagrad, rmsprop, adafactor, lion, lamb, "
            "schedule-free-adamw; or name your own, `--optimizer module:function`; "
            "received `adamm`",
        ),
        ({"model.hidden": [5, 0]}, "`model.hidden.1`: input should be greater"),
        ({"micro_batches": 600}, "`micro_batches` is 600, `global_batch` only 256"),
        ({"name": "../up"}, "`name`: string should match"),
        ({"epochs.x": 1}, "`epochs` is a value, not a section"),
        ({"seed": 2**63}, "`seed`: input should be less than"),
    ],
)
def test_a_wrong_field_is_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("mnist-mlp", overrides)
    assert message in str(caught.value)


def test_an_unknown_recipe_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="Did you mean `mnist-mlp-classic`"):
        Recipe.load("mnist-mlp-clasic")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("epochs = = 3")
    with pytest.raises(RecipeError, match=r"mine.toml is not valid TOML"):
        Recipe.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine.toml cannot be read: it is not text"):
        Recipe.load(file)
    with pytest.raises(RecipeError, match=r"none.toml cannot be read: No such file"):
        Recipe.load(tmp_path / "none.toml")


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match="An override is `field=value`"):
        parse_override("optimizer.lr")


@pytest.mark.parametrize(
    ("name", "overrides", "section", "expected"),
    [
        (
            "fashion-cnn",
            {"optimizer.name": "sgd"},
            "optimizer",
            {"name": "sgd", "lr": 0.003, "weight_decay": 0.02},
        ),
        (
            "mnist-mlp-classic",
            {"schedule.name": "cosine"},
            "schedule",
            {"name": "cosine"},
        ),
        (
            "fashion-cnn",
            {"model.family": "mlp"},
            "model",
            {"family": "mlp", "hidden": (256,), "dropout": 0.3, "norm": "batch"},
        ),
        ("fashion-cnn", {"loss.name": "squared-error"}, "loss", {}),
        (
            "mnist-mlp",
            {"data.source": "npy", "data.inputs": "x.npy", "data.targets": "y.npy"},
            "data",
            {"source": "npy", "inputs": "x.npy", "targets": "y.npy"},
        ),
    ],
)
def test_another_kind_of_a_section_needs_only_its_name(
    name: str, overrides: dict[str, object], section: str, expected: dict[str, object]
) -> None:
    """What it does not know, or what has another meaning there, is as by default."""
    loaded, changed = Recipe.load(name, overrides), Recipe.load(name).changed(overrides)
    assert loaded == changed
    found = getattr(loaded, section)
    assert found == type(found).model_validate(expected)
