"""A member's network is collected before the next one is made: accelerate leaves it in a cycle."""

from types import SimpleNamespace

import pytest

from diffusion_adagn.experiments import ablation


def test_garbage_is_collected_between_members(tmp_path, monkeypatch):
    done = []

    def measure(member, *_):
        done.append("measure")
        if member.kind == "last":
            raise InterruptedError

    monkeypatch.setattr(ablation, "_train", lambda *_: done.append("train"))
    monkeypatch.setattr(ablation, "_measure", measure)
    monkeypatch.setattr(ablation.gc, "collect", lambda: done.append("collect"))
    members = [SimpleNamespace(kind=kind, seed=0, result=None) for kind in ("first", "last")]
    with pytest.raises(InterruptedError):
        ablation._run(None, members, None, {"first": None, "last": None}, tmp_path, None, "")
    assert done == ["train", "collect", "measure", "collect", "train", "collect", "measure"]
