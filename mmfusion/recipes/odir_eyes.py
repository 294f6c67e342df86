"""Draw the two fundus photos of a patient: what both eyes share, and the signs of each."""

import itertools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float64]

# The diseases whose signs are drawn; the last axis of every ``signs`` array.
SIGNS = ("D", "G", "C", "A", "H", "M", "O")

RETINA, DARK, BLOOD, VEIN = (176, 78, 38), (84, 34, 22), (92, 18, 14), (104, 28, 20)
DISC, CUP, PALE, HAZE = (232, 176, 112), (252, 226, 178), (214, 150, 104), (178, 158, 124)
FAT, DRUSEN, SHEEN = (246, 218, 120), (226, 178, 96), (206, 190, 176)
Colour = tuple[int, int, int]


def draw_eyes(
    signs: Floats, age: float, size: int, rng: np.random.Generator
) -> dict[str, Image.Image]:
    """Draw a left and a right eye, mirror images but for their signs and the camera.

    Args:
        signs: How strong the signs of each disease are in each eye, 0 none and 1 plain.
        age: In years: the lens yellows.
        size: Side of the photos.
        rng: The anatomy that both eyes share, and all noise, come from it.

    Shape:
        - ``signs``: ``(2, 7)``, left and right, in the order of ``SIGNS``

    Example:
        >>> eyes = draw_eyes(np.zeros((2, 7)), age=50, size=32, rng=np.random.default_rng(0))
        >>> {eye: photo.size for eye, photo in eyes.items()}
        {'left': (32, 32), 'right': (32, 32)}
    """
    anatomy = rng.normal(size=8)
    left, right = (_draw(of, age, anatomy, size, rng) for of in signs)
    return {"left": left.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "right": right}


def _draw(
    signs: Floats, age: float, anatomy: Floats, size: int, rng: np.random.Generator
) -> Image.Image:
    """A right eye: the disc, where nerve and vessels enter, lies on the right."""
    diabetes, glaucoma, cataract, macular, tension, myopia, other = signs.clip(0, 1.2).tolist()
    eye = _Eye(size, anatomy, rng)
    disc = np.array([0.46 + 0.03 * anatomy[2], 0.03 * anatomy[3]])
    macula = np.array([disc[0] - 0.58, 0.05])
    stripes = np.sin(24 * eye.x + 7 * np.sin(3 * eye.y + anatomy[4])) * np.sin(19 * eye.y)
    eye.blend(PALE, myopia * (0.25 + 0.15 * stripes))
    eye.blend(DARK, 0.55 * eye.spot(macula, 0.16))
    eye.blend(CUP, 0.75 * myopia * eye.spot(disc - (0.09, 0), 0.19, 0.8, sharp=True))
    eye.draw_vessels(disc, 1 - 0.5 * tension, 0.03 + 0.05 * tension)
    squeeze = 1 - 0.35 * myopia
    eye.blend(DISC, eye.spot(disc, 0.15, squeeze, sharp=True))
    cup = 0.055 + 0.01 * anatomy[5] + 0.065 * glaucoma
    eye.blend(CUP, 0.9 * eye.spot(disc, cup, squeeze, sharp=True))
    eye.dot(BLOOD, 16 * diabetes + 2 * tension, disc - (0.55, 0), 0.4, 0.018)
    eye.dot(FAT, 12 * diabetes, macula + rng.normal(0, 0.12, size=2), 0.14, 0.02)
    eye.dot(DRUSEN, 22 * macular, macula, 0.12, 0.022)
    eye.blend(SHEEN, 0.6 * other * eye.spot(np.add(macula, (0.05, -0.1)), 0.2))
    return eye.photo(haze=0.06 + 0.004 * max(0, age - 40) + 0.3 * cataract, blur=0.8 * cataract)


