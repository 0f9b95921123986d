"""What tests of malformed files share: limits of time and memory, folders to corrupt, odd values, random corruption."""

import contextlib
import copy
import io
import json
import math
import os
import resource
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
from conftest import tiny_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig, as_config, to_dict, to_yaml
from diffusion_adagn.diffusion.schedule import make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.evaluation.image_set import read_image_set
from diffusion_adagn.interop.export import export_diffusers, open_diffusers
from diffusion_adagn.sampling.load import open_pipeline

MAX_SECONDS, MAX_BYTES = 20, 3 * 2**30


@contextlib.contextmanager
def limited_memory(folder):
    """Limits the additional memory, and works in a new folder, which must stay empty."""
    folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_BYTES, before[1]))
    with contextlib.chdir(folder):
        yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert not list(folder.iterdir())


class Hang(BaseException):
    """Not an Exception, which the code under test may catch."""


def rejection(call, *args) -> str | None:
    """The message of the InputError of a call, or None if it succeeds. Another error or a time-out fails the test."""

    def time_out(*_):
        raise Hang

    # a limit of CPU time, which does not depend on the load; and a ten times larger limit for calls that only wait
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, 1), (signal.ITIMER_REAL, signal.SIGALRM, 10))
    before = [signal.signal(number, time_out) for _, number, _ in timers]
    for timer, _, factor in timers:
        signal.setitimer(timer, factor * MAX_SECONDS)
    try:
        call(*args)
    except InputError as error:
        assert 10 < len(str(error)) < 5000
        return str(error)
    finally:
        for (timer, number, _), handler in zip(timers, before):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
    return None


def write(file: Path, content) -> None:
    """Bytes and text are written as they are, other values as JSON."""
    content = content if isinstance(content, bytes | str) else json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def rejected(file: Path, content, call, *args) -> str | None:
    """The `rejection` of a call while the file has this content."""
    before = file.read_bytes() if file.exists() else None
    write(file, content)
    message = rejection(call, *args)
    file.unlink() if before is None else file.write_bytes(before)
    return message


def change_json(file: Path, **changes) -> None:
    write(file, json.loads(file.read_bytes()) | changes)


# ---------------------------------------------------------------------- folders

LABELS = LabelSpace(("cat", "Dog", "tench, Tinca tinca"), original_ids=(3, 5, 7), wnids=("n1", "n2", "n3"))
INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS, CHECKPOINT = "unet/diffusion_pytorch_model.safetensors", "checkpoints/step-00000009"
MODEL = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,),
         "num_head_channels": 16, "norm_groups": 4}  # fmt: skip
CONFIG = as_config({"output_dir": "runs/x", "labels": LABELS.to_dict(), "data.image_size": 8, "data.channels": 1,
                    "training.max_steps": 9, **{f"model.{name}": value for name, value in MODEL.items()}})  # fmt: skip
from_pipe = ClassConditionalPipeline.from_pretrained
READ = {"pipe": from_pipe, "out": open_diffusers, "run": open_pipeline, "samples": read_image_set}


def spoiled(root: Path, name: str, content, call=None) -> str | None:
    """The `rejection` of the folder in which a file has this content, or these changes of its values."""
    file, folder = root / name, name.partition("/")[0]
    if isinstance(content, dict):
        content = (to_dict(CONFIG) if file.suffix == ".yaml" else json.loads(file.read_bytes())) | content
    return rejected(file, content, call or READ[folder], root / folder)


def make_folders(root: Path) -> Path:
    """Folders pipe (a pipeline), out (its export), run (with a checkpoint), config and samples (by adagn sample)."""
    scheduler = make_scheduler(DiffusionConfig())
    pipe = ClassConditionalPipeline(tiny_unet(), scheduler, LABELS, ema_decay=0.9, trained_steps=7)
    pipe.save_pretrained(root / "pipe")
    export_diffusers(root / "pipe", root / "out")
    (root / "run" / CHECKPOINT).mkdir(parents=True)
    (root / "config").mkdir()
    for folder in ("run", "config"):
        write(root / folder / "config.yaml", to_yaml(CONFIG))
    write(root / "run" / CHECKPOINT / "state.json", {"step": 9, "data_fingerprint": "x", "scaler": None})
    save_file(pipe.unet.state_dict(), root / "run" / CHECKPOINT / "ema.safetensors")
    (root / "samples").mkdir()
    entries = []
    for i in range(3):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(root / f"samples/{i}.png")
        entries.append({"file": f"{i}.png", "class_id": i, "class_name": LABELS.names[i], "seed": i, "guidance": 1.0})
    model = {"source": str(root / "run"), "hash": "abc"}
    write(root / "samples/samples.json", {"model": model, "labels": LABELS.to_dict(), "images": entries})
    return root


