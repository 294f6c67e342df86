"""Draw one pigmented lesion twice, as a clinical and as a dermoscopic photo of the same causes."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float64]

# The causes of a lesion, in standard deviations; the columns of every `causes` array.
CAUSES = ("asymmetry", "variegation", "size", "elevation", "darkness", "redness")
# What each photo adds to the causes before it shows them: a glance sees less than a dermatoscope.
CLINIC_NOISE, DERM_NOISE = 0.6, 0.2

TAN, BROWN = np.array([186.0, 134.0, 100.0]), np.array([72.0, 44.0, 34.0])
RED, INK, BLUE = np.array([196.0, 66.0, 62.0]), np.array([34.0, 24.0, 26.0]), (104.0, 122.0, 168.0)
WHITE = np.array([228.0, 216.0, 212.0])


def draw_photos(
    causes: Floats,
    criteria: Mapping[str, str],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> dict[str, Image.Image]:
    """Draw both photos of a case: one outline, one skin, each with its own view of the causes.

    Args:
        causes: ``(6,)``, in the order of ``CAUSES``.
        criteria: The seven criteria of the case; dermoscopy shows them, the clinical photo does
            not.
        size: Height and width.
        rng: Outline, skin and noise come from it.

    Example:
        >>> from mmfusion.recipes.derm7pt_format import CRITERIA
        >>> bare = dict.fromkeys(CRITERIA, "absent")
        >>> photos = draw_photos(np.zeros(6), bare, (32, 48), np.random.default_rng(0))
        >>> {name: photo.size for name, photo in photos.items()}
        {'clinic': (48, 32), 'derm': (48, 32)}
    """
    phases = rng.uniform(0, 2 * np.pi, size=6)
    skin = np.array([222.0, 178.0, 152.0]) + rng.normal(0, 14) + rng.normal(0, 4, size=3)
    clinic = _Lesion(causes + CLINIC_NOISE * rng.normal(size=6), phases, skin, size, 0.36, rng)
    derm = _Lesion(causes + DERM_NOISE * rng.normal(size=6), phases, skin, size, 0.62, rng)
    derm.add_criteria(criteria)
    blurred = clinic.photo().filter(ImageFilter.GaussianBlur(size[0] / 64))
    return {"clinic": blurred, "derm": _draw_marks(derm.photo(), derm, criteria, rng)}


class _Lesion:
    """A canvas of floats with polar coordinates around the lesion; all is blended onto it."""

    def __init__(
        self,
        causes: Floats,
        phases: Floats,
        skin: Floats,
        size: tuple[int, int],
        scale: float,
        rng: np.random.Generator,
    ) -> None:
        asymmetry, variegation, area, elevation, darkness, redness = _squash(causes)
        y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
        y, x = y - rng.normal(0, 0.06), x * size[1] / size[0] - rng.normal(0, 0.06)
        reach = scale * (0.6 + 0.7 * area)
        self.x, self.y, self.phases, self.reach = x / reach, y / reach, phases, reach
        self.angle = np.arctan2(y, x)
        waves = (np.cos(k * self.angle + phases[k - 1]) / k for k in (1, 2, 3))
        self.radius = np.hypot(self.x, self.y) / (1 + 0.55 * asymmetry * sum(waves))
        self.inside = _step(1 - self.radius, 9.0)
        light = 1 + 0.08 * (np.cos(phases[4]) * x + np.sin(phases[4]) * y)
        self.canvas = skin * light[..., None] + rng.normal(0, 4, size=(*size, 1))
        pigment = (TAN + (BROWN - TAN) * darkness) * (1 - 0.5 * redness) + RED * 0.5 * redness
        self.blend(pigment, self.inside * 0.92)
        patches = np.sin(2.3 * self.x + phases[3]) * np.sin(2.6 * self.y + phases[4])
        self.blend(INK, self.inside * 0.8 * variegation * patches.clip(0))
        self.blend(BLUE, self.inside * 0.8 * variegation * (-patches).clip(0))
        rim = _step(0.25 - abs(self.radius - 0.8), 12.0) * (self.y - self.x)
        self.canvas += (22 * elevation * rim)[..., None]  # a raised edge is lit from above right

    def blend(self, colour: Floats | tuple[float, float, float], weight: Floats) -> None:
        self.canvas += weight[..., None] * (np.asarray(colour) - self.canvas)

    def add_criteria(self, criteria: Mapping[str, str]) -> None:
        """Paint the criteria that have an extent; dots and vessels are strokes, drawn later."""
        warp = 0.5 * np.sin(3 * self.x + self.phases[5])
        mesh = {"typical": 0.0, "atypical": 1.0}
        if criteria["pigment_network"] in mesh:
            bend = mesh[criteria["pigment_network"]]
            lines = np.cos(11 * (self.x + bend * warp)) * np.cos(11 * (self.y - bend * warp))
            self.blend(INK, self.inside * (0.3 + 0.25 * bend) * lines.clip(0))
        if criteria["streaks"] != "absent":
            rays = np.cos(14 * self.angle + self.phases[0]).clip(0)
            if criteria["streaks"] == "irregular":
                rays = rays * (np.cos(self.angle - self.phases[1]) > 0)
            self.blend(INK, 0.8 * rays * np.exp(-(((self.radius - 1) / 0.25) ** 2)))
        if criteria["pigmentation"] != "absent":
            far = 0.5 if "irregular" in criteria["pigmentation"] else 0.0
            self.blend(INK, 0.6 * self._spot(self.phases[2], far, 0.35))
        if criteria["blue_whitish_veil"] == "present":
            self.blend(BLUE, 0.7 * self._spot(self.phases[3], 0.2, 0.55))
        if criteria["regression_structures"] != "absent":
            shown = BLUE if criteria["regression_structures"] == "blue areas" else WHITE
            self.blend(shown, 0.7 * self._spot(self.phases[4], 0.6, 0.3))

    def _spot(self, angle: float, far: float, width: float) -> Floats:
        distance = np.hypot(self.x - far * np.cos(angle), self.y - far * np.sin(angle))
        return np.asarray(self.inside * _step(width - distance, 12.0))

    def photo(self) -> Image.Image:
        return Image.fromarray(self.canvas.clip(0, 255).astype(np.uint8))


def _draw_marks(
    photo: Image.Image, lesion: _Lesion, criteria: Mapping[str, str], rng: np.random.Generator
) -> Image.Image:
    """Dots, globules and vessels, in pixels."""
    pen, unit = ImageDraw.Draw(photo), photo.height / 2 * lesion.reach
    centre = np.array([photo.width, photo.height]) / 2
    kind = criteria["dots_and_globules"]
    turns = np.arange(10) * 0.6283 if kind == "regular" else rng.uniform(0, 6.283, size=14)
    far = np.full(10, 0.55) if kind == "regular" else rng.uniform(0.1, 0.8, size=14)
    if kind != "absent":
        for x, y in centre + unit * np.stack([far * np.cos(turns), far * np.sin(turns)], axis=1):
            half = unit * (0.06 if kind == "regular" else rng.uniform(0.03, 0.1))
            pen.ellipse((x - half, y - half, x + half, y + half), fill=(44, 28, 26))
    if criteria["vascular_structures"] != "absent":
        steps = rng.normal(0, 0.18, size=(6, 5, 2)).cumsum(axis=1) + rng.normal(0, 0.3, (6, 1, 2))
        for path in centre + unit * steps:
            pen.line(
                [(x, y) for x, y in path], fill=(190, 30, 40), width=max(1, photo.height // 64)
            )
    return photo


def _squash(causes: Floats) -> Floats:
    """Standard deviations to 0..1."""
    return np.asarray(0.5 + 0.5 * np.tanh(causes / 2))


def _step(distance: Floats, sharpness: float) -> Floats:
    """One inside, zero outside, soft between."""
    return np.asarray(0.5 + 0.5 * np.tanh(sharpness * distance))
