import numpy as np
import pytest

from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation import results
from diffusion_adagn.evaluation.features import FeatureSet
from diffusion_adagn.evaluation.metrics import (
    METRICS,
    Gaussian,
    accuracy,
    frechet,
    inception_score,
    kid,
    precision_recall,
)

NAMES = ["cat", "dog", "crane", "crane"]  # two classes may share a name
D = 6


def measure(pooled, probabilities, labels, reference, names, **how):
    return results.measure(FeatureSet(pooled, labels=labels), reference, names, probabilities, **how)


def real(pooled, labels=None):
    return FeatureSet(pooled, labels=labels)


def draw(n, seed=0, shift=0.0):
    return (np.random.default_rng(seed).normal(size=(n, D)) + shift).astype(np.float32)


def cards(n, seed=0, classes=4):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), n).astype(np.float32)


X, Y = draw(300, 1, 0.3), draw(500, 2)
P = cards(300)
OURS = np.repeat([0, 1, 2, 4], [150, 80, 40, 30])  # 4: null; nothing of the second crane
THEIRS = np.repeat([0, 1, 3], [300, 40, 160])


def same(a, b):
    assert a.value == b.value and a.standard_error == b.standard_error and a.why == b.why
    assert np.array_equal(a.influence, b.influence) or a.influence is b.influence is None


def test_measure_equals_single_metrics():
    found = measure(X, P, OURS, real(Y, THEIRS), NAMES)
    assert list(found.overall) == list(METRICS)
    same(found.overall["frechet"], frechet(X, Gaussian.of(Y)).within(OURS))
    same(found.overall["kid"], kid(X, Y).within(OURS))
    for name, measured in precision_recall(X, Y, 5).items():
        same(found.overall[name], measured.within(OURS))
    same(found.overall["inception_score"], inception_score(P).within(OURS))
    same(found.overall["accuracy"], accuracy(P, OURS).within(OURS))
    assert all(len(measured.influence) == 300 for measured in found.overall.values())
    cat = found.per_class
    same(cat["frechet"][0], frechet(X[:150], Gaussian.of(Y[:300])))
    same(cat["kid"][0], kid(X[:150], Y[:300]))
    same(cat["accuracy"][0], accuracy(P[:150], OURS[:150]))
    assert set(cat) == {"frechet", "kid", "accuracy"} and all(len(measured) == 4 for measured in cat.values())


def test_class_order_is_preserved():
    order = np.random.default_rng(0).permutation(300)
    sorted_, mixed = (
        measure(X[rows], P[rows], OURS[rows], real(Y, THEIRS), NAMES).per_class["kid"][0]
        for rows in (slice(None), order)
    )
    np.testing.assert_allclose(mixed.influence, sorted_.influence[order[order < 150]], atol=1e-12)


def test_small_classes_are_noted():
    found = measure(X, P, OURS, real(Y, THEIRS), NAMES)
    frechets, kids = found.per_class["frechet"], found.per_class["kid"]
    assert kids[0].why == "" and kids[1].why == "40 images of the reference: the spread is large"
    assert frechets[1].why.startswith("40 images of the reference: the spread is large")
    assert kids[2].value is None and kids[2].why == "no image of the reference is of the class crane"
    assert kids[3].value is None and kids[3].why == "no image of the class crane was sampled"
    assert found.per_class["accuracy"][2].why == "40 images: the spread is large"
    assert found.notes == [
        "Accuracy: 30 of 300 images have no label among the 4 classes and do not count.",
        "Fewer than 50 sampled images: crane (40), crane (0).",
        "Fewer than 50 reference images: dog (40).",
        "No reference image: crane.",
    ]


def test_single_image_classes_are_measured():
    names = [f"c{i}" for i in range(8)]
    labels = np.arange(300) % 7
    found = measure(X, cards(300, classes=8), labels, real(Y, np.arange(500).clip(0, 8) % 9), names)
    assert "one image of the reference" in found.per_class["kid"][2].why
    assert (
        found.notes[0]
        == "Fewer than 50 sampled images: c0 (43), c1 (43), c2 (43), c3 (43), c4 (43) and 3 more classes."
    )
    alone = measure(X[:1], P[:1], np.array([0]), real(Y, THEIRS), NAMES)
    assert alone.per_class["kid"][0].value is None and alone.per_class["frechet"][0].value is None
    assert alone.per_class["accuracy"][0].why == "1 image: the spread is large"


def test_too_few_images_skip_frechet():
    found = measure(X[:D], None, None, real(Y), None)
    assert found.overall["frechet"].value is None and found.overall["kid"].value is not None
    assert found.notes[0].startswith("Frechet distance not computed: 6 images for 6 features")
    assert found.per_class == {} and "labels are not known" in found.overall["accuracy"].why
    assert "Inception score not computed: the extractor is no classifier" in found.notes[1]
    fewer = measure(X[:4], None, None, real(Y), None)
    assert fewer.notes[1].startswith("Precision, Recall, Density, Coverage not computed: 4 sampled")
    # no covariance is made that nothing is compared with
    target = real(Y)
    measure(X[:D], None, None, target, None)
    assert "gaussian" not in vars(target)


