"""SIGKILL at any moment and --resume auto: the run is the one never killed, bit for bit."""

import json
import os

import pytest
from processes import Process
from safetensors.torch import load_file

pytestmark = pytest.mark.serial

SETTINGS = {
    "data.source": "digits",
    "training.max_steps": 14,
    "training.batch_size": 4,
    "speed.precision": "fp32",
    "training.checkpoint_every": 3,
    "training.keep_checkpoints": 2,
    "training.ema_snapshots": 5,  # 14 // 5 = 2 steps apart, and thinned out in the end
    "training.log_every": 1,
    "training.preview_every": 7,
    "training.preview_steps": 2,
    "training.preview_classes": "0,1",
    "training.preview_count": 1,
    "training.diagnostics_every": 9,
    "model.model_channels": 16,
    "model.num_head_channels": 16,
    "model.norm_groups": 4,
    "model.channel_mult": 1,
    "model.num_res_blocks": 1,
}
VARIANTS = {
    "fp32": {},
    "bf16": {"speed.precision": "bf16"},
    "two passes": {"training.gradient_accumulation": 2},
    "dropout": {"model.dropout": 0.3},
    "compiled": {"speed.compile": "true"},  # by torch's own compiler, which keeps what it made for the next run
    "learned variance, decay": {"diffusion.learned_variance": "true", "training.lr_decay": "cosine"},
    "flow": {"diffusion.process": "flow"},
    "edm, learned weight": {"diffusion.process": "edm", "diffusion.loss_weight": "learned"},
}

# One process forks a run at a time. A run is killed from outside after so many seconds, or by itself
# in the middle of its n-th file of weights.
FORKS = """
import json, os, random, signal, sys, time
from diffusion_adagn.cli.main import main
from diffusion_adagn.runs import checkpoint, ema_snapshots
from diffusion_adagn.training import logger

logger.measure_peak_flops = lambda *args, **how: 1e11  # printed only

def run(argv, killed_in_file=None, after=None):
    child = os.fork()
    if not child:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        if killed_in_file is not None:
            real, left = checkpoint.save_file, [killed_in_file]
            def dying(tensors, file, *rest):
                left[0] -= 1
                real(tensors, file, *rest)
                if not left[0]:
                    os.truncate(file, os.path.getsize(file) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            checkpoint.save_file = ema_snapshots.save_file = dying
        os._exit(main(argv))
    until = None if after is None else time.monotonic() + after
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            until = None
        time.sleep(0.01)

work = json.loads(sys.argv[1])
chance, kills = random.Random(work["seed"]), 0
for name in ("warm", "whole"):
    began = time.monotonic()
    assert run(work["argv"] + ["--output_dir", work[name]]) == 0
    length = time.monotonic() - began
for place in work["places"]:
    argv = work["argv"] + ["--output_dir", place, "--resume", "auto"]
    for _ in range(2):  # killed twice
        if chance.random() < 0.7:
            status = run(argv, killed_in_file=chance.randint(1, 20))
        else:
            status = run(argv, after=chance.uniform(0.1, 0.9) * length)
        kills += status == -signal.SIGKILL
    status = run(argv)
    assert status in (0, 1), status  # 1: it was done already
print(kills)
"""


def words(settings):
    return [w for key, value in settings.items() for w in (f"--{key}", str(value))]


def killed_and_resumed(tmp_path, variant, count, seed):
    """How many times it was killed."""
    (tmp_path / "digits.yaml").write_text("data: {source: digits}\n")  # --resume starts a run where there is a config
    argv = ["train", "--config", str(tmp_path / "digits.yaml"), *words(SETTINGS | VARIANTS[variant])]
    places = [str(tmp_path / f"killed{i}") for i in range(count)]
    folders = {name: str(tmp_path / name) for name in ("warm", "whole")}
    work = folders | {"argv": argv, "places": places, "seed": seed}
    done = Process(
        FORKS,
        [json.dumps(work)],
        tmp_path / "log",
        TORCHINDUCTOR_COMPILE_THREADS=1,
        TORCHINDUCTOR_CACHE_DIR=tmp_path / "inductor",
    )
    assert done.wait(1500) == 0, done.printed()[-3000:]
    kills = int(done.printed().split()[-1])
    for place in places:
        assert_same(tmp_path / "whole", tmp_path / os.path.basename(place))
    print(f"killed {kills} times")
    return kills


def assert_same(one, other):
    """Losses and all else that is logged, weights, EMAs and their snapshots, optimizer, previews, pipeline."""

    def logged(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]

    assert logged(one) == logged(other)
    newest = sorted((one / "checkpoints").glob("step-*"))
    assert [c.name for c in newest] == [c.name for c in sorted((other / "checkpoints").glob("step-*"))]
    for checkpoint in newest:
        for name in ("model", "ema", "optimizer", "power_ema"):
            a, b = (load_file(run / "checkpoints" / checkpoint.name / f"{name}.safetensors") for run in (one, other))
            assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a), (checkpoint.name, name)
    for folder in ("previews", "ema"):
        assert sorted(f.name for f in (one / folder).iterdir()) == sorted(f.name for f in (other / folder).iterdir())
        for file in (one / folder).iterdir():
            assert file.read_bytes() == (other / folder / file.name).read_bytes()
    assert not list((other / "checkpoints").glob(".*"))
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


def test_a_handful_of_kills(tmp_path):
    assert killed_and_resumed(tmp_path, "dropout", 2, seed=0) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_many_kills(tmp_path, variant):
    assert killed_and_resumed(tmp_path, variant, 7, seed=1) >= 10
