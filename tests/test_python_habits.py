"""One script as people write it who know diffusers and PyTorch, from data to images."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from diffusion_adagn import AdaGNUNet, ClassConditionalPipeline, InputError, open_dataset, train

TINY = {
    "model.model_channels": 16,
    "model.channel_mult": [1],
    "model.num_res_blocks": 1,
    "model.attention_resolutions": [],
    "model.norm_groups": 4,
    "model.num_head_channels": 16,
    "training.batch_size": 8,
    "training.max_steps": 4,
    "training.checkpoint_every": 2,
    "training.preview_every": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A digits run of four steps, trained from Python with settings alone."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train({"data": {"source": "digits"}, "output_dir": str(folder)} | TINY)
    return folder


def test_own_training_loop_reads_a_dataloader():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    data = open_dataset("digits")
    image, label = data[0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and -1 <= image.min() < image.max() <= 1
    assert isinstance(label, int) and data.labels[0] == label

    unet = AdaGNUNet(
        sample_size=8,
        in_channels=1,
        num_classes=10,
        model_channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
        num_head_channels=16,
    )
    noise, optimizer, ema = DDPMScheduler(), torch.optim.AdamW(unet.parameters(), 1e-3), EMAModel(unet.parameters())
    torch.manual_seed(0)
    losses = []
    for images, labels in DataLoader(data, batch_size=32, shuffle=True):
        t = torch.randint(1000, (len(images),))
        target = torch.randn_like(images)
        loss = (unet(noise.add_noise(images, target, t), t, labels).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(loss.item())
        if len(losses) == 40:
            break
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_checkpoints_load_like_runs(run):
    whole, checkpoint = (ClassConditionalPipeline.from_pretrained(p) for p in (run, run / "checkpoints/step-00000004"))
    call = {"seeds": 0, "num_inference_steps": 4, "output_type": "pt"}
    assert torch.equal(whole("3", **call).images, checkpoint("3", **call).images)
    first = ClassConditionalPipeline.from_pretrained(run / "checkpoints/step-00000002", torch_dtype=torch.bfloat16)
    assert first.config.trained_steps == 2 and first.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("path", [None, 5])
def test_path_of_another_type_is_rejected(path):
    with pytest.raises(InputError, match="a model is a folder or a hub id, not"):
        ClassConditionalPipeline.from_pretrained(path)


def test_vocabulary_of_diffusers_samples(run):
    pipe = ClassConditionalPipeline.from_pretrained(run)
    steps = []

    def preview(pipeline, index, timestep, tensors):
        steps.append(tensors["latents"].shape)
        pipeline._interrupt = index == 2
        return tensors

    images = pipe(
        class_labels=["3", "7"],
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(i) for i in range(4)],
        num_inference_steps=5,
        sampler="dpm++",
        spacing="karras",
        output_type="numpy",
        callback_on_step_end=preview,
    ).images
    assert images.shape == (4, 8, 8, 1) and steps == [(4, 1, 8, 8)] * 3


def test_compiled_network_is_what_runs(run):
    pipe = ClassConditionalPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    call = {"seeds": 0, "num_inference_steps": 4, "output_type": "pt"}
    expected = pipe(["3", "7"], **call).images
    torch._dynamo.reset()
    counters.clear()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert torch.equal(pipe(["3", "7"], **call).images, expected)
    assert counters["frames"]["ok"] == 1
