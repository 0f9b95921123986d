import itertools
import math
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, LabelSpace
from diffusion_adagn.config import DiffusionConfig
from diffusion_adagn.diffusion.schedule import make_process, make_scheduler
from diffusion_adagn.errors import InputError
from diffusion_adagn.models.conditioning import CONDITIONING
from diffusion_adagn.sampling.class_mix import ClassInterpolation, ClassMix, ClassPlan, modulation_table

LABELS = LabelSpace(("cat", "dog", "tench, Tinca tinca"))
CAT, DOG, NULL = 0, 1, 3
SETTINGS = {"ddpm": {}, "edm": {"sigma_data": 0.5}, "flow": {}}
PROCESSES = [make_process(DiffusionConfig(process=name, **settings)) for name, settings in SETTINGS.items()]
CLASS_CONDITIONED = [k for k, kind in CONDITIONING.items() if kind.class_input is not None]


@pytest.fixture(scope="module")
def pipes():
    """A pipeline of each kind. It predicts v, and calmly: rounding stays within 1e-5 from step to step."""
    made = {}

    def pipe(kind="adagn"):
        if kind not in made:
            scheduler = make_scheduler(DiffusionConfig(prediction="v"))
            unet = tiny_unet(conditioning=kind)
            unet.conv_out.weight.data *= 0.3
            made[kind] = ClassConditionalPipeline(unet, scheduler, LABELS)
            made[kind].set_progress_bar_config(disable=True)
        return made[kind]

    return pipe


@pytest.fixture(scope="module")
def deep():
    """The sites of a network of four levels, whose blocks resample."""
    return tiny_unet(sample_size=32, channel_mult=(1, 1, 2, 2), resblock_updown=True, modulate_both_norms=True).sites()


def sample(pipe, classes=None, **kw):
    return pipe(classes, **({"num_inference_steps": 5, "seeds": [0, 1], "output_type": "np"} | kw)).images


