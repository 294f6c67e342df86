"""Drawn eyes: what each disease shows, and what the two eyes share."""

import numpy as np
import pytest

from mmfusion.recipes.odir_eyes import SIGNS, draw_eyes

SIZE = 96
Y, X = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]


def draw(seed: int = 0, age: float = 50, **left: float) -> dict[str, np.ndarray]:
    """Both eyes as floats, the left one turned over: the disc on the right, as in the right eye."""
    signs = np.zeros((2, len(SIGNS)))
    signs[0] = [left.get(sign, 0.0) for sign in SIGNS]
    eyes = draw_eyes(signs, age, SIZE, np.random.default_rng(seed))
    photos = {eye: np.asarray(photo, dtype=float) for eye, photo in eyes.items()}
    return photos | {"left": photos["left"][:, ::-1]}


def near(place: tuple[float, float], radius: float) -> np.ndarray:
    return np.hypot(X - place[0], Y - place[1]) < radius


def sharpness(photo: np.ndarray) -> float:
    return float(np.abs(np.diff(photo[30:66, 55:85], axis=0)).max())  # the rim of the disc


def test_photos_follow_the_generator_and_are_black_outside() -> None:
    first, again, other = draw(1), draw(1), draw(2)
    for eye, photo in first.items():
        assert photo.shape == (SIZE, SIZE, 3)
        assert (photo == again[eye]).all()
        assert (photo != other[eye]).any()
        assert photo[~near((0, 0), 1.03)].max() == 0
        assert photo[near((0, 0), 0.9)].mean() > 60


def test_eyes_of_one_patient_are_alike_and_no_copies() -> None:
    patients = [draw(seed) for seed in range(6)]
    gaps = [[np.abs(a["left"] - b["right"]).mean() for a in patients] for b in patients]
    within, between = np.diag(gaps), np.array(gaps)[~np.eye(6, dtype=bool)]
    assert 0 < within.min()
    assert within.mean() < 0.7 * between.mean()


def test_the_disc_of_a_left_eye_is_on_the_left() -> None:
    left = draw_eyes(np.zeros((2, 7)), 50, SIZE, np.random.default_rng(0))["left"]
    green = np.asarray(left, dtype=float)[..., 1]
    assert green[near((-0.46, 0), 0.1)].mean() > green[near((0.46, 0), 0.1)].mean() + 30


@pytest.mark.parametrize("sign", SIGNS)
def test_every_disease_shows_in_its_eye_alone(sign: str) -> None:
    ill, well = draw(0, **{sign: 1.0}), draw(0)
    changed = np.abs(ill["left"] - well["left"]).max(axis=2) > 25
    assert changed.sum() > 20
    noise = np.abs(ill["right"] - well["right"])  # the generator went on differently
    assert noise.mean() < 0.5 * np.abs(ill["left"] - well["left"])[changed].mean()


def test_signs_are_where_they_belong() -> None:
    well = draw(0)["left"]
    disc, macula = near((0.46, 0), 0.2), near((-0.12, 0.05), 0.25)
    assert draw(0, G=1.0)["left"][disc].mean() > well[disc].mean() + 5  # a larger cup
    assert draw(0, A=1.0)["left"][macula].mean() > well[macula].mean() + 5  # drusen
    assert draw(0, O=1.0)["left"][macula, 2].mean() > well[macula, 2].mean() + 20  # grey sheen
    assert sharpness(draw(0, C=1.0)["left"]) < 0.5 * sharpness(well)
    dark = [(photo[near((0, 0), 0.8), 0] < 125).sum() for photo in (well, draw(0, D=1.0)["left"])]
    assert dark[1] > dark[0] + 10  # bleedings
    pale = draw(0, M=1.0)["left"][~disc & near((0, 0), 0.8)]
    assert pale.mean() > well[~disc & near((0, 0), 0.8)].mean() + 5


def test_vessels_narrow_with_tension() -> None:
    well, ill = draw(0)["left"], draw(0, H=1.0)["left"]
    rim = near((0.46, 0), 0.45) & ~near((0.46, 0), 0.2)
    assert ill[rim, 0].mean() > well[rim, 0].mean()


def test_the_lens_yellows_with_age() -> None:
    inside = near((0, 0), 0.8)
    blue = [draw(0, age)["right"][inside, 2].mean() for age in (30, 60, 90)]
    assert blue[0] < blue[1] - 5 < blue[2] - 10
