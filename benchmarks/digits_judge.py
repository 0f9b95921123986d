"""A judge of sampled digits that knows nothing of the model: scikit-learn's SVC, trained on the real ones."""

from collections.abc import Sequence

import numpy as np


class DigitsJudge:
    """Has an image the class asked for, the contrast of digits, and do images vary?"""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.svm import SVC

        real = load_digits()
        self.real, self.labels = real.images / 8 - 1, real.target
        half = np.arange(len(self.labels)) % 2 == 0
        flat = self.real.reshape(len(self.real), -1)
        assert SVC().fit(flat[half], self.labels[half]).score(flat[~half], self.labels[~half]) > 0.97
        self.svc = SVC().fit(flat, self.labels)

    def classes(self, images: np.ndarray) -> np.ndarray:
        """The class of each image. images: [N, 8, 8, 1] in 0..1."""
        return self.svc.predict((images[..., 0] * 2 - 1).reshape(len(images), -1))

    def __call__(self, images: np.ndarray, ids: Sequence[int]) -> tuple[float, float, float]:
        """Three figures, relative to the real digits.

        Args:
            images: [N, 8, 8, 1] in 0..1.
            ids: the class of each that was asked for.

        Returns:
            The share of images of that class; the standard deviation of the pixels; the least standard deviation within
            a class.
        """
        x, ids = images[..., 0] * 2 - 1, np.array(ids)
        right = (self.classes(images) == ids).mean()
        spread = [np.sqrt(x[ids == c].var(0).sum() / self.real[self.labels == c].var(0).sum()) for c in np.unique(ids)]
        return float(right), float(x.std() / self.real.std()), float(min(spread))
