"""What the tests share. No network, a store of decoded pictures of their own, tiny networks."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where diffusers copies the code of a folder before it runs it
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory):
    """Decoded pictures go to a folder of this test session."""
    os.environ["DIFFUSION_ADAGN_CACHE"] = str(tmp_path_factory.mktemp("store"))


@pytest.fixture
def shared():
    """Folder of real pictures beside the project; tests that use it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"real pictures are not at {SHARED}")
    return SHARED


def tiny_unet(**changes):
    """A small network with nothing left at zero, so that every path shows in its output."""
    import torch

    from diffusion_adagn import AdaGNUNet

    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "num_classes": 3,
        "model_channels": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "num_head_channels": 16,
        "norm_groups": 4,
    }
    torch.manual_seed(0)
    unet = AdaGNUNet(**(settings | changes)).eval()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return unet