def test_reused_target_equals_fresh_one():
    target, second = real(Y, THEIRS), X[::2] * 1.2
    measure(X, P, OURS, target, NAMES)
    twice = measure(second, P[::2], OURS[::2], target, NAMES)
    afresh = measure(second, P[::2], OURS[::2], real(Y, THEIRS), NAMES)
    for name in METRICS:
        same(twice.overall[name], afresh.overall[name])
    for name, measured in twice.per_class.items():
        for a, b in zip(measured, afresh.per_class[name]):
            same(a, b)
    assert twice.notes == afresh.notes


def test_target_cache_is_computed_once(monkeypatch):
    target = real(Y, THEIRS)
    measure(X, P, OURS, target, NAMES)
    cached = target.gaussian, target.kernel.own(), target.radii(5), target.of_class(0)
    monkeypatch.setattr("diffusion_adagn.evaluation.features.radii", None)
    measure(X, P, OURS, target, NAMES)
    assert all(
        a is b for a, b in zip(cached, (target.gaussian, target.kernel.own(), target.radii(5), target.of_class(0)))
    )


def test_k_is_5_by_default():
    target = real(Y)
    for k, found in ((5, measure(X, None, None, target, None)), (7, measure(X, None, None, target, None, k=7))):
        same(found.overall["density"], precision_recall(X, Y, k)["density"])
    with pytest.raises(InputError, match="k is 0"):
        measure(X, None, None, target, None, k=0)


def test_statistics_alone_serve_frechet():
    found = measure(X, P, OURS, FeatureSet(None, statistics=Gaussian.of(Y)), NAMES)
    same(found.overall["frechet"], frechet(X, Gaussian.of(Y)).within(OURS))
    for name in ("kid", "precision", "recall", "density", "coverage"):
        assert found.overall[name].value is None and "mean and a covariance" in found.overall[name].why
    assert found.overall["accuracy"].value is not None and found.per_class["accuracy"][0].value is not None
    assert found.per_class["kid"][0].value is None and "no labels" in found.per_class["kid"][0].why
    assert found.notes[-1] == "The reference has no labels, so classes are measured by accuracy alone."


def test_accuracy_needs_matching_classes():
    target = real(Y, THEIRS)
    unlabelled = measure(X, P, None, target, NAMES)
    assert unlabelled.overall["accuracy"].value is None and unlabelled.per_class == {}
    assert unlabelled.overall["inception_score"].value is not None
    others = measure(X, cards(300, classes=10), OURS, target, NAMES)
    assert others.overall["accuracy"].value is None and "10 classes" in others.overall["accuracy"].why
    assert all(measured.value is None for measured in others.per_class["accuracy"])
    assert measure(X, P, OURS, target, NAMES, per_class=False).per_class == {}


def test_bad_input_is_rejected():
    target, broken = real(Y), X.copy()
    broken[[2, 9, 11]] = np.nan
    for match, call in (
        ("3 of 300", lambda: measure(broken, None, None, target, None)),
        ("3 of 300", lambda: measure(X, None, None, real(broken), None)),
        ("another extractor", lambda: measure(X[:, :4], None, None, target, None)),
        ("another extractor", lambda: measure(X[:, :4], None, None, FeatureSet(None, statistics=Gaussian.of(Y)), None)),
        ("one integer", lambda: measure(X, None, OURS[:-1], target, NAMES)),
        ("one integer", lambda: real(Y, THEIRS[:-1])),
        ("one row an image", lambda: measure(X, P[:-1], OURS, target, NAMES)),
        ("softmax", lambda: measure(X, P * 2, OURS, target, NAMES)),
        ("expected \\[N, D\\]", lambda: measure(X[:0], None, None, target, None)),
    ):
        with pytest.raises(InputError, match=match):
            call()


def test_errors_assume_fixed_class_counts():
    """Two classes far apart: what differs between them is no chance where each has its number of images."""
    labels = np.repeat([0, 1], 60)
    reference = real(drawn(0, 500, 500))

    def drawn_and_measured(seed):
        return measure(drawn(seed, 60, 60), None, labels, reference, ["a", "b"], per_class=False).overall

    fresh = [drawn_and_measured(seed) for seed in range(1, 121)]
    for name in ("kid", "frechet", "precision", "density"):
        reported = np.mean([one[name].standard_error for one in fresh])
        assert reported == pytest.approx(np.std([one[name].value for one in fresh]), rel=0.3), name
        assert abs(fresh[0][name].influence[:60].mean()) < 1e-9


def drawn(seed, first, second):
    random = np.random.default_rng(seed)
    return np.concatenate([random.normal(-1.4, 1, (first, 4)), random.normal(2, 0.7, (second, 4))]).astype("float32")