class _Eye:
    """A canvas of floats over the square from -1 to 1, of which the camera sees a disc."""

    def __init__(self, size: int, anatomy: Floats, rng: np.random.Generator) -> None:
        self.y, self.x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        self.size, self.anatomy, self.rng = size, anatomy, rng
        light = rng.normal(0, 0.12, size=2)
        fall = 1.08 - 0.32 * ((self.x - light[0]) ** 2 + (self.y - light[1]) ** 2)
        tone = 1 + np.array([0.08, 0.16, 0.2]) * anatomy[0].clip(-2, 2) + 0.05 * anatomy[1]
        self.canvas = (RETINA * tone * (1 + 0.04 * rng.normal()))[:, None, None] * fall

    def blend(self, colour: Colour, weight: Floats) -> None:
        for channel, level in zip(self.canvas, colour, strict=True):
            channel += weight * (level - channel)

    def spot(
        self, place: Floats, radius: float, squeeze: float = 1.0, *, sharp: bool = False
    ) -> Floats:
        """A disc around a place, narrowed sideways, with a sharp or a soft rim."""
        far = np.hypot((self.x - place[0]) / squeeze, self.y - place[1]) / radius
        return np.asarray(0.5 - 0.5 * np.tanh(6 * (far - 1)) if sharp else np.exp(-(far**2)))

    def dot(
        self, colour: Colour, expected: float, place: Floats, spread: float, radius: float
    ) -> None:
        """Scatter small dots around a place."""
        mask = Image.new("L", (2 * self.size, 2 * self.size))
        pen = ImageDraw.Draw(mask)
        number = self.rng.poisson(expected)
        centres = place + self.rng.normal(0, spread, size=(number, 2))
        for centre, half in zip(centres, radius * self.rng.uniform(0.6, 1.5, number), strict=True):
            pen.ellipse([*self._pixels(centre - half), *self._pixels(centre + half)], fill=230)
        self.blend(colour, self._weight(mask))

    def draw_vessels(self, disc: Floats, width: float, winding: float) -> None:
        """Two arcades towards the macula and two away from it, an artery and a vein in each."""
        mask = Image.new("L", (2 * self.size, 2 * self.size))
        pen, along = ImageDraw.Draw(mask), np.linspace(0, 1, 24)
        for arcade, (side, up) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))):
            bend = 0.62 + 0.05 * self.anatomy[4 + arcade]
            for vessel, thick in enumerate((0.032, 0.022 * width)):
                wave = winding * np.sin(9 * along + 2 * vessel + arcade) * along
                x = disc[0] + side * (1.35 if side < 0 else 0.6) * along
                y = disc[1] + up * (bend + 0.08 * vessel) * np.sin(1.9 * along**0.7) + wave
                self._stroke(pen, x, y, thick)
                for start in (7, 12, 17):  # branches leave towards the rim
                    reach = np.linspace(0, 0.3, 8)
                    self._stroke(
                        pen, x[start] + side * 0.5 * reach, y[start] + up * reach, 0.5 * thick
                    )
        self.blend(VEIN, 0.8 * self._weight(mask))

    def _stroke(self, pen: ImageDraw.ImageDraw, x: Floats, y: Floats, thick: float) -> None:
        points = self._pixels(np.stack([x, y], axis=1)).tolist()
        for step, (start, stop) in enumerate(itertools.pairwise(points)):
            taper = 1 - 0.6 * step / len(points)
            pixels = max(1, round(thick * taper * self.size))
            pen.line([*start, *stop], fill=255, width=pixels)

    def _pixels(self, place: Floats) -> Floats:
        """Places on the square as pixels of a mask, which is twice as fine as the canvas."""
        return (place + 1) * self.size

    def _weight(self, mask: Image.Image) -> Floats:
        return np.asarray(mask.reduce(2), dtype=float) / 255

    def photo(self, haze: float, blur: float) -> Image.Image:
        """What the camera sees through the lens: hazy, blurred, noisy, black beyond its disc."""
        self.blend(HAZE, np.full_like(self.x, haze))
        seen = Image.fromarray(self.canvas.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        seen = seen.filter(ImageFilter.GaussianBlur(blur * self.size / 64))
        noisy = np.asarray(seen) + self.rng.normal(0, 3, size=(self.size, self.size, 1))
        inside = 0.5 - 0.5 * np.tanh(40 * (np.hypot(self.x, self.y) - 0.96))
        return Image.fromarray((noisy * inside[..., None]).clip(0, 255).astype(np.uint8))
