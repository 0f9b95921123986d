"""What the tests share. No network, a store of decoded images of their own, tiny networks."""

import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the processes that tests start inherit it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where diffusers copies the code of a folder before it runs it
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from filelock import FileLock

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
gc.disable()  # until everything is imported: see pytest_collection_finish

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_finish(session):
    """What the tests need not repeat.

    A garbage collection takes 0.4 s with the objects of all imported modules, and some tests ask for twenty: `freeze`
    exempts those. Each of a hundred tiny runs would measure for 0.2 s what this machine's matrix products reach.
    """
    gc.freeze()
    gc.enable()
    if loop := sys.modules.get("diffusion_adagn.training.logger"):
        loop.measure_peak_flops = functools.cache(loop.measure_peak_flops)


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory):
    """A folder of this test session, the same one in all of its processes."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # each worker has a folder in that of the session
    folder = base / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(common_folder, _own_store):
    """made_once(name, make): the folder `name`, which make(folder) filled in the first process that asked for it."""

    def made(name, make):
        folder, complete = common_folder / name, common_folder / f"{name}.complete"
        with FileLock(common_folder / f"{name}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a make() that failed in another process
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return made


@pytest.fixture(autouse=True)
def _quick_charts(request, monkeypatch):
    """Charts without room for their text, but in the tests of the renderer: that takes half the time of a report."""
    if "/render/" not in str(request.path):
        monkeypatch.setattr("diffusion_adagn.render.figures.lay_out", lambda figure: figure.set_layout_engine("none"))


@pytest.fixture(scope="session", autouse=True)
def _own_store(common_folder):
    """Decoded images and trained classifiers go to a folder of this test session; torch has one thread."""
    import torch

    torch.set_num_threads(1)
    os.environ["DIFFUSION_ADAGN_CACHE"] = str(common_folder / "store")


@pytest.fixture(scope="session")
def digits_classifier(made_once):
    """The judge of the digits' train part, and whether training it moved torch's random state."""
    import torch

    from diffusion_adagn import open_dataset
    from diffusion_adagn.config import DataConfig
    from diffusion_adagn.evaluation.extractors import open_extractor

    def opened():
        return open_extractor("judge", open_dataset(DataConfig(), "train"), progress=False)

    def train(folder):
        before = torch.get_rng_state()
        opened()
        if not torch.equal(before, torch.get_rng_state()):
            (folder / "moved").touch()

    moved = (made_once("digits judge", train) / "moved").exists()
    return opened(), moved


@pytest.fixture
def step_time(monkeypatch):
    """step_time(seconds): a dry run takes this for the time of a step, and measures none."""

    def pretend(seconds):
        monkeypatch.setattr("diffusion_adagn.training.dry_run.seconds_per_step", lambda *args: (seconds, args[-1]))

    pretend(0.5)
    return pretend


@pytest.fixture
def shared():
    """Folder of real images beside the project; tests that use it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"real images are not at {SHARED}")
    return SHARED


def one_line(text):
    """Text with each run of white space as one space: where a printed message is broken depends on the paths in it."""
    return " ".join(text.split())


class TooMuchWork(BaseException):
    """Not an Exception, which would be caught on the way."""


def within_calls(most, function, *args):
    """function(*args), ended by TooMuchWork after `most` calls of functions: a limit that knows no busy machine."""
    count, before = 0, sys.getprofile()

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")
        if count > most:
            raise TooMuchWork(f"more than {most:,} calls")

    sys.setprofile(profile)
    try:
        return function(*args)
    finally:
        sys.setprofile(before)


def run_command(module, argv):
    """Runs a module of cli/ with these words; its exit status. Errors are raised."""
    return module.run(module.parser().parse(argv)) or 0


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


def new_class(unet, depth, name="pug", seed=0, rank=2):
    """A learned class of random numbers."""
    import torch

    from diffusion_adagn.models.learned import LearnedClass, LowRank

    random = torch.Generator().manual_seed(seed)
    rows = 1 if depth == "vector" else len(unet.sites())
    layers = {}
    for path, layer in unet.changeable_layers().items() if depth == "layers" else ():
        outputs, *inputs = layer.weight.shape
        down = torch.randn(rank, *inputs, generator=random) * 0.1
        layers[path] = LowRank(down, torch.randn(outputs, rank, generator=random) * 0.1)
    return LearnedClass(name, torch.randn(rows, unet.embedding.class_dim, generator=random), layers)