# ---------------------------------------------------------------------- files


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def safetensors(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def npy(array, shape=None):
    """The bytes of a .npy file whose header claims a shape."""
    file = io.BytesIO()
    claim = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(file, claim)
    return file.getvalue() + array.tobytes()


def write_npz(file, members, method=zipfile.ZIP_DEFLATED, size=None):
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
            archive.infolist()[0].file_size = size or archive.infolist()[0].file_size


# ---------------------------------------------------------------------- odd values and random corruption

ODD_VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**6, 10**12, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308, math.nan, math.inf,
    -math.inf, "", "null", "true", "nan", "1e400", "9" * 5000, "\0", "../../../etc/passwd", "/dev/zero", "\ud800",
    "\x1b[2J", "x" * 3000, "a,b", [], {}, [1], [[]], ["a", "a"], {"a": 1}, [0.0] * 1000, [1] * 20, [math.nan] * 1000,
    "[" * 3000,
]  # fmt: skip
DEEP_LIST = "[" * 1500 + "]" * 1500  # deeper than the recursion limit; YAML needs quadratic time
TEXTS = st.text(max_size=20)
VALUES = st.one_of(st.sampled_from(ODD_VALUES).map(copy.deepcopy), st.text(max_size=12), st.integers(), st.floats(),
                   st.lists(st.integers(-3, 99), max_size=4))  # fmt: skip
WORDS = st.one_of(st.sampled_from([str(v) for v in ODD_VALUES]), TEXTS, st.integers().map(str), st.floats().map(str))


def tree_paths(tree, path=()):
    paths = [path] if path else []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        paths += tree_paths(value, (*path, key))
    return paths


@st.composite
def corrupted_tree(draw, tree):
    """The tree with a few entries removed, replaced, repeated or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(tree_paths(tree) or [("new",)]))
        parent = tree
        for key in parents:
            parent = parent[key]
        action = draw(st.sampled_from(("replace", "replace", "drop", "double", "retype", "add")))
        if action == "drop":
            del parent[last]
        elif action == "double" and isinstance(parent, list):
            parent.insert(last, parent[last])
        elif action == "retype":
            old = parent[last]
            parent[last] = draw(st.sampled_from((str(old), [old], {"x": old}, repr(old), not old)))
        elif action == "add" and isinstance(parent, dict):
            key = draw(st.sampled_from(("auto_map", "quantization_config", "_class_name", "a.b", "", "<<")))
            parent[key] = draw(VALUES)
        else:
            parent[last] = draw(VALUES)
        if not isinstance(tree, dict) or not tree:
            break
    return tree


@st.composite
def corrupted_contents(draw, tree):
    """The contents of a corrupted file of this tree."""
    fault = draw(st.sampled_from(("tree",) * 6 + ("cut", "flipped", "twice", "deep", "random", "text")))
    text = json.dumps(draw(corrupted_tree(tree)) if fault == "tree" else tree).encode()
    position = draw(st.integers(0, len(text)))
    if fault == "cut":
        return text[:position]
    if fault == "flipped":
        return text[:position] + bytes([draw(st.integers(0, 255))]) + text[position + 1 :]
    if fault == "twice":
        return text[:position] + text[draw(st.integers(0, position)) :]
    if fault == "deep":
        return text.replace(b"null", DEEP_LIST.encode()) if b"null" in text else DEEP_LIST.encode()
    if fault == "random":
        return draw(st.binary(max_size=60))
    return draw(st.text(max_size=60)).encode("utf-8", "surrogatepass") if fault == "text" else text


@st.composite
def corrupted_bytes(draw, whole, header):
    """The bytes cut, or a few of the first ones, the header's, changed."""
    if draw(st.booleans()):
        return whole[: draw(st.integers(0, len(whole)))]
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        offset, new = draw(st.integers(0, header)), draw(st.binary(min_size=1, max_size=3))
        content[offset : offset + len(new)] = new
    return bytes(content)


def fuzz(strategy, check, examples):
    """check(value) returns or raises InputError for each of the examples of the strategy."""
    limits = {"max_examples": examples, "deadline": None, "database": None, "derandomize": True}

    @settings(**limits, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def test(value):
        rejection(check, value)

    test()
