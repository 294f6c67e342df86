"""Photos of one lesion: what each shows, and what they share."""

import numpy as np
import pytest

from mmfusion.recipes.derm7pt_format import CRITERIA, VALUES
from mmfusion.recipes.derm7pt_lesions import CAUSES, draw_photos

ABSENT = dict.fromkeys(CRITERIA, "absent")
SIZE = (48, 72)


def draw(
    seed: int = 0, criteria: dict[str, str] = ABSENT, **causes: float
) -> dict[str, np.ndarray]:
    values = np.array([causes.get(name, 0.0) for name in CAUSES])
    photos = draw_photos(values, criteria, SIZE, np.random.default_rng(seed))
    return {name: np.asarray(photo, dtype=float) for name, photo in photos.items()}


def lesion(photo: np.ndarray) -> np.ndarray:
    """Pixels much darker than skin: for dark lesions, in any light."""
    grey = photo.mean(axis=2)
    return grey < 0.75 * np.quantile(grey, 0.9)


def test_photos_have_the_size_and_follow_the_generator() -> None:
    first, again, other = draw(seed=1), draw(seed=1), draw(seed=2)
    for name in ("clinic", "derm"):
        assert first[name].shape == (*SIZE, 3)
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


@pytest.mark.parametrize(
    ("column", "value"), [(c, v) for c in CRITERIA for v in VALUES[c] if v != "absent"]
)
def test_a_criterion_shows_in_dermoscopy_alone(column: str, value: str) -> None:
    bare, shown = draw(), draw(criteria={**ABSENT, column: value})
    assert np.array_equal(bare["clinic"], shown["clinic"])
    assert np.abs(bare["derm"] - shown["derm"]).max() > 20


@pytest.mark.parametrize("name", ["clinic", "derm"])
def test_causes_show_in_both_photos(name: str) -> None:
    for seed in range(3):
        dark, pale = draw(seed, darkness=2.0)[name], draw(seed, darkness=-2.0)[name]
        assert dark[22:26, 34:38].mean() < pale[22:26, 34:38].mean() - 20
        large, small = (draw(seed, darkness=2.0, size=size)[name] for size in (2.0, -2.0))
        assert lesion(large).sum() > 1.5 * lesion(small).sum()


def test_dermoscopy_is_closer_and_sharper() -> None:
    photos = draw(seed=3, darkness=2.0)
    assert lesion(photos["derm"]).sum() > 1.5 * lesion(photos["clinic"]).sum()
    steps = {name: np.abs(np.diff(photo, axis=1)).mean() for name, photo in photos.items()}
    assert steps["derm"] > 1.5 * steps["clinic"]
