import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.metrics import (
    METRICS,
    Gaussian,
    KernelReference,
    MetricValue,
    Moments,
    accuracy,
    frechet,
    frechet_distance,
    inception_score,
    kid,
)


def draw(n, d, seed=0, scale=1.0, shift=0.0):
    """Correlated features with unequal spreads."""
    mix = np.random.default_rng(99).normal(size=(d, d)) * np.linspace(1, 0.2, d)
    return (np.random.default_rng(seed).normal(size=(n, d)) * scale + shift) @ mix


def digits():
    """Real features: the pixels of the embedded digits, and their first 16 components. Two halves of each."""
    pixels = load_digits().data
    components = PCA(16, random_state=0).fit_transform(pixels)
    return {"pixels": (pixels[:900], pixels[900:]), "components": (components[:900], components[900:])}


PAIRS = {"random": (draw(300, 12, 1, 1.2, 0.3), draw(400, 12, 2)), **digits()}


class AsIs(torch.nn.Module):
    """A feature network that hands on what it is given."""

    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, x):
        return x


def resamples(n, times=200, seed=5):
    return np.random.default_rng(seed).integers(0, n, (times, n))


def follows(measured: MetricValue, again, n, tolerance=0.2, correlation=0.95):
    """The influences predict the spread of true resamples, and each of them."""
    draws = resamples(n)
    true = np.array([again(rows) for rows in draws]) - measured.value
    reported = measured.influence[draws].mean(1)
    assert abs(measured.influence.mean()) < 1e-9 * max(1, np.abs(measured.influence).max())
    assert reported.std() == pytest.approx(true.std(), rel=tolerance)
    assert np.corrcoef(true, reported)[0, 1] > correlation


def slow_frechet(x, y):
    a, b = np.cov(x.T), np.cov(y.T)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", PAIRS)
def test_frechet_against_scipy_and_torchmetrics(pair):
    x, y = PAIRS[pair]
    measured = frechet(x, Gaussian.of(y))
    # pixels that are always black leave the covariances singular, and scipy's root inexact
    assert measured.value == pytest.approx(slow_frechet(x, y), rel=1e-3 if pair == "pixels" else 1e-9)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(measured.value, rel=1e-6)
    fid = pytest.importorskip("torchmetrics.image.fid")
    theirs = fid.FrechetInceptionDistance(feature=AsIs(x.shape[1]))
    theirs.set_dtype(torch.float64)
    theirs.update(torch.from_numpy(y), real=True)
    theirs.update(torch.from_numpy(x), real=False)
    assert measured.value == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_frechet_of_known_gaussians():
    rng = np.random.default_rng(0)
    a, b, m, q = rng.uniform(0.1, 4, (4, 6))
    distance = frechet_distance(Gaussian(m, np.diag(a), 100), Gaussian(q, np.diag(b), 100))
    assert distance == pytest.approx(np.square(m - q).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)
    x = draw(500, 8)
    same = frechet(x, Gaussian.of(x))
    assert same.value == pytest.approx(0, abs=1e-9) and np.abs(same.influence).max() < 1e-7
    assert frechet(x + 3, Gaussian.of(x)).value == pytest.approx(8 * 9, rel=1e-9)
    assert frechet(x * 2, Gaussian.of(x)).value == pytest.approx(np.trace(np.cov(x.T)) + np.square(x.mean(0)).sum())


def test_frechet_resampled():
    x, reference = draw(400, 6, 1, 1.3, 0.5), Gaussian.of(draw(3000, 6, 2))
    measured = frechet(x, reference)
    follows(measured, lambda rows: frechet_distance(Gaussian.of(x[rows]), reference), 400)
    fresh = [frechet(draw(400, 6, 10 + i, 1.3, 0.5), reference).value for i in range(150)]
    assert measured.standard_error == pytest.approx(np.std(fresh), rel=0.25)


def test_frechet_handles_constant_pixels():
    x, y = PAIRS["pixels"]
    x, reference = 255 - 2 * x, Gaussian.of(y)
    follows(frechet(x, reference), lambda rows: frechet_distance(Gaussian.of(x[rows]), reference), 900)


