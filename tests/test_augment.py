"""Augmentation depends on seed, epoch and sample: not on micro-batch or worker."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train, small_recipe
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import results
from torch import Tensor
from torch.nn import functional

from samestep import RecipeError
from samestep.config.data import Augment
from samestep.config.model import CrossEntropy
from samestep.data import dataset
from samestep.data.augment import Augmentation, Draws, Mixed, _beta
from samestep.models.objective import Objective


IMAGES = torch.rand(40, 2, 9, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40)


def augmented(samples: Tensor, epoch: int = 0, seed: int = 0, **how: Any) -> Tensor:
    """The images of these samples."""
    augmentation = Augmentation.of(Augment(**how), seed, IMAGES[:1])
    inputs, _ = augmentation.apply(IMAGES[samples], LABELS[samples], samples, epoch)
    return inputs


@given(
    st.lists(st.integers(0, 39), min_size=1, unique=True),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_what_a_sample_becomes_does_not_depend_on_its_micro_batch(
    samples: list[int], size: int, epoch: int
) -> None:
    how: dict[str, Any] = {"shift": 2, "crop": 1, "flip": 0.5}
    whole = augmented(torch.arange(40), epoch, **how)
    for piece in torch.split(torch.tensor(samples), size):
        assert torch.equal(augmented(piece, epoch, **how), whole[piece])


def test_every_epoch_and_seed_changes_samples_otherwise() -> None:
    everything = torch.arange(40)
    found = [
        augmented(everything, epoch, seed, shift=3)
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_shift_moves_the_image_and_zeros_move_in() -> None:
    seen = set()
    for original, image in zip(
        IMAGES, augmented(torch.arange(40), shift=1), strict=True
    ):
        padded = functional.pad(original, [1] * 4)
        places = [(i, j) for i in range(3) for j in range(3)]
        (place,) = (
            (i, j)
            for i, j in places
            if torch.equal(padded[:, i : i + 9, j : j + 7], image)
        )
        seen.add(place)
    assert len(seen) > 6


def test_a_crop_is_a_window_of_the_mirrored_image() -> None:
    padded = functional.pad(IMAGES, [2] * 4, mode="reflect")
    for index, image in enumerate(augmented(torch.arange(40), crop=2)):
        windows = padded[index].unfold(1, 9, 1).unfold(2, 7, 1)
        assert (windows == image.view(2, 1, 1, 9, 7)).all((0, 3, 4)).any()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_as_many_images_are_flipped_as_asked_for(share: float) -> None:
    images = IMAGES[:1].expand(4000, -1, -1, -1)
    augmentation = Augmentation.of(Augment(flip=share), 0, images[:1])
    inputs, _ = augmentation.apply(
        images, torch.zeros(4000), torch.arange(4000), epoch=0
    )
    flipped = (inputs == IMAGES[0].flip(2)).flatten(1).all(dim=1)
    assert flipped.double().mean().item() == pytest.approx(share, abs=0.03)
    assert torch.equal(inputs[~flipped], images[~flipped])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    """The larger of x and 1 - x has the moments of |2x - 1| = 2 share - 1."""
    draws = Draws(np.uint64(5), np.arange(20_000, dtype=np.uint64))
    shares = torch.tensor(_beta(draws, alpha), dtype=torch.float64)
    assert ((shares >= 0.5) & (shares <= 1)).all()
    variance = (2 * shares - 1).square().mean().item()
    assert variance == pytest.approx(1 / (2 * alpha + 1), abs=0.01)


def test_tiny_alphas_end_and_mix_hardly() -> None:
    augmentation = Augmentation.of(Augment(mixup=1e-7), 0, IMAGES[:1])
    _, targets = augmentation.apply(IMAGES, LABELS, LABELS, 0)
    assert isinstance(targets, Mixed)
    assert (targets.share > 0.99).all()


def test_mixup_mixes_losses_like_inputs_and_counts_the_larger_share() -> None:
    augmentation = Augmentation.of(Augment(mixup=0.8), 0, IMAGES[:1])
    inputs, targets = augmentation.apply(IMAGES, LABELS % 3, LABELS, 0)
    assert isinstance(targets, Mixed)
    share = targets.share.view(-1, 1, 1, 1)
    assert torch.equal(inputs, IMAGES * share + IMAGES.roll(-1, 0) * (1 - share))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(126, 3))
    loss, right = Objective(model, CrossEntropy())(inputs, targets)
    logits = model(inputs)
    soft = functional.one_hot(targets.first, 3) * targets.share.view(-1, 1)
    soft += functional.one_hot(targets.second, 3) * (1 - targets.share.view(-1, 1))
    expected = -(soft * logits.log_softmax(dim=1)).sum()
    torch.testing.assert_close(loss, expected)
    assert right.item() == (logits.argmax(dim=1) == targets.first).sum().item()


AUGMENTED = {
    "moves": {"shift": 2, "crop": 1, "flip": 0.5},
    "mixup": {"mixup": 0.4},
}


@pytest.mark.parametrize("augment", AUGMENTED.values(), ids=AUGMENTED)
def test_augmentation_has_one_result_at_any_placement(
    train: Train, augment: dict[str, Any]
) -> None:
    recipe = small_recipe(epochs=2, data__train_samples=301, data__augment=augment)
    alone = results(train(recipe, 1))
    for workers, exchange in ((2, "gloo"), (3, "shared")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert results(run) == alone
    plain = train(small_recipe(epochs=2, data__train_samples=301))
    assert plain.weights_sha256 != alone["weights_sha256"]


def test_without_a_section_nothing_is_drawn_and_no_digest_changes() -> None:
    recipe = small_recipe()
    assert "augment" not in recipe.to_toml()
    data = dataset.load(recipe.data, None, recipe.seed)
    inputs, _ = data.draw(torch.arange(5), 3)
    assert torch.equal(inputs, data.splits["train"].gather(torch.arange(5))[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.augment": {"flip": 1.5}}, r"`data\.augment\.flip`: .*`1\.5`"),
        ({"data.augment": {"fliip": 0.5}}, "Did you mean `data.augment.flip`"),
        (
            {"data.augment": {"mixup": 0.2}, "loss": {"name": "squared-error"}},
            "mixup is for classes",
        ),
    ],
)
def test_an_impossible_augmentation_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        small_recipe().changed(fields)


def test_text_is_not_augmented(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no field `data\.augment`"):
        small_recipe(data={"source": "text", "path": "python", "augment": {}})
