import pytest
import torch
from torch.nn import functional as F

from diffusion_adagn.models.blocks import Upsample


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 5, 3, 4), (1, 4, 8, 8)], ids=str)
def test_upsampling_equals_repeat_then_convolution(shape, last):
    torch.manual_seed(0)
    layer = Upsample(shape[1], 6).double()
    h = torch.randn(shape, dtype=torch.double)
    h = h.to(memory_format=torch.channels_last) if last else h
    leaves = [t.detach().clone().requires_grad_() for t in (h, layer.weight, layer.bias)]
    repeated = leaves[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = F.conv2d(repeated, *leaves[1:], padding=1)
    h.requires_grad_()
    found = layer(h)
    assert found.is_contiguous(memory_format=torch.channels_last) or not last
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    dy = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (h, layer.weight, layer.bias), dy), torch.autograd.grad(wanted, leaves, dy)
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_upsampling_uses_plain_convolution(autocast):
    layer, h = Upsample(16, 16), torch.randn(2, 16, 6, 6)
    if not autocast:
        layer, h = layer.bfloat16(), h.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = F.conv2d(F.interpolate(h, scale_factor=2.0), layer.weight, layer.bias, padding=1)
        assert plain.dtype == torch.bfloat16 and torch.equal(layer(h), plain)