@torch.no_grad()
def by_hand(pipe, at_step, steps=5, scale=1.0, seeds=(0, 1)):
    """DDIM without noise, written out. tell: t -> a modulation of one row."""
    bars = pipe.scheduler.alphas_cumprod
    x = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    for t in range(1000 - 1000 // steps, -1, -(1000 // steps)):
        v = pipe.unet.denoise(x, at_step(t))
        if scale != 1:
            null = pipe.unet.denoise(x, pipe.unet.modulation(t, torch.tensor([NULL])))
            v = null + scale * (v - null)
        bar = bars[t]
        before = bars[t - 1000 // steps] if t else torch.tensor(1.0)
        x0 = (bar.sqrt() * x - (1 - bar).sqrt() * v).clamp(-1, 1)
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def close(a, b):
    return np.abs(a - b).max() <= 1e-5


def same(a, b):
    return a.keys() == b.keys() and all(type(a[n]) is type(b[n]) and all(map(torch.equal, a[n], b[n])) for n in a)


# ---------------------------------------------------------------------- what sites receive


@pytest.mark.parametrize("kind", CONDITIONING)
def test_same_class_everywhere_is_plain(pipes, kind):
    pipe = pipes(kind)
    mix = pipe.mix("cat@coarse,cat@fine")
    for t in (0, 600, 999):
        assert same(mix.modulation(pipe.unet, t), pipe.unet.modulation(t, torch.tensor([CAT])))
    assert close(sample(pipe, class_plan=mix), sample(pipe, "cat"))


@pytest.mark.parametrize("kind", CONDITIONING)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_resolution_mix_joins_two_modulations(pipes, kind, scale):
    pipe = pipes(kind)

    def joined(t):
        cat, dog = (pipe.unet.modulation(t, torch.tensor([c])) for c in (CAT, DOG))
        return {s.name: (cat if s.resolution == 4 else dog)[s.name] for s in pipe.unet.sites()}

    mixed = sample(pipe, class_plan="cat@coarse,dog@8x8", guidance_scale=scale)
    assert close(mixed, by_hand(pipe, joined, scale=scale))
    if kind in CLASS_CONDITIONED:
        for plain in ("cat", "dog"):
            assert np.abs(mixed - sample(pipe, plain, guidance_scale=scale)).max() > 1e-3


@pytest.mark.parametrize("kind", CONDITIONING)
def test_timestep_mix_switches_the_class(pipes, kind):
    pipe = pipes(kind)
    mixed = sample(pipe, class_plan="cat@t>600,dog@t<=600")
    assert close(mixed, by_hand(pipe, lambda t: pipe.unet.modulation(t, torch.tensor([CAT if t > 600 else DOG]))))
    if kind in CLASS_CONDITIONED:
        other = sample(pipe, class_plan="cat@t>=600,dog@t<600")  # 600 is one of the five steps
        assert np.abs(mixed - other).max() > 1e-3


@pytest.mark.parametrize("kind", CLASS_CONDITIONED)
def test_between_two_classes(pipes, kind):
    pipe = pipes(kind)
    unet = pipe.unet
    for share, label in ((0, CAT), (1, DOG)):
        end = ClassInterpolation.parse("cat,dog", LABELS, share)
        assert same(end.modulation(unet, 300), unet.modulation(300, torch.tensor([label])))
        assert (end.name, end.class_id) == (LABELS.name(label), label)
    quarter = ClassInterpolation.parse("cat,dog", LABELS, 0.25)
    assert (quarter.name, quarter.class_id) == ("cat 0.75 dog 0.25", None)
    weights = torch.tensor([[0.75, 0.25, 0.0]])
    assert close(sample(pipe, class_plan=quarter), by_hand(pipe, lambda t: unet.modulation(t, weights)))
    ends = [ClassInterpolation.parse("cat,dog", LABELS, share) for share in (0, 0.25, 1)]
    images = sample(pipe, class_plan=ends, seeds=[0] * 3, num_inference_steps=2)
    assert np.abs(images[0] - images[1]).max() > 1e-4
    assert np.array_equal(
        sample(pipe, class_plan=ends[::2], num_inference_steps=2), sample(pipe, "cat,dog", num_inference_steps=2)
    )


def test_interpolation_needs_class_vectors(pipes):
    with pytest.raises(InputError, match="conditioning none ignores the class"):
        sample(pipes("none"), class_plan=ClassInterpolation.parse("cat,dog", LABELS, 0.5))
    unconditional = ClassConditionalPipeline(tiny_unet(num_classes=None), make_scheduler(DiffusionConfig()), None)
    with pytest.raises(InputError, match="network without classes"):
        sample(unconditional, class_plan="null@coarse,null@fine")
    with pytest.raises(InputError, match="unconditional"):
        ClassInterpolation.parse("cat,dog", unconditional.labels, 0.5)
    with pytest.raises(InputError, match="it has no classes"):
        ClassInterpolation(0, 1, 0.5, ("a", "b")).modulation(unconditional.unet, 3)


@pytest.mark.parametrize(
    ("text", "share", "message"),
    [
        ("cat", 0.5, "two different"),
        ("cat,0", 0.5, "two different"),
        ("all", 0.5, "two diff"),
        ("cat,dog", 1.5, "share"),
    ],
)
def test_interpolation_needs_two_classes(text, share, message):
    with pytest.raises(InputError, match=message):
        ClassInterpolation.parse(text, LABELS, share)


# ---------------------------------------------------------------------- the pipeline


def test_batch_images_have_own_plans(pipes):
    pipe = pipes()
    plans = ["cat", "cat@8,dog@4", "null", ClassInterpolation.parse("cat,dog", LABELS, 0.5), "dog@up,2", "cat@8,dog@4"]
    scales = [1.0, 2.0, 3.0, 0.5, 1.0, 4.0]
    out = pipe(class_plan=plans, guidance_scale=scales, seeds=7, num_inference_steps=5, output_type="np")
    assert out.class_ids == [CAT, None, NULL, None, None, None]
    assert out.class_names == ["cat", "cat@8,dog@4", "null", "cat 0.5 dog 0.5", "dog@up,2", "cat@8,dog@4"]
    assert out.seeds == list(range(7, 13))
    for i, (plan, scale) in enumerate(zip(plans, scales)):
        assert close(sample(pipe, class_plan=plan, guidance_scale=scale, seeds=[7 + i])[0], out.images[i])
    assert len({image.tobytes() for image in out.images}) == len(plans)


def test_plain_classes_use_the_table(pipes):
    pipe = pipes()
    for scale in (1.0, [1.0, 3.0]):
        plans = sample(pipe, class_plan=["cat", "tench, Tinca tinca"], guidance_scale=scale)
        assert np.array_equal(plans, sample(pipe, ["cat", 2], guidance_scale=scale))
    out = pipe(["cat", "null"], seeds=0, num_inference_steps=2)
    assert (out.class_ids, out.class_names) == ([CAT, NULL], ["cat", "null"])


def test_null_pass_receives_null(pipes, monkeypatch):
    pipe = pipes()
    handed = []
    real = pipe.unet.denoise
    monkeypatch.setattr(pipe.unet, "denoise", lambda x, m: handed.append(m) or real(x, m))
    sample(pipe, class_plan="cat@coarse,dog@fine", guidance_scale=1.0)
    assert [len(m["middle.0.block.norm2"].gamma) for m in handed] == [2] * 5
    handed.clear()
    sample(pipe, class_plan="cat@coarse,dog@fine", guidance_scale=[1.0, 2.0])
    assert len(handed) == 5
    for t, m in zip((800, 600, 400, 200, 0), handed):
        null = pipe.unet.modulation(t, torch.tensor([NULL]))
        for name, (gamma, beta) in m.items():
            assert torch.equal(gamma[2:], null[name].gamma.expand(2, -1))
            assert torch.equal(beta[2:], null[name].beta.expand(2, -1))
            assert not torch.equal(gamma[:2], gamma[2:])


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "euler", "heun"])
def test_other_samplers_take_mixes(pipes, sampler):
    pipe = pipes()
    pipe = ClassConditionalPipeline(pipe.unet, pipe.scheduler, LABELS).use_sampler(sampler)
    pipe.set_progress_bar_config(disable=True)
    both = sample(pipe, class_plan="cat@coarse&t>500,dog", seeds=[3, 4], guidance_scale=2.0)
    assert close(sample(pipe, class_plan="cat@coarse&t>500,dog", seeds=[4], guidance_scale=2.0)[0], both[1])


