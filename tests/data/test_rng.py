import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion_adagn.data.rng import STREAMS, SampleOrder, normal, philox, uniform, uniforms, words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_matches_random123(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert [f"{int(w):08x}" for w in words] == expected.split()


def reference_words(seed, stream, positions, count):
    """The words of each counter, round by round, with Python integers."""
    rows = []
    for p in positions.tolist():
        row = []
        for block in range(math.ceil(count / 4)):
            c, k = [block, p & 0xFFFFFFFF, p >> 32 & 0xFFFFFFFF, STREAMS[stream]], [seed & 0xFFFFFFFF, seed >> 32]
            for _ in range(10):
                a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
                c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
                k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
            row += c
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(len(positions), 4 * math.ceil(count / 4))


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 3, 3), (1, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize("seed", [0, 5 + (7 << 32)])
def test_draws_equal_the_reference(shape, seed):
    positions, size = torch.tensor([7, 3, 2**40 + 1, 0, 2**32 - 1, 99]), math.prod(shape)
    for p in (positions, positions[:1], positions[::2], positions[:0]):
        expected = reference_words(seed, "noise", p, 2 * math.ceil(size / 2))
        assert torch.equal(words(seed, "noise", p, 2 * math.ceil(size / 2)), expected)
        u, v = ((expected.double() + 0.5) / 2**32).chunk(2, dim=1)
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        noise = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size].float()
        assert torch.equal(normal(seed, "noise", p, shape), noise.reshape(len(p), *shape))
        plain = [reference_words(seed, s, p, 1)[:, 0].double() / 2**32 for s in ("flip", "timestep")]
        assert torch.equal(uniforms(seed, ("flip", "timestep"), p), torch.stack(plain))
        assert torch.equal(uniform(seed, "timestep", p), plain[1])


def test_numpy_and_torch_words_are_equal():
    positions = torch.arange(50)
    counter = torch.arange(6), positions[:, None], torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[3]])
    arrays = philox([c.numpy().view(np.uint64) for c in counter], (1, 2))
    for word, array in zip(philox(counter, (1, 2)), arrays):
        assert np.array_equal(word.numpy().view(np.uint64), array)


def test_draws_depend_on_seed_stream_position():
    p = torch.tensor([7, 3, 2**40, 0])
    together = normal(5, "noise", p, (1, 3, 3))
    for i in range(4):
        assert torch.equal(normal(5, "noise", p[i : i + 1], (1, 3, 3))[0], together[i])
    assert not torch.equal(normal(6, "noise", p, (1, 3, 3)), together)
    assert not torch.equal(normal(5 + 2**32, "noise", p, (1, 3, 3)), together)
    assert not torch.equal(normal(5, "heldout", p, (1, 3, 3)), together)
    assert torch.equal(normal(5, "noise", p, (1, 5, 5)).flatten(1)[:, 0] == 0, torch.zeros(4, dtype=torch.bool))
    firsts = {name: uniform(0, name, torch.tensor([0])).item() for name in STREAMS}
    assert len(set(firsts.values())) == len(STREAMS)


def test_noise_and_uniform_distributions():
    noise = normal(0, "noise", torch.arange(2000), (3, 5, 5)).numpy()
    assert stats.kstest(noise.reshape(-1)[:50000], "norm").pvalue > 1e-3
    flat = noise.reshape(2000, -1)
    correlation = np.corrcoef(flat.T)
    assert np.abs(correlation - np.eye(75)).max() < 0.12  # 2,000 draws: 5 standard errors
    assert np.abs(np.corrcoef(flat[:-1].reshape(-1), flat[1:].reshape(-1))[0, 1]) < 0.02
    u = uniform(0, "timestep", torch.arange(20000)).numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 2, 7, 1797])
def test_epochs_are_different_permutations(n):
    order = SampleOrder(n, seed=3)
    seen = order(torch.arange(3 * n)).reshape(3, n)
    for epoch in seen:
        assert sorted(epoch.tolist()) == list(range(n))
    if n > 5:
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[0], SampleOrder(n, seed=4)(torch.arange(n)))


def test_order_accepts_any_positions():
    order = SampleOrder(10, seed=0)
    whole = order(torch.arange(60))
    assert torch.equal(SampleOrder(10, seed=0)(torch.arange(25, 48)), whole[25:48])
    reversed_positions = torch.arange(59, -1, -1)
    assert torch.equal(SampleOrder(10, seed=0)(reversed_positions), whole.flip(0))


def test_permutations_are_uniform():
    """Over many epochs, each sample is at each place equally often."""
    n, epochs = 5, 4000
    seen = SampleOrder(n, seed=1)(torch.arange(n * epochs)).reshape(epochs, n)
    counts = torch.stack([torch.bincount(seen[:, place], minlength=n) for place in range(n)])
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3
