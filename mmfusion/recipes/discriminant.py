"""Classes as Student-t distributions: what discriminant evidence fits to one modality."""

import numpy as np
import torch
from scipy.linalg import cholesky, solve_triangular
from sklearn.covariance import shrunk_covariance
from torch import Tensor, nn


class StudentClasses(nn.Module):
    """Log densities of classes that differ in their means alone, heavy-tailed about them.

    Few rows tell a mean badly: each is drawn to the mean of all, the more the fewer rows a class
    has and the less classes differ beside the spread within them. An untaught one finds all alike.

    Args:
        width: Features, ``F``.
        num_classes: Classes, ``Y``.

    Shape:
        - ``x``: ``(B, F)``; result: ``(B, Y)``, up to a constant

    Example:
        >>> classes = StudentClasses(1, 2)
        >>> x, labels = np.array([[-3.0], [-2.0], [2.0], [3.0]]), np.array([0, 0, 1, 1])
        >>> classes.take(x, labels, shrinkage=0.1)
        True
        >>> classes(torch.tensor([[-1.0], [1.0]])).argmax(1).tolist()
        [0, 1]

    References:
        Shrunk means and covariance: Friedman, "Regularized Discriminant Analysis", JASA 1989, and
        Morris, "Parametric Empirical Bayes Inference", JASA 1983. Heavy tails, so that a row unlike
        all others decides less: our design.
    """

    FREEDOM = 30.0
    centre: Tensor
    whitener: Tensor
    means: Tensor

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("whitener", torch.zeros(width, width))
        self.register_buffer("means", torch.zeros(num_classes, width))

    def take(self, x: np.ndarray, labels: np.ndarray, shrinkage: float) -> bool:
        """Fit to rows ``(N, F)`` of classes ``(N,)``; False, and as before, if none differ.

        Args:
            x: Standardised features.
            labels: Class numbers.
            shrinkage: Share of a round covariance in that within classes.
        """
        counts = np.bincount(labels, minlength=len(self.means))
        num_rows, num_classes = len(labels), (counts > 0).sum()
        if num_classes < 2:
            return False
        x = x.astype(np.float64)
        centre = x.mean(0)
        sums = np.zeros(self.means.shape)
        np.add.at(sums, labels, x - centre)
        means = sums / counts.clip(min=1)[:, None]
        residuals = x - centre - means[labels]
        covariance = residuals.T @ residuals / max(num_rows - num_classes, 1)
        within = covariance.trace()
        between = counts @ np.square(means).sum(1) - (num_classes - 1) * within
        between /= num_rows - np.square(counts).sum() / num_rows
        if between <= 0:  # classes differ less than chance would have it
            return False
        means *= (counts / (counts + within / between))[:, None]
        rounded = shrunk_covariance(covariance, shrinkage) + 1e-6 * np.eye(len(centre))
        whitener = solve_triangular(cholesky(rounded, lower=True), np.eye(len(centre)), lower=True)
        found = {"centre": centre, "whitener": whitener, "means": means @ whitener.T}
        for name, value in found.items():
            getattr(self, name).copy_(torch.from_numpy(value))
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Log densities, without what all classes share."""
        white = (x - self.centre) @ self.whitener.T
        distances = torch.cdist(white, self.means).square()
        return -(self.FREEDOM + x.shape[1]) / 2 * torch.log1p(distances / self.FREEDOM)
