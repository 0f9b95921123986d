"""A member's network is collected before the next one is created: accelerate leaves it in a reference cycle."""

from types import SimpleNamespace

import pytest

from diffusion_adagn.experiments import ablation


def test_members_are_garbage_collected(tmp_path, monkeypatch):
    done = []

    def measure(member, *_):
        done.append("measure")
        if member.conditioning == "last":
            raise InterruptedError

    monkeypatch.setattr(ablation, "_train", lambda *_: done.append("train"))
    monkeypatch.setattr(ablation, "_measure", measure)
    monkeypatch.setattr(ablation.gc, "collect", lambda: done.append("collect"))
    members = [SimpleNamespace(conditioning=name, seed=0, result=None) for name in ("first", "last")]
    with pytest.raises(InterruptedError):
        ablation._run(None, members, None, {"first": None, "last": None}, tmp_path, None, "")
    assert done == ["train", "collect", "measure", "collect", "train", "collect", "measure"]