def test_a_plan_of_your_own(pipes):
    class Louder:
        name, class_id = "cat twice", None

        def modulation(self, unet, t):
            m = unet.modulation(t, torch.tensor([CAT]))
            return {n: type(plans)(plans.gamma * 2, plans.beta) for n, plans in m.items()}

    pipe = pipes()
    assert isinstance(Louder(), ClassPlan)
    assert close(sample(pipe, class_plan=Louder()), by_hand(pipe, lambda t: Louder().modulation(pipe.unet, t)))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"classes": "cat", "class_plan": "dog"}, "classes and class_plan"),
        ({"class_plan": 3}, r"ClassPlan or several, not \[3\]"),
        ({"class_plan": ["cat", 3]}, r"ClassPlan or several, not \['cat', 3\]"),
        ({"class_plan": []}, "2 seeds for 0 images"),
        ({"class_plan": ["cat", "dog", "null"]}, "2 seeds for 3 images"),
    ],
)
def test_impossible_plans_are_rejected(pipes, kw, message):
    with pytest.raises(InputError, match=message):
        sample(pipes(), **kw)


def test_a_mix_of_another_network(pipes):
    with pytest.raises(InputError, match=r"another network: it has no rule for down\.0\.stages\.1"):
        pipes().mix("cat@coarse,dog@fine").modulation(tiny_unet(num_res_blocks=2), 0)


# ---------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("coarse", lambda s: s.resolution in (4, 8)),  # sqrt(4 * 32) = 11.3
        ("fine", lambda s: s.resolution in (16, 32)),
        ("8", lambda s: s.resolution == 8),
        ("8x8", lambda s: s.resolution == 8),
        ("=8", lambda s: s.resolution == 8),
        ("<=8", lambda s: s.resolution <= 8),
        ("<8x8", lambda s: s.resolution < 8),
        ("> 8", lambda s: s.resolution > 8),
        (">=16", lambda s: s.resolution >= 16),
        ("depth<10", lambda s: s.depth < 10),
        ("depth >= 10", lambda s: s.depth >= 10),
        ("depth=3", lambda s: s.depth == 3),
        ("down", lambda s: s.name.startswith("down.")),
        ("middle", lambda s: s.name.startswith("middle.")),
        ("up", lambda s: s.name.startswith("up.")),
        ("up.*.stages.0*", lambda s: fnmatch(s.name, "up.?.stages.0.*")),
        ("*norm1", lambda s: s.name.endswith("norm1")),
        ("down.[01].*", lambda s: s.name[:6] in ("down.0", "down.1")),
        ("middle.0.block.norm2", lambda s: s.name == "middle.0.block.norm2"),
        ("up&coarse", lambda s: s.name.startswith("up.") and s.resolution <= 8),
        ("depth>2&depth<5 & down", lambda s: s.depth in (3, 4)),
    ],
)
def test_place_words_match_their_sites(deep, where, holds):
    expected = tuple(s.name for s in deep if holds(s))
    assert 0 < len(expected) < len(deep)
    base, part = ClassMix.parse(f"dog,cat@{where}", LABELS, deep).parts
    assert (base.class_id, base.sites, base.times) == (DOG, None, ())
    assert (part.class_id, part.sites, part.times) == (CAT, expected, ())


