"""Fine-tuning: start a network from another run's weights."""

import json

import torch

from ..commands import option_value
from ..config import DiffusionConfig
from ..diffusion.process import Process
from ..errors import InputError
from ..labels import LabelSpace
from ..models.unet import AdaGNUNet
from ..runs.shipped import shipped_folder
from ..sampling.fixed_scale import fix_scale
from ..sampling.load import open_pipeline

NO_SHAPE = {"num_classes", "null_class", "sample_size", "dropout", "norm_groups", "norm_eps", "zero_init_modulation"}
OPTIONS = {
    "in_channels": "data.channels",
    "augment_dim": "data.augment",
    "learned_variance": "diffusion.learned_variance",
}


def transfer(source: str, unet: AdaGNUNet, labels: LabelSpace, diffusion: DiffusionConfig) -> str:
    """Copy into `unet` every weight of `source` (a run, pipeline or hub id; EMA weights) that has the same name and shape.

    Of a network that reads the guidance scale, one that does not gets the weights at scale 1.

    The class table is made for the new classes: a row is copied if a class of that name existed (and the null row); the
    others are new. Returns a sentence on what was copied, with a warning if that is less than half of the weights, or if
    `source` was trained under another process or prediction than `diffusion`. Raises InputError if nothing fits.
    """
    pipe, what = open_pipeline(source)
    if pipe.one_pass and unet.config.max_guidance_scale is None:
        pipe = fix_scale(pipe, 1)
    old, new = pipe.unet.state_dict(), unet.state_dict()
    table = "embedding.classes.weight"
    matching = [k for k in new if k != table and k in old and old[k].shape == new[k].shape]
    differences = _differences(source, pipe.unet, unet)
    if not matching:
        raise InputError(f"{source} shares no layer with this network. Choose the same settings: {differences}.")
    rows, old_rows = 0, {name: i for i, name in enumerate(pipe.labels.names)}
    with torch.no_grad():
        for key in matching:
            new[key].copy_(old[key])
        if table in new and table in old and old[table].shape[1] == new[table].shape[1]:
            pairs = [(i, old_rows.get(name)) for i, name in enumerate(labels.names)]
            pairs += [(labels.K, pipe.labels.null_id)] if labels.has_null else []
            for i, j in pairs:
                if j is not None and j < len(old[table]):
                    new[table][i].copy_(old[table][j])
                    rows += 1
    sentence = f"started from {what}: {len(matching)} of {len(new) - (table in new)} tensors copied"
    if table in new:
        others = "" if rows == len(new[table]) else ", the others are new"
        sentence += f", {rows} of {len(new[table])} rows of the class table copied (same class name){others}"
    new_tensors = [k for k in new if k != table and k not in matching]
    more = ", ..." if len(new_tensors) > 6 else ""
    sentence += f"; new: {', '.join(new_tensors[:6])}{more}" if new_tensors else ""
    share = sum(new[k].numel() for k in matching) / sum(w.numel() for k, w in new.items() if k != table)
    if share < 0.5:
        amount = f"only {share:.1%}" if share >= 0.001 else "less than 0.1%"
        sentence += f"\nWarning: {amount} of the weights were copied, since the networks differ. {differences}."
    return sentence + _other_process(source, pipe.process, diffusion)


def _other_process(source: str, old: Process, diffusion: DiffusionConfig) -> str:
    """A warning, if the network learned to predict something else than it will be trained to."""
    there, here = f"diffusion.process {old.name}", f"diffusion.process {diffusion.process}"
    if old.name == diffusion.process == "ddpm":
        there, here = f"diffusion.prediction {old.prediction}", f"diffusion.prediction {diffusion.prediction}"
    if there == here:
        return ""
    return (
        f"\nWarning: {source} was trained with {there}, and here it is {here}: the network has learned to predict "
        "something else, and starts nearly untrained."
    )


def _differences(source: str, old: AdaGNUNet, new: AdaGNUNet) -> str:
    """The settings that differ and determine the shape of weights, as text; how a shipped model was trained."""
    there, here = (dict(unet.config) for unet in (old, new))
    names = [n for n in here if n not in NO_SHAPE and not n.startswith("_") and here[n] != there.get(n)]
    options = [
        f"{OPTIONS.get(n, 'model.' + n)} {option_value(there.get(n))} (here {option_value(here[n])})" for n in names
    ]
    text = f"{source} has {', '.join(options)}"
    if (folder := shipped_folder(source)) is not None:
        text += f". It was made by `{json.loads((folder / 'made.json').read_text())['trained']}`"
    return text