def test_frechet_needs_enough_images():
    enough, reference = draw(13, 12), Gaussian.of(draw(200, 12, 1))
    assert frechet(enough, reference).value > 0 and "13 images for 12 features" in frechet(enough, reference).why
    assert not frechet(draw(120, 12), reference).why
    note_few_images = frechet(draw(12, 12), reference)
    assert (
        note_few_images.value is None and note_few_images.influence is None and note_few_images.standard_error is None
    )
    assert (
        "12 images for 12 features" in note_few_images.why
        and "below 13 images" in note_few_images.why
        and "kid" in note_few_images.why
    )
    assert "12 images of the reference" in frechet(enough, Gaussian.of(draw(12, 12))).why


def test_features_are_not_modified():
    x, y, moments = draw(300, 4), draw(300, 4, 1), Moments()
    before = x.copy(), y.copy()
    moments.add(x)
    midway = moments.gaussian()
    mean = midway.mean.copy()
    moments.add(y)
    frechet(x, moments.gaussian()), kid(x, y)
    assert (x == before[0]).all() and (y == before[1]).all() and (midway.mean == mean).all()


@pytest.mark.parametrize("sizes", [[5000], [2, 1, 4997], [2500] * 2, [1] * 40 + [4960]])
def test_a_gaussian_from_blocks(sizes):
    # far from 0, where a sum of squares would lose half the digits
    x = (draw(5000, 5) + 1e4).astype(np.float32)
    moments, start = Moments(), 0
    for size in sizes:
        moments.add(x[start : start + size])
        start += size
    for built in (moments.gaussian(), Gaussian.of(x)):
        assert built.count == 5000 and built.mean.dtype == built.covariance.dtype == np.float64
        np.testing.assert_allclose(built.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(built.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(built.root @ built.root, built.covariance, atol=1e-9)


def slow_kid(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_against_loops():
    x, y = draw(17, 4, 1, 1.5), draw(23, 4, 2)
    assert kid(x, y).value == pytest.approx(slow_kid(x.tolist(), y.tolist()), rel=1e-12)
    assert kid(x[:2], y[:2]).value == pytest.approx(slow_kid(x[:2].tolist(), y[:2].tolist()), rel=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", PAIRS)
def test_kid_against_torchmetrics(pair):
    torchmetrics_kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = (z[:300] for z in PAIRS[pair])
    theirs = torchmetrics_kid.KernelInceptionDistance(feature=AsIs(x.shape[1]), subsets=1, subset_size=300)
    theirs.update(torch.from_numpy(y), real=True)
    theirs.update(torch.from_numpy(x), real=False)
    assert kid(x, y).value == pytest.approx(theirs.compute()[0].item(), rel=1e-6)


def test_kid_in_blocks_equals_whole():
    x, y = (z.astype(np.float32) for z in PAIRS["random"])
    whole, reference = kid(x, y), KernelReference(y, block=7)
    for again in (kid(x, y, block=50), kid(x, reference, block=7), kid(x, reference, block=7)):
        assert again.value == pytest.approx(whole.value, rel=1e-10)
        assert again.standard_error == pytest.approx(whole.standard_error, rel=1e-10)
        np.testing.assert_allclose(again.influence, whole.influence, rtol=1e-9, atol=1e-9)


def test_kid_resampled_and_its_standard_error():
    x, reference = draw(300, 6, 1, 1.3, 0.5), KernelReference(draw(400, 6, 2))
    measured = kid(x, reference)

    def again(rows):
        return kid(x[rows], reference).value

    follows(measured, again, 300, tolerance=0.25)
    # the reference is held fixed, as for the other metrics
    fresh = [kid(draw(300, 6, 10 + i, 1.3, 0.5), reference) for i in range(150)]
    reported = np.mean([one.standard_error for one in fresh])
    assert reported == pytest.approx(np.std([one.value for one in fresh]), rel=0.2)


def test_kid_is_unbiased():
    values = [kid(draw(60, 6, 2 * i), draw(60, 6, 2 * i + 1)).value for i in range(100)]
    assert min(values) < 0 < max(values) and abs(np.mean(values)) < 3 * np.std(values) / 10


def test_kid_needs_two_of_each():
    assert "1 sampled" in kid(draw(1, 4), draw(9, 4)).why and kid(draw(1, 4), draw(9, 4)).value is None
    assert kid(draw(9, 4), draw(1, 4)).value is None


def some_probabilities(n=500, k=5, seed=0):
    logits = np.random.default_rng(seed).normal(size=(n, k)) * 2
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32), logits


@pytest.mark.filterwarnings("ignore")
def test_inception_score_equals_torchmetrics():
    p, logits = some_probabilities()
    p = p.astype(np.float64)
    slow = np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, p.mean(0))) for row in p]))
    assert inception_score(p).value == pytest.approx(slow, rel=1e-12)
    assert inception_score(np.eye(4)[np.arange(80) % 4]).value == pytest.approx(4)
    assert inception_score(np.eye(4)[np.zeros(80, int)]).value == pytest.approx(1)
    assert inception_score(np.full((80, 4), 0.25)).value == pytest.approx(1)
    assert not inception_score(p).why and "49 images for 5 classes" in inception_score(p[:49]).why
    inception = pytest.importorskip("torchmetrics.image.inception")
    theirs = inception.InceptionScore(feature=AsIs(5), splits=1)
    theirs.update(torch.from_numpy(logits))
    assert inception_score(p).value == pytest.approx(theirs.compute()[0].item(), rel=1e-5)