def test_coarse_ends_at_geometric_middle():
    for mult, coarse in (((1, 1), {4}), ((1, 1, 1), {2, 4}), ((1, 1, 1, 1), {1, 2})):
        sites = tiny_unet(channel_mult=mult, norm_groups=4, attention_resolutions=()).sites()
        plans = ClassMix.parse("cat@coarse,dog@fine", LABELS, sites).class_by_site(0, [s.name for s in sites])
        assert {s.resolution for s in sites if plans[s.name] == CAT} == coarse
        sides = [s.resolution for s in sites]
        assert max(coarse) <= math.sqrt(min(sides) * max(sides)) < min(set(sides) - coarse)


def test_later_rules_override_earlier_ones(deep):
    names = [s.name for s in deep]
    for text in ("cat,dog@middle,2@middle.0*", "dog@middle,2@middle.0*,cat", "dog@middle,cat,2@middle.0*"):
        plans = ClassMix.parse(text, LABELS, deep).class_by_site(5, names)
        assert {n: c for n, c in plans.items() if c != CAT} == {
            n: 2 if n.startswith("middle.0") else DOG for n in names if n.startswith("middle")
        }
    assert set(ClassMix.parse("2@middle.0*,dog@middle,cat", LABELS, deep).class_by_site(5, names).values()) == {
        CAT,
        DOG,
    }


def test_place_and_time_together(deep):
    names = [s.name for s in deep]
    mix = ClassMix.parse("dog,cat@coarse&t>600", LABELS, deep)
    assert set(mix.class_by_site(600, names).values()) == {DOG}
    late = mix.class_by_site(600.5, names)
    assert {s.name for s in deep if late[s.name] == CAT} == {s.name for s in deep if s.resolution <= 8}


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_noise_level_rules_of_each_process(deep, process):
    mix = ClassMix.parse("dog,cat@sigma>2", LABELS, deep, process)
    names = [s.name for s in deep]
    for sigma, expected in ((0.05, DOG), (1.99, DOG), (2.01, CAT), (50.0, CAT)):
        assert set(mix.class_by_site(process.time_of(sigma), names).values()) == {expected}, sigma
    ClassMix.parse("cat@sigma>0.5,dog@sigma<=0.5", LABELS, deep, process)  # all are covered
    first, last = (ClassMix.parse(f"dog,cat@{rule}", LABELS, deep, process) for rule in ("sigma>0.0001", "sigma<1"))
    assert set(first.class_by_site(process.times[0], names).values()) == {CAT}
    assert set(last.class_by_site(process.times[1], names).values()) == {DOG}
    for text, message in (
        ("cat@sigma>2,dog@sigma<2", r"no rule covers .* at (t|sigma) = "),
        ("cat@sigma<0.0001,dog", "matches no noise level: sigma is from 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            ClassMix.parse(text, LABELS, deep, process)
    if process.name == "edm":
        with pytest.raises(InputError, match="no timesteps; write a noise level, such as sigma>2"):
            ClassMix.parse("dog,cat@t>600", LABELS, deep, process)
        with pytest.raises(InputError, match="at sigma = 2 "):
            ClassMix.parse("cat@sigma>2,dog@sigma<2", LABELS, deep, process)


@pytest.mark.parametrize("process", PROCESSES[1:], ids=lambda p: p.name)
def test_noise_level_mix_is_sampled(process):
    scheduler = make_scheduler(DiffusionConfig(process=process.name, **SETTINGS[process.name]))
    pipe = ClassConditionalPipeline(tiny_unet(), scheduler, LABELS)
    pipe.set_progress_bar_config(disable=True)
    middle = {"edm": 0.0, "flow": 500.0}[process.name]  # the time at sigma = 1

    class ByHand:
        name, class_id = "by hand", None

        def modulation(self, unet, t):
            return unet.modulation(t, torch.tensor([DOG if t > middle else CAT]))

    settings = {"seeds": [0], "num_inference_steps": 4, "output_type": "np"}
    mixed = pipe(class_plan="cat,dog@sigma>1", **settings).images
    assert np.array_equal(mixed, pipe(class_plan=ByHand(), **settings).images)
    assert np.abs(mixed - pipe("cat", **settings).images).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("tench, Tinca tinca@coarse,dog@fine", [2, 1]),
        ("tench,Tinca tinca @ coarse , dog@ fine,", [2, 1]),
        ("Tinca tinca,dog@fine", [2, 1]),  # a base, then a part
        ("id:0@coarse,name:dog@fine", [0, 1]),
        ("null@coarse,4@fine", [5, 4]),
        ("you@home@coarse,a, b@c@fine", [3, 4]),
        ("you@home,dog@fine", [3, 1]),
    ],
)
def test_names_may_contain_commas_and_ats(deep, text, classes):
    labels = LabelSpace((*LABELS.names, "you@home", "a, b@c"))
    assert [p.class_id for p in ClassMix.parse(text, labels, deep).parts] == classes


