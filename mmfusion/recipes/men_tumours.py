"""Draw one head with a tumour as three sequences of the same causes, and its label map."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

# The causes of a tumour, in standard deviations; the columns of every `causes` array.
CAUSES = ("size", "cellularity", "oedema", "rim")
FIELD_MM = np.array([240.0, 240.0, 155.0])
BRAIN_MM = np.array([70.0, 85.0, 58.0])  # half axes
# Where tumours lie: from the middle of the brain, in half axes.
PLACES = {
    "convexity": (0.68, 0.17, 0.43),
    "skull base": (0.25, 0.43, -0.64),
    "falx": (0.1, 0.3, 0.7),
}


def draw_volumes(
    causes: Floats, place: str, shape: tuple[int, int, int], rng: np.random.Generator
) -> dict[str, tuple[Floats, Floats]]:
    """Draw all volumes of a patient, in the scanner frame, axes to the right, to the front and up.

    CE-T1 shows the rim, FLAIR the oedema, ADC the cellularity, all of them the size.

    Args:
        causes: ``(4,)``, in the order of ``CAUSES``.
        place: One of ``PLACES``.
        shape: Voxels of all but ADC, which has half as many along x and y.
        rng: Position, outline and noise come from it.

    Returns:
        Name -> voxels ``(X, Y, Z)``, zero outside the brain, and affine; ``tumour`` is a label map
        with 1 for the tumour and 2 for the oedema.

    Example:
        >>> drawn = draw_volumes(np.zeros(4), "falx", (24, 24, 16), np.random.default_rng(0))
        >>> [data.shape for data, _ in drawn.values()]
        [(24, 24, 16), (24, 24, 16), (12, 12, 16), (24, 24, 16)]
        >>> list(drawn)
        ['ce_t1', 'ce_t2_flair', 'adc', 'tumour']
    """
    size, cellularity, oedema, rim = causes
    side = np.array([rng.choice((-1, 1)), 1, 1])
    centre = BRAIN_MM * side * (np.array(PLACES[place]) + rng.normal(0, 0.05, size=3))
    axes = 16 * np.exp(0.3 * size + rng.normal(0, 0.12, size=3))  # mm
    phases = rng.uniform(0, 2 * np.pi, size=3)
    halo = 3 + 11 / (1 + np.exp(-1.5 * oedema))  # mm around the tumour
    wall = 0.5 + 0.5 * np.tanh(rim) + 0.1 * rng.normal()
    dense = cellularity + 0.3 * rng.normal()

    def look(counts: tuple[int, int, int]) -> tuple[Floats, Floats, Floats, Floats]:
        """Affine; per voxel noise in the brain, radius in tumours, way outside it in halos."""
        affine = np.diag([*(FIELD_MM / counts), 1.0])
        affine[:3, 3] = (FIELD_MM / counts - FIELD_MM) / 2
        mm = [
            (index * affine[axis, axis] + affine[axis, 3]).astype(np.float32)
            for axis, index in enumerate(np.ogrid[tuple(slice(n) for n in counts)])
        ]
        brain = sum((x / r) ** 2 for x, r in zip(mm, BRAIN_MM.tolist(), strict=True)) < 1
        off = [(x - c) / r for x, c, r in zip(mm, centre.tolist(), axes.tolist(), strict=True)]
        waves = sum(np.sin(2.5 * x + p) for x, p in zip(off, phases.tolist(), strict=True))
        radius = np.sqrt(sum(x**2 for x in off)) * (1 + 0.08 * waves)
        noise = 1 + 0.06 * rng.standard_normal(counts, dtype=np.float32)
        return affine, brain * noise, radius, (radius - 1) * float(axes.mean() / halo)

    affine, brain, radius, away = look(shape)
    shell = np.exp(-(((radius - 0.85) / 0.18) ** 2))
    tumour = 600 + 90 * dense + 420 * wall * (2 * shell - 0.7)
    t1 = brain * np.select([radius < 1, away < 1], [tumour, 370.0], 420.0)
    glow = 480 + 330 * np.exp(-away.clip(0))
    labels = (brain > 0) * np.select([radius < 1, away < 1], [1.0, 2.0], 0.0)
    nearest = np.linalg.solve(affine, [*centre, 1.0])[:3].round().astype(int)
    labels[tuple(nearest)] = 1  # even where a voxel is larger than the tumour
    _, brain, _, _ = look(shape)
    flair = brain * np.select([radius < 1, away < 1], [600 - 90.0 * dense, glow], 400.0)
    coarse, brain, radius, away = look((shape[0] // 2, shape[1] // 2, shape[2]))
    adc = brain * np.select([radius < 1, away < 1], [950 - 150.0 * dense, 1150.0], 800.0)
    return {
        "ce_t1": (t1, affine),
        "ce_t2_flair": (flair, affine),
        "adc": (adc, coarse),
        "tumour": (labels, affine),
    }
