"""The loss of a network that reads the guidance scale, against slow references."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_unet

from diffusion_adagn import ClassConditionalPipeline, InputError, LabelSpace
from diffusion_adagn.config import DataConfig, DiffusionConfig, read_config
from diffusion_adagn.data import open_dataset
from diffusion_adagn.data.rng import uniform
from diffusion_adagn.diffusion.loss import DiffusionLoss
from diffusion_adagn.diffusion.schedule import make_process, make_scheduler
from diffusion_adagn.runtime.speed import compile_blocks
from diffusion_adagn.sampling.rules import RULES, Rule
from diffusion_adagn.training import teacher as teacher_module
from diffusion_adagn.training.loader import Batch, BatchLoader
from diffusion_adagn.training.objective import Objective
from diffusion_adagn.training.teacher import Teacher, open_teacher

LABELS = LabelSpace(("a", "b", "c"))
PROCESSES = {
    "ddpm": DiffusionConfig(schedule="cosine"),
    "v": DiffusionConfig(schedule="cosine", prediction="v"),
    "edm": DiffusionConfig(process="edm", sigma_data=0.5),
    "flow": DiffusionConfig(process="flow"),
}


def batch_of(process, count=6):
    generator = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, count, 1, 8, 8, generator=generator).unbind()
    u = torch.linspace(0.05, 0.95, count, dtype=torch.float64)
    level, quantile = process.draw(u, cell=0.01)
    labels, scales = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1.0, 1.5, 4.0, 1.0, 2.0, 3.0])  # 3: null
    return Batch(x0.clamp(-1, 1), noise, level.to("cpu"), quantile, labels, torch.arange(count), scale=scales)


@pytest.mark.parametrize("name", PROCESSES)
def test_loss_without_a_teacher_is_the_formula(name):
    process = make_process(PROCESSES[name])
    unet, batch = tiny_unet(max_guidance_scale=4.0), batch_of(process)
    losses = Objective(DiffusionLoss(process), unet)(unet, batch)
    x, target = (
        process.add_noise(batch.x0, batch.noise, batch.level),
        process.target(batch.x0, batch.noise, batch.level),
    )
    for i, scale in enumerate(batch.scale.tolist()):
        one, t, beta = x[i : i + 1], batch.level.time[i : i + 1], 1 / scale
        cond = unet(one, t, batch.labels[i : i + 1], guidance_scale=scale).sample.double()
        null = unet(one, t, torch.tensor([3])).sample.double()
        wanted = (beta * cond + (1 - beta) * null - target[i].double()).square().mean()
        assert losses[i].item() == pytest.approx(wanted.item(), rel=1e-4)
    plain = copy.copy(batch)
    plain.scale = None
    rows = batch.scale == 1  # among them the null label: the plain loss, to the bit
    assert torch.equal(losses[rows], Objective(DiffusionLoss(process), unet)(unet, plain)[rows])


def test_null_pass_has_no_gradient_and_no_dropout():
    process = make_process(PROCESSES["ddpm"])
    unet, batch = tiny_unet(max_guidance_scale=4.0, dropout=0.5).train(), batch_of(process)
    objective = Objective(DiffusionLoss(process), unet)
    x = process.add_noise(batch.x0, batch.noise, batch.level)
    share, target = (1 / batch.scale)[:, None, None, None], process.target(batch.x0, batch.noise, batch.level)
    null = unet.eval()(x, batch.level.time, torch.full((6,), 3)).sample.detach()
    unet.train()
    torch.manual_seed(1)
    losses = objective(unet, batch)
    assert unet.training
    torch.manual_seed(1)
    output = unet(x, batch.level.time, batch.labels, guidance_scale=batch.scale).sample
    wanted = (share * output + (1 - share) * null - target).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value.mean(), unet.projection.weight)[0] for value in (losses, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def pipeline(diffusion, **changes):
    torch.manual_seed(7)
    unet = tiny_unet(learned_variance=diffusion.learned_variance, **changes)
    labels = LabelSpace(LABELS.names, has_null=unet.config.null_class)
    return ClassConditionalPipeline(
        unet, make_scheduler(diffusion, learned_variance=diffusion.learned_variance), labels
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("rule", ["cfg", *RULES])
def test_loss_with_a_teacher_is_the_distance_to_what_it_samples(name, rule):
    """The reference is the guided prediction of the teacher's own sampling, one image and level at a time."""
    diffusion = PROCESSES[name]
    process, teacher = make_process(diffusion), pipeline(diffusion)
    if rule == "zero" and name != "flow":
        return
    unet, batch = tiny_unet(max_guidance_scale=4.0, conditioning="adain"), batch_of(process)
    losses = Objective(DiffusionLoss(process), unet, Teacher(teacher, Rule(rule)))(unet, batch)
    x = process.add_noise(batch.x0, batch.noise, batch.level)
    for i, scale in enumerate(batch.scale.tolist()):
        t, y, one = batch.level.time[i : i + 1], batch.labels[i : i + 1], x[i : i + 1]
        level = type(batch.level)(*(value[i].item() for value in batch.level))
        cond, null = (teacher.unet(one, t, labels).sample for labels in (y, torch.tensor([3])))
        guided = null + scale * (cond - null)
        if Rule(rule).applies(process, level):
            at = SimpleNamespace(x=one, process=process, call=SimpleNamespace(step=0, level=level), memory=None)
            guided = Rule(rule).combine(cond, null, torch.tensor([scale]), at)
        output = unet(one, t, y, guidance_scale=scale).sample
        wanted = (output - guided).square().mean()
        assert losses[i].item() == pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize("taught", [False, True])