def test_single_rule_is_a_class(deep):
    mix = ClassMix.parse(" tinca tinca", LABELS, deep)
    assert (mix.name, mix.class_id) == ("tench, Tinca tinca", 2)
    assert ClassMix.parse("cat@depth>=0", LABELS, deep).class_id is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no class was given"),
        ("catt@coarse,dog@fine", "no class 'catt'.*'cat'"),
        ("cat@coarse,dgo", "no class 'dgo'.*'dog'"),
        ("@coarse,dog", "no class was given"),
        ("all@coarse,dog", "'all@coarse' names 3 classes"),
        ("cat@,dog", "'' is not a place in the network"),
        ("cat@corse,dog", "'corse' is not a place in the network. Expected coarse, fine"),
        ("cat@8x4,dog", "'8x4' is not a place in the network"),
        ("cat@depth10,dog", "'depth10' is not a place in the network"),
        ("cat@t=6x6,dog", "'t=6x6' is not a place in the network"),
        ("cat@up.0,dog", "'up.0' is not a place in the network"),
        ("cat@t,dog", "'t' is not a place in the network"),
        ("cat@64,dog", "'64' matches no site. There are .* 4x4, 8x8, 16x16, 32x32 and depth 0.."),
        ("cat@coarse&fine,dog", "matches no site"),
        ("cat@side.*,dog", "matches no site.*named like down.0"),
        ("cat@t>2000,dog", "matches no noise level: sigma is from 0.01 to 157, t from 0 to 999"),
        ("cat@t>5&t<5,dog", "matches no noise level"),
        ("cat,dog", "both apply everywhere"),
        ("cat@coarse", r"no rule covers \d+ of \d+ sites \(down.0.*, \.\.\.\): add a rule"),
        ("cat@t>600,dog@t<600", "sites at t = 600 "),
        ("cat@t>=601,dog@t<=600", "sites at t = 600.5 "),
        ("cat@t>600&coarse,dog@fine", "sites at t = 0 "),
        ("cat@t<999", "sites at t = 999 "),
    ],
)
def test_mix_errors_name_the_fault(deep, text, message):
    with pytest.raises(InputError, match=f"the mix '.*{message}"):
        ClassMix.parse(text, LABELS, deep)


@pytest.mark.parametrize("text", ["cat@t<1000", "cat@t>=0", "cat@t<=999", "cat@t>600,dog@t<=600", "cat@t<9,dog@t>=9"])
def test_timestep_rules_may_cover_all(deep, text):
    ClassMix.parse(text, LABELS, deep)


def test_description_names_the_sites(pipes):
    sites = pipes().unet.sites()
    mix = pipes().mix("cat@coarse,dog@fine")
    first, second = mix.to_dict()
    assert [first["part"], first["class_id"]] == ["cat@coarse", CAT]
    assert first["sites"] == [s.name for s in sites if s.resolution == 4]
    assert sorted(itertools.chain(first["sites"], second["sites"])) == sorted(s.name for s in sites)
    coarse, fine = mix.describe(sites).splitlines()
    assert f"cat@coarse: {len(first['sites'])} of {len(sites)} sites, at 4x4" in coarse
    assert "at 8x8: down.0.stages.0.block.norm2 ... up.1.stages.1.block.norm2" in fine


def test_cached_modulation_is_bounded(pipes):
    pipe = pipes("cross_attention")
    unet, plans = pipe.unet, [ClassMix.single(c, LABELS) for c in range(3)]
    sizes = []
    for timesteps in (torch.arange(40.0), torch.arange(400.0)):
        made = []
        projected = unet.project_condition
        unet.project_condition = lambda *a, p=projected, m=made, **k: m.append(p(*a, **k)) or m[-1]
        try:
            modulation_table(unet, plans, timesteps, max_bytes=2**18)(0)
        finally:
            del unet.project_condition
        sizes.append(sum(t.numel() * 4 for t in made[0] if t is not None))
    assert 2**16 < sizes[1] <= 2**18 and sizes[0] <= 2**18
