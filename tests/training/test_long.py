"""20,000 steps of a tiny network: memory, file handles and step time stay as they were."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_killed import SETTINGS, words


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_nothing_grows(tmp_path):
    more = {"training.max_steps": 20_000, "training.checkpoint_every": 500, "training.preview_every": 2000}
    more |= {"training.diagnostics_every": 1000, "training.log_every": 20}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words(SETTINGS | more), "--output_dir", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seen = []  # step, RSS in MB, file handles, seconds
    metrics = tmp_path / "run" / "metrics.jsonl"
    began = time.monotonic()
    while process.poll() is None:
        time.sleep(1)
        try:
            step = json.loads(metrics.read_text().splitlines()[-1])["step"]
            status = Path(f"/proc/{process.pid}/status").read_text()
            handles = len(os.listdir(f"/proc/{process.pid}/fd"))
        except (OSError, IndexError, ValueError):
            continue
        rss = next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), None)
        if rss is None:  # it has just ended
            break
        seen.append((step, rss, handles, time.monotonic() - began))
    assert process.wait() == 0
    step, rss, handles, seconds = np.array([s for s in seen if s[0] >= 4000]).T
    slope = np.polyfit(step / 1000, rss, 1)[0]
    half = len(step) // 2
    pace = [np.polyfit(step[part], seconds[part], 1)[0] for part in (slice(None, half), slice(half, None))]
    print(
        f"{slope:.3f} MB per 1,000 steps, {handles.min():.0f}-{handles.max():.0f} handles, {pace[0] * 1e3:.1f} and {pace[1] * 1e3:.1f} ms a step"
    )
    assert slope < 1
    assert np.median(handles[half:]) <= np.median(handles[:half]) + 1
    assert pace[1] < 2 * pace[0]  # of one run on a shared machine