def test_learned_variance_takes_the_estimate_as_mean(taught):
    diffusion = DiffusionConfig(schedule="cosine", learned_variance=True)
    process, unet = make_process(diffusion), tiny_unet(max_guidance_scale=4.0, learned_variance=True)
    batch, loss = batch_of(process), DiffusionLoss(process, vlb_weight=0.001)
    teacher = pipeline(diffusion) if taught else None
    losses = Objective(loss, unet, Teacher(teacher, Rule()) if taught else None)(unet, batch)
    x, share = process.add_noise(batch.x0, batch.noise, batch.level), (1 / batch.scale)[:, None, None, None]
    output = unet(x, batch.level.time, batch.labels, guidance_scale=batch.scale).sample
    network = unet if not taught else teacher.unet
    null = network(x, batch.level.time, torch.full((6,), 3)).sample[:, :1]
    cond = network(x, batch.level.time, batch.labels).sample[:, :1]
    scale = batch.scale[:, None, None, None]
    estimate = output[:, :1] - (scale - 1) * (cond - null) if taught else share * output[:, :1] + (1 - share) * null
    bound = loss.vlb(torch.cat([estimate, output[:, 1:]], dim=1), batch.x0, batch.noise, batch.level)
    target = cond if taught else process.target(batch.x0, batch.noise, batch.level)
    wanted = (estimate - target).square().mean((1, 2, 3)) + 0.001 * 1000 * bound
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)


def test_perfect_student_of_a_teacher_has_no_loss():
    """The exact student of plain guidance: it is the teacher, called twice."""
    process, teacher = make_process(PROCESSES["ddpm"]), pipeline(PROCESSES["ddpm"])
    batch = batch_of(process)

    def student(x, time, labels, augment, guidance_scale):
        cond, null = (teacher.unet(x, time, y).sample for y in (labels, torch.full_like(labels, 3)))
        return SimpleNamespace(sample=null + guidance_scale[:, None, None, None] * (cond - null))

    losses = Objective(DiffusionLoss(process), teacher.unet, Teacher(teacher, Rule()))(student, batch)
    assert losses.max() < 1e-9