def test_inception_score_and_accuracy_resampled():
    p, _ = some_probabilities()
    follows(inception_score(p), lambda rows: inception_score(p[rows]).value, 500)
    labels = np.random.default_rng(1).integers(0, 6, 500)  # 5: null
    labels[:200] = p[:200].argmax(1)
    measured = accuracy(p, labels)
    follows(measured, lambda rows: accuracy(p[rows], labels[rows]).value, 500)
    counts = labels < 5
    assert measured.value == (p.argmax(1) == labels)[counts].mean()
    exact = (measured.value * (1 - measured.value) / counts.sum()) ** 0.5
    assert measured.standard_error == pytest.approx(exact, rel=0.01)


def test_accuracy_counts_real_labels_only():
    p = np.eye(3)[[0, 1, 2, 0]]
    assert accuracy(p, np.array([0, 1, 2, 0])).value == 1 and accuracy(p, np.array([0, 1, 2, 0])).why == ""
    some = accuracy(p, np.array([0, 2, 3, -1]))
    assert some.value == 0.5 and some.influence.tolist() == [1, -1, 0, 0] and "2 of 4" in some.why
    none = accuracy(p, np.full(4, 3))
    assert none.value is None and "none of the 4 labels" in none.why
    assert accuracy(p[:1], np.array([0])).standard_error is None


def test_bad_input_is_rejected():
    good, bad = draw(30, 4), draw(30, 4)
    bad[[3, 7], [0, 2]] = np.nan, np.inf
    for metric in (lambda x: kid(x, good), lambda x: frechet(x, Gaussian.of(good)), Gaussian.of, inception_score):
        with pytest.raises(InputError, match="2 of 30"):
            metric(bad)
    for metric in (lambda x: kid(x, good), lambda x: frechet(x, Gaussian.of(good))):
        with pytest.raises(InputError, match="another extractor"):
            metric(draw(30, 5))
        with pytest.raises(InputError, match=r"expected \[N, D\]"):
            metric(good[0])
    with pytest.raises(InputError, match="two images"):
        Gaussian.of(good[:1])
    with pytest.raises(InputError, match="no Gaussian"):
        Gaussian(np.zeros(3), np.eye(4), 9)
    with pytest.raises(InputError, match="softmax"):
        inception_score(good)
    with pytest.raises(InputError, match="one integer"):
        accuracy(np.eye(3), np.array([0, 1]))
    with pytest.raises(InputError, match="one integer"):
        accuracy(np.eye(3), np.array([0.0, 1.0, 2.0]))


def test_every_metric_has_its_kind():
    assert list(METRICS) == [
        "frechet",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "inception_score",
        "accuracy",
    ]
    assert [name for name, kind in METRICS.items() if kind.better == "lower"] == ["frechet", "kid"]
    assert [name for name, kind in METRICS.items() if kind.about == "diversity"] == ["recall", "coverage"]
