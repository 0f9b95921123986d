import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.metrics import nearest, precision_recall, radii

NAMES = ("precision", "recall", "density", "coverage")


def draw(n, d=8, seed=0, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


PIXELS = load_digits().data
COMPONENTS = PCA(20, random_state=0).fit_transform(PIXELS)
PAIRS = {
    "random": (draw(150, seed=1, scale=1.1, shift=0.2), draw(210)),
    "float32, far from 0": ((draw(150, seed=1) + 300).astype(np.float32), (draw(210) + 300).astype(np.float32)),
    "pixels": (PIXELS[:120], PIXELS[120:300]),
    "components": (COMPONENTS[:200] * 1.1, COMPONENTS[200:400]),
}


def distances(a, b):
    return np.sqrt(np.square(a[:, None].astype(np.float64) - b[None]).sum(-1))


def slow_radii(a, k):
    apart = distances(a, a)
    np.fill_diagonal(apart, np.inf)
    return np.sort(apart, axis=1)[:, k - 1]


def slow(x, y, k):
    """The four by their definitions, with loops."""
    apart, ball_x, ball_y = distances(x, y), slow_radii(x, k), slow_radii(y, k)
    n, m = apart.shape
    return {
        "precision": np.mean([any(apart[i, j] < ball_y[j] for j in range(m)) for i in range(n)]),
        "recall": np.mean([any(apart[i, j] < ball_x[i] for i in range(n)) for j in range(m)]),
        "density": np.mean([sum(apart[i, j] < ball_y[j] for j in range(m)) / k for i in range(n)]),
        "coverage": np.mean([min(apart[i, j] for i in range(n)) < ball_y[j] for j in range(m)]),
    }


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_four_against_loops_and_prdc(pair, k):
    x, y = PAIRS[pair]
    found = {name: measured.value for name, measured in precision_recall(x, y, k).items()}
    assert found == pytest.approx(slow(x, y, k), abs=1e-12)
    assert 0 < found["coverage"] < 1
    compute = pytest.importorskip("prdc").compute_prdc
    theirs = compute(real_features=y.astype(np.float64), fake_features=x.astype(np.float64), nearest_k=k)
    assert found == pytest.approx({name: theirs[name] for name in NAMES}, abs=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_blocks_and_given_radii_change_nothing(pair):
    x, y = PAIRS[pair]
    whole = precision_recall(x, y)
    for again in (precision_recall(x, y, block=23), precision_recall(x, y, y_radii=radii(y, 5, block=7), block=13)):
        for name in NAMES:
            assert again[name].value == pytest.approx(whole[name].value, abs=1e-12)
            np.testing.assert_allclose(again[name].influence, whole[name].influence, atol=1e-12)
    np.testing.assert_allclose(radii(y, 3, block=7), slow_radii(y, 3), rtol=1e-6)


def test_copies_and_ties():
    y = draw(60)
    same = precision_recall(y, y, 5)
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1
    # each ball holds its own copy and 4 nearer ones; the fifth lies on its edge, which is outside
    assert same["density"].value == 1
    for k in (1, 2):
        doubled = np.repeat(draw(30) + 1e3, 3, axis=0)
        assert radii(doubled, k, block=4).max() < 1e-4  # of rounding
        found = precision_recall(doubled, doubled, k, block=4)
        assert all(found[name].value == 0 for name in NAMES)


def test_far_apart_nothing_is_covered():
    found = precision_recall(draw(40) + 1e3, draw(50))
    assert all(found[name].value == 0 and found[name].standard_error == 0 for name in NAMES)


def masks(x, y, k=5):
    """[N, M]: who lies in the balls of y, and who in those of x."""
    apart = distances(x, y)
    return apart < radii(y, k), apart < radii(x, k)[:, None]


def resampled(inside, within, rows, k=5):
    """The four where these images were drawn; the balls stay as they are."""
    inside, within = inside[rows], within[rows]
    return inside.any(1).mean(), within.any(0).mean(), inside.sum(1).mean() / k, inside.any(0).mean()


def test_influences_against_true_resamples():
    x, y = PAIRS["components"]
    found, both = precision_recall(x, y), masks(x, y)
    draws = np.random.default_rng(0).integers(0, len(x), (200, len(x)))
    true = np.array([resampled(*both, rows) for rows in draws])
    for column, name in enumerate(NAMES):
        reported = found[name].value + found[name].influence[draws].mean(1)
        assert abs(found[name].influence.mean()) < 1e-12
        if name in ("precision", "density"):
            np.testing.assert_allclose(reported, true[:, column], atol=1e-12)
        else:
            assert 0.8 < reported.std() / true[:, column].std() < 1.9
            assert np.corrcoef(reported, true[:, column])[0, 1] > 0.5


def test_influence_predicts_leaving_one_out():
    x, y = PAIRS["random"]
    found, (inside, within) = precision_recall(x, y), masks(x, y)
    for name, mask in (("coverage", inside), ("recall", within)):
        falls = np.array([mask.any(0).mean() - np.delete(mask, i, 0).any(0).mean() for i in range(len(x))])
        np.testing.assert_allclose(found[name].influence, len(x) * (falls - falls.mean()), atol=1e-9)
        assert falls.max() > 0


@pytest.mark.parametrize(("n", "scale"), [(300, 1.0), (150, 1.3)])
def test_standard_errors_against_fresh_samples(n, scale):
    y = draw(300)
    fresh = [precision_recall(draw(n, seed=i, scale=scale), y, y_radii=radii(y)) for i in range(1, 80)]
    for name in NAMES:
        spread = np.std([one[name].value for one in fresh])
        reported = np.mean([one[name].standard_error for one in fresh])
        # coverage and recall err on the large side
        assert 0.75 < reported / spread < (1.3 if name in ("precision", "density") else 2)


def test_nearest():
    x, y = draw(40, seed=3), draw(90)
    apart = distances(x, y)
    for block in (7, 2048):
        places, far = nearest(x, y, 4, block=block)
        assert places.dtype == np.int64 and far.dtype == np.float64 and places.shape == far.shape == (40, 4)
        assert (places == apart.argsort(1)[:, :4]).all()
        np.testing.assert_allclose(far, np.sort(apart, 1)[:, :4], rtol=1e-12)
    places, far = nearest(y[[5, 80]] + 0, y)
    assert places.tolist() == [[5], [80]] and (far == 0).all()
    assert (nearest(x, y, 90)[0].sum(1) == 90 * 89 // 2).all()


def test_neighbours_reject_bad_input():
    note_few_images = precision_recall(draw(5), draw(50), 5)
    assert all(note_few_images[name].value is None and "more than 5" in note_few_images[name].why for name in NAMES)
    assert precision_recall(draw(50), draw(5), 5)["recall"].value is None
    assert precision_recall(draw(6), draw(7), 5)["recall"].value is not None
    for call in (lambda: precision_recall(draw(9, 3), draw(9)), lambda: nearest(draw(9, 3), draw(9))):
        with pytest.raises(InputError, match="another extractor"):
            call()
    broken = draw(20)
    broken[4, 1] = np.nan
    for call in (lambda: precision_recall(broken, draw(20)), lambda: nearest(draw(20), broken), lambda: radii(broken)):
        with pytest.raises(InputError, match="1 of 20"):
            call()
    for call in (
        lambda: radii(draw(9), 9),
        lambda: radii(draw(9), 0),
        lambda: precision_recall(draw(9), draw(9), 0),
        lambda: nearest(draw(9), draw(9), 10),
        lambda: precision_recall(draw(9), draw(9), 2, y_radii=np.ones(8)),
    ):
        with pytest.raises(InputError, match=r"(count|k) is|radii have"):
            call()


BIG = """
import resource
import numpy as np
from diffusion_adagn.evaluation.metrics import kid
from diffusion_adagn.evaluation.metrics import nearest, precision_recall
x, y = (np.random.default_rng(seed).normal(size=(20000, 64)).astype(np.float32) for seed in (0, 1))
nearest(x[:100], y[:100])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kid(x, y), precision_recall(x, y), nearest(x, y)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.serial
@pytest.mark.slow
def test_neighbours_of_20000_fit_memory():
    """All distances at once would be 3.2 GB."""
    grown = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True).stdout
    assert float(grown) < 1000