@pytest.mark.slow
def test_compiled_blocks_have_the_same_loss(monkeypatch):
    monkeypatch.setattr("diffusion_adagn.runtime.speed.COMPILER", "eager")
    process = make_process(PROCESSES["ddpm"])
    unet, batch = tiny_unet(max_guidance_scale=4.0).train(), batch_of(process)
    objective = Objective(DiffusionLoss(process), unet)
    wanted = objective(unet, batch)
    compile_blocks(unet)
    losses = objective(unet, batch)
    torch.testing.assert_close(losses, wanted)
    losses.mean().backward()
    assert unet.embedding.scale.weight.grad.abs().sum() > 0


def test_scales_are_drawn_by_position():
    dataset, process = open_dataset(DataConfig(), "train", progress=False), make_process(PROCESSES["ddpm"])
    common = dataset, 3, process, torch.device("cpu"), True, 0.3
    plain, loader = BatchLoader(*common), BatchLoader(*common, max_scale=4.0)
    positions = torch.arange(400)
    batch, before = loader.batch(positions), plain.batch(positions)
    assert before.scale is None
    for name in ("x0", "noise", "labels", "quantile", "indices"):  # the other streams are those of before
        assert torch.equal(getattr(batch, name), getattr(before, name))
    null = batch.labels == 10
    assert 80 < null.sum() < 160 and (batch.scale[null] == 1).all()
    inverse = 1 / batch.scale[~null]
    wanted = 0.25 + 0.75 * uniform(3, "guidance", positions)[~null]
    torch.testing.assert_close(inverse, wanted.float())
    assert abs(inverse.mean() - 0.625) < 0.04 and inverse.min() < 0.27 and inverse.max() > 0.98
    part = loader.batch(positions[100:130])
    assert torch.equal(part.scale, batch.scale[100:130])  # not of the batch


@pytest.mark.parametrize(
    ("changes", "network", "message"),
    [
        ({}, {"null_class": False}, "has no null class to guide against: name one that fits, or none"),
        ({}, {"sample_size": 16}, "images of 16 pixels and 1 channels, not 8 and 1"),
        ({"diffusion.prediction": "v"}, {}, r"predicts eps under process ddpm .* than this run \(v, ddpm\)"),
        ({"diffusion.schedule": "linear"}, {}, "other noise levels"),
        ({"training.teacher_rule": "apg:momentum=-0.5"}, {}, "momentum=-0.5, which refers to earlier steps"),
        ({"training.teacher_rule": "zero"}, {}, "zero is defined for process flow"),
        ({"training.teacher_rule": "nothing"}, {}, "training.teacher_rule: 'nothing' is not a guidance rule"),
    ],
)
def test_teacher_that_does_not_fit_is_rejected(monkeypatch, changes, network, message):
    pipe = pipeline(PROCESSES["ddpm"], **network)
    monkeypatch.setattr(teacher_module, "open_pipeline", lambda source: (pipe, source))
    settings = {"model.max_guidance_scale": "4", "training.teacher": "runs/a", "data.image_size": "8",
                "data.channels": "1", "diffusion.schedule": "cosine"}  # fmt: skip
    config = read_config(None, settings | changes)
    config.labels = LABELS.to_dict()
    with pytest.raises(InputError, match=message):
        open_teacher(config)


def test_teacher_with_other_classes_is_rejected(monkeypatch):
    monkeypatch.setattr(teacher_module, "open_pipeline", lambda source: (pipeline(PROCESSES["ddpm"]), source))
    config = read_config(None, {"model.max_guidance_scale": "4", "training.teacher": "runs/a", "data.image_size": "8",
                                "data.channels": "1", "diffusion.schedule": "cosine"})  # fmt: skip
    config.labels = LabelSpace(("a", "b", "d")).to_dict()
    with pytest.raises(InputError, match=r"the teacher runs/a has other classes \(a, b, c, ...\)"):
        open_teacher(config)
