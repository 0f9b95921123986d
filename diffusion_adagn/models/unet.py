"""AdaGNUNet: ADM's U-Net, split into modulation(t, y) and denoise(x, m)."""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..ops import OPERATORS, in_functional_transform
from .blocks import Conv3, Downsample, Level, ResBlock, SelfAttention, Stage, Upsample, down2, up2, zero_init
from .conditioning import CONDITIONING, ConditioningLayer
from .config import PATCH_SIZES, ModelConfig
from .embeddings import ConditionEmbedding
from .learned import ClassVectors, LayerChanges, LearnedClass, Strength, changeable_layers, vectors_of_labels
from .norm import Norm

Modulation = dict[str, tuple[Tensor, ...]]
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
SCALE_ROUNDING = 1e-5  # of a guidance scale that was computed as 1 / (1 / scale) in float32


class Site(NamedTuple):
    """One layer that receives modulation.

    Attributes:
        name: dotted path of its module (`unet.get_submodule(name)`), and its key in a modulation.
        resolution: side of its feature map in pixels, for images of sample_size; the first level's is
            sample_size / patch_size.
        channels: its width.
        depth: 0, 1, 2, ... in the order in which an image passes the sites.
    """

    name: str
    resolution: int
    channels: int
    depth: int


class AdaGNUNet(ModelMixin, ConfigMixin):
    """The class-conditional U-Net of Dhariwal & Nichol 2021 ("ADM"), as two functions.

        m = unet.modulation(t, y)      # image-free: {site name: (gamma [B, C], beta [B, C])}
        out = unet.denoise(x, m)       # the image path
        unet(x, t, y).sample           # both

    With patches of p x p pixels, `denoise` takes and returns images, and every layer in between works on feature maps
    of side / p: it sorts the pixels of each patch into channels, [C, H, W] -> [C p^2, H / p, W / p], in the order of
    `torch.nn.functional.pixel_unshuffle` (channel c p^2 + p row + column), and back at its end. So the weights are those
    of a network without patches for images of C p^2 channels.

    Args:
        sample_size: side of the images in pixels, divisible by patch_size 2^(levels - 1).
        in_channels: channels of the images.
        out_channels: None: in_channels.
        num_classes: K; None or 0 for a network without labels.
        null_class: whether the class table has a row K for the null label.
        model_channels: and the other arguments: see `diffusion_adagn.models.config.ModelConfig`, which has the same defaults.
        learned_variance: twice the output channels, the second half for the variance (Nichol & Dhariwal 2021).
        augment_dim: how many augmentation parameters `modulation` may receive (`data.augment`); 0: none.
        max_guidance_scale: the largest guidance scale that `modulation` may receive; None: the network reads none.

    Raises:
        InputError: the numbers do not fit together.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["ResBlock", "SelfAttention"]  # noqa: RUF012 - the name and type that diffusers reads
    compiled_denoise = None  # `denoise(unet, x, m)` after `compile()`

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        num_classes: int | None = None,
        null_class: bool = ModelConfig.null_class,
        model_channels: int = ModelConfig.model_channels,
        channel_mult: tuple[float, ...] = ModelConfig.channel_mult,
        num_res_blocks: int = ModelConfig.num_res_blocks,
        attention_resolutions: tuple[int, ...] = ModelConfig.attention_resolutions,
        num_heads: int = ModelConfig.num_heads,
        num_heads_upsample: int | None = ModelConfig.num_heads_upsample,
        num_head_channels: int | None = ModelConfig.num_head_channels,
        resblock_updown: bool = ModelConfig.resblock_updown,
        dropout: float = ModelConfig.dropout,
        norm_groups: int = ModelConfig.norm_groups,
        norm_eps: float = ModelConfig.norm_eps,
        conditioning: str = ModelConfig.conditioning,
        join: str = ModelConfig.join,
        class_tokens: int = ModelConfig.class_tokens,
        modulate_both_norms: bool = ModelConfig.modulate_both_norms,
        zero_init_modulation: bool = ModelConfig.zero_init_modulation,
        learned_variance: bool = False,
        patch_size: int = ModelConfig.patch_size,
        augment_dim: int = 0,
        max_guidance_scale: float | None = ModelConfig.max_guidance_scale,
    ):
        super().__init__()
        if conditioning not in CONDITIONING or join not in ("sum", "concat"):
            raise InputError(
                f"model.conditioning is one of {', '.join(CONDITIONING)}, and model.join is sum or concat: "
                f"not {conditioning!r} and {join!r}."
            )
        levels = len(channel_mult)
        if patch_size not in PATCH_SIZES:
            raise InputError(f"model.patch_size is one of {', '.join(map(str, PATCH_SIZES))}, not {patch_size!r}.")
        multiple = patch_size * 2 ** max(0, levels - 1)
        if not levels or sample_size % multiple:
            patches = f"cut into patches of {patch_size}x{patch_size} pixels and then " if patch_size > 1 else ""
            fewer = "a smaller model.patch_size, or " if patch_size > 1 else ""
            raise InputError(
                f"images of {sample_size} pixels cannot be {patches}halved {levels - 1} times, once from each level of "
                f"model.channel_mult {list(channel_mult)} to the next: give {fewer}one level or more, and a size that is a "
                f"multiple of {multiple}."
            )
        layer = CONDITIONING[conditioning]
        if layer.class_input == "tokens" and not num_classes:
            raise InputError(
                f"{conditioning} attends to the class, and this network has no classes: choose another conditioning."
            )
        if max_guidance_scale is not None and not (num_classes and null_class and layer.class_input):
            raise InputError(
                "model.max_guidance_scale needs a class and a null class to guide between: set model.class_conditional and "
                "model.null_class to true and model.conditioning to one that uses the class, or leave it unset."
            )
        self.learned: list[LearnedClass] = []
        self.gradient_checkpointing = False
        self.memory_format = "auto"

        def norm(channels: int) -> Norm:
            return Norm(_groups(norm_groups, channels), channels, norm_eps)

        def site(channels: int, layer: type[nn.Module] = layer) -> nn.Module:
            return layer(channels, _groups(norm_groups, channels), norm_eps)

        def norm1(channels: int) -> nn.Module:
            return site(channels, layer.norm1_cls or layer) if modulate_both_norms else norm(channels)

        def stage(inputs: int, outputs: int, attend: bool, heads: int = num_heads, resample=None) -> Stage:
            block = ResBlock(inputs, outputs, norm1, site, dropout, resample)
            return Stage(
                block, SelfAttention(outputs, _heads(outputs, heads, num_head_channels), norm) if attend else None
            )

        def resampler(channels: int, resample) -> nn.Module:
            if resblock_updown:
                return stage(channels, channels, False, resample=resample)
            return (Downsample if resample is down2 else Upsample)(channels, channels)

        widths = [_width(model_channels, mult) for mult in channel_mult]
        sides = [sample_size // patch_size // 2**level for level in range(levels)]
        last = levels - 1

        self._patch_size = patch_size
        self.conv_in = Conv3(in_channels * patch_size**2, widths[0])

        channels, skips = widths[0], [widths[0]]
        self.down = nn.ModuleList()
        for level, (width, side) in enumerate(zip(widths, sides)):
            stages = []
            for _ in range(num_res_blocks):
                stages.append(stage(channels, width, side in attention_resolutions))
                channels = width
                skips.append(channels)
            step = resampler(channels, down2) if level < last else None
            skips += [channels] if step is not None else []
            self.down.append(Level(stages, step))

        self.middle = nn.ModuleList([stage(channels, channels, True), stage(channels, channels, False)])

        self.up = nn.ModuleList()
        for level, (width, side) in reversed(list(enumerate(zip(widths, sides)))):
            stages = []
            for _ in range(num_res_blocks + 1):
                heads = num_heads_upsample or num_heads
                stages.append(stage(channels + skips.pop(), width, side in attention_resolutions, heads))
                channels = width
            self.up.append(Level(stages, resampler(channels, up2) if level > 0 else None))

        self.norm_out = norm(channels)
        outputs = (out_channels or in_channels) * (2 if learned_variance else 1)
        self.conv_out = zero_init(Conv3(channels, outputs * patch_size**2))

        # the embedding comes last, so that with one seed the image path starts the same under every conditioning
        self.embedding = ConditionEmbedding(
            model_channels,
            num_classes,
            null_class,
            join,
            layer.class_input,
            class_tokens,
            augment_dim,
            reads_scale=max_guidance_scale is not None,
        )
        self._sites = self._find_sites()
        self._layers = [type(self.get_submodule(s.name)) for s in self._sites]
        fields = [(len(c.Params._fields) - len(c.token_params), len(c.token_params)) for c in self._layers]
        # one matrix product for all sites; the rows of a site are its fields in order, such as gamma, then beta
        self._widths = [s.channels * plain for s, (plain, _) in zip(self._sites, fields)]
        self._token_widths = [s.channels * tokens for s, (_, tokens) in zip(self._sites, fields)]
        self.projection = nn.Linear(self.embedding.dim, sum(self._widths))
        if zero_init_modulation or layer.zero_init:
            zero_init(self.projection)
        self.token_projection = (
            nn.Linear(self.embedding.token_dim, sum(self._token_widths)) if any(self._token_widths) else None
        )

    # ------------------------------------------------------------------ the two halves

    def modulation(
        self,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        class_vectors: Tensor | None = None,
        augment: Tensor | None = None,
        guidance_scale: Tensor | float | None = None,
    ) -> Modulation:
        """The parameters of every site at (t, y); no image is needed.

        Args:
            timestep: number or [B], 0..T-1, whole or fractional.
            class_labels: int [B], 0..K-1, or K for null, then those of learned classes (`add_class`); or float [B, K] or
                [B, K + 1], weights over the classes (and null): a soft label, or a mixture. None for a network without classes.
            class_vectors: float [B, 4 * model_channels], in place of class_labels; or [B, sites, 4 * model_channels], one for
                each site. The vectors of labels are `unet.class_vectors(labels)`.
            augment: float [B or 1, augment_dim], how training images were augmented (`data.augment`). None: zeros, an image
                that was not augmented, as in sampling.
            guidance_scale: number or float [B or 1], from 1 to max_guidance_scale, of a network that reads it. None: 1, no
                guidance. The null label is at scale 1 always.

        Returns:
            {site name: Params of its layer}; for adagn (gamma [B, C], beta [B, C]). It may be edited before `denoise`. If a
            learned class that changes layers was added and class_labels are given, also {stage name: Strength}.

        Raises:
            InputError: a label is missing, out of range, or given to a network without classes; augment or guidance_scale
                does not fit.
        """
        condition = timestep, class_labels, class_vectors, augment, guidance_scale
        return self.split_modulation(*self.project_condition(*condition))

    def project_condition(
        self,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        class_vectors: Tensor | None = None,
        augment: Tensor | None = None,
        guidance_scale: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`modulation` before it is split by site. Rows may be selected and cached before `split_modulation`.

        Args:
            timestep: see `modulation`.
            class_labels: see `modulation`.
            class_vectors: see `modulation`.
            augment: see `modulation`.
            guidance_scale: see `modulation`.

        Returns:
            [B, width], all sites concatenated; [B, tokens, width] where the class is tokens, else None; and the output of
            `change_strength`.
        """
        timestep, classes, strength = self._check_condition(timestep, class_labels, class_vectors)
        conditions = [timestep, *([] if classes is None else [classes.shared])]
        if augment is not None:
            augment = self._check_augment(augment, _rows(conditions))
            conditions.append(augment)
        scales = self._check_scales(guidance_scale, conditions, class_labels)
        if classes is None or classes.by_site is None:
            return *self._project(timestep, None if classes is None else classes.shared, augment, scales), strength
        own = self._project(timestep, classes.by_site, augment, scales)
        if classes.rows is None:
            return *own, strength
        # rows without own vectors for the sites take the same path as if there were none: the results are bit-equal
        shared = self._project(timestep, classes.shared, augment, scales)
        projected = torch.where(classes.rows, own[0], shared[0])
        return projected, None if own[1] is None else torch.where(classes.rows[..., None], own[1], shared[1]), strength

    def split_modulation(
        self, projected: Tensor, attended: Tensor | None = None, strength: Tensor | None = None
    ) -> Modulation:
        """Split the output of `project_condition` by site.

        Args:
            projected: [B, width].
            attended: [B, tokens, width], or None.
            strength: [B, learned classes], or None.

        Returns:
            As `modulation`.
        """
        plain = projected.split(self._widths, dim=-1)
        more = [None] * len(plain) if attended is None else attended.split(self._token_widths, dim=-1)
        m = {s.name: _params(c, values, extra) for s, c, values, extra in zip(self._sites, self._layers, plain, more)}
        return m if strength is None else m | self.stage_strengths(strength)

    # ------------------------------------------------------------------ learned classes

    def add_class(self, learned: LearnedClass) -> int:
        """Add a class that was learned after training. It is no part of the weights, and is not saved with them.

        Args:
            learned: the class. Its tensors are moved to the network's device and dtype.

        Returns:
            Its label: the numbers after K - 1 and the null label.

        Raises:
            InputError: it does not fit this network.
        """
        if self.embedding.classes is None:
            why = (
                "it has no classes"
                if not self.config.num_classes
                else f"conditioning {self.config.conditioning} ignores the class"
            )
            raise InputError(f"this network has no class vectors ({why}), so no class can be added: use another model.")
        shapes = {name: list(tensor.shape) for name, tensor in learned.tensors().items()}
        wanted = self._learned_shapes(learned)
        wrong = next((name for name in shapes if shapes[name] not in wanted.get(name, [])), None)
        if wrong is not None:
            expected = " or ".join(map(str, wanted.get(wrong, []))) or "no such tensor"
            raise InputError(
                f"the class {learned.name} was learned with another network: its {wrong} is {shapes[wrong]}, and this network "
                f"expects {expected}. Load it into a model of the run that it was learned with."
            )
        learned.apply(lambda tensor: tensor.to(self.projection.weight))
        self.learned.append(learned)
        return self.num_labels - 1

    @property
    def num_labels(self) -> int:
        """How many whole numbers are labels: classes, null, learned classes."""
        return (self.config.num_classes or 0) + bool(self.config.null_class) + len(self.learned)

    def class_vectors(self, class_labels: Tensor) -> Tensor:
        """The class vectors of labels; see `modulation`.

        Args:
            class_labels: int [B].

        Returns:
            [B, class_dim]; or [B, sites, class_dim] if a class with a vector for each site was added.

        Raises:
            InputError: a label is out of range, or the network has no class vectors.
        """
        classes = self._check_condition(0, class_labels, None)[1]
        if classes is None:
            raise InputError(
                f"this network has no class vectors: conditioning {self.config.conditioning} ignores the class."
            )
        return classes.shared if classes.by_site is None else classes.by_site

    def change_strength(self, class_labels: Tensor) -> Tensor | None:
        """How much of each learned class's change of layers the rows of these labels receive.

        Args:
            class_labels: int [B].

        Returns:
            0 or 1, [B, learned classes]; None if no class was added that changes layers.
        """
        if not any(one.layers for one in self.learned):
            return None
        first = self.num_labels - len(self.learned)
        ids = torch.arange(first, self.num_labels, device=class_labels.device)
        return (class_labels[:, None] == ids).to(self.projection.weight.dtype)

    def stage_strengths(self, strength: Tensor) -> Modulation:
        """The part of a modulation for learned classes that change layers: {stage name: Strength}.

        Args:
            strength: [B, learned classes], such as `change_strength` returns.
        """
        return dict.fromkeys(self._stages, Strength(strength))

    def changeable_layers(self) -> dict[str, nn.Module]:
        """The layers that a learned class may change, by name: convolutions of residual blocks, and attention."""
        return changeable_layers({name: self.get_submodule(name) for name in self._stages})

    def _learned_shapes(self, learned: LearnedClass) -> dict[str, list[list[int]]]:
        """The shapes that its tensors may have."""
        shapes = {"vectors": [[rows, self.embedding.class_dim] for rows in (1, len(self._sites))]}
        for name, layer in self.changeable_layers().items():
            if name in learned.layers:
                rank, (outputs, *inputs) = len(learned.layers[name].down), layer.weight.shape
                shapes |= {f"{name}.down": [[rank, *inputs]], f"{name}.up": [[outputs, rank]]}
        return shapes

    # ------------------------------------------------------------------ the image path

    def denoise(self, x: Tensor, m: Modulation) -> Tensor:
        """The image path.

        Args:
            x: noisy images [B, in_channels, H, W].
            m: a modulation of B rows, or of 1.

        Returns:
            The prediction [B, out_channels, H, W], contiguous.

        Raises:
            InputError: the modulation is missing a site.
        """
        missing = [s.name for s in self._sites if s.name not in m]
        if missing:
            raise InputError(f"modulation is missing {len(missing)} sites: {', '.join(missing[:3])}.")
        if self._patch_size > 1:
            x = F.pixel_unshuffle(x, self._patch_size)
        # each layer preserves the memory format of its input
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last) if self._channels_last(x) else x.contiguous())
        skips = [h]
        for level in self.down:
            for stage in level.stages:
                h = self._run(stage, h, m)
                skips.append(h)
            if level.resample is not None:
                h = self._run(level.resample, h, m)
                skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, m)
        for level in self.up:
            for stage in level.stages:
                h = self._run(stage, torch.cat([h, skips.pop()], dim=1), m)
            if level.resample is not None:
                h = self._run(level.resample, h, m)
        out = self.conv_out(self.norm_out(h, apply_act=True))
        return (out if self._patch_size == 1 else F.pixel_shuffle(out, self._patch_size)).contiguous()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        class_vectors: Tensor | None = None,
        augment: Tensor | None = None,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Denoise a batch: `modulation`, then `denoise`.

        Args:
            sample: noisy images [B, C, H, W].
            timestep: see `modulation`.
            class_labels: see `modulation`.
            return_dict: False: return a tuple.
            class_vectors: see `modulation`.
            augment: see `modulation`.
            guidance_scale: see `modulation`.

        Returns:
            An object with `.sample` [B, out_channels, H, W], or a 1-tuple.

        Raises:
            InputError: a label is missing, out of range, or given to a network without classes.
        """
        channels = self.config.in_channels
        halved = self._patch_size * 2 ** (len(self.config.channel_mult) - 1)
        if sample.ndim != 4 or sample.shape[1] != channels or sample.shape[2] % halved or sample.shape[3] % halved:
            raise InputError(
                f"sample is [B, {channels}, H, W] for this network, with H and W multiples of {halved}, not {list(sample.shape)}."
            )
        condition = class_labels, class_vectors, augment, guidance_scale
        m = self.modulation(_per_sample(timestep, sample), *condition)
        rows = next(iter(m.values()))[0].shape[0]  # not len(), which torch.export takes for a constant
        if rows not in (1, sample.shape[0]):
            raise InputError(f"{rows} timesteps or class labels were given for {sample.shape[0]} images.")
        out = self.denoise(sample, m)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def sites(self) -> list[Site]:
        """All layers that receive modulation, in the order in which an image passes them."""
        return list(self._sites)

    def projection_slices(self) -> dict[str, slice]:
        """The rows of `projection` that belong to each site."""
        ends = list(itertools.accumulate(self._widths))
        return {s.name: slice(end - width, end) for s, width, end in zip(self._sites, self._widths, ends)}

    def to(self, *args, **kwargs) -> "AdaGNUNet":
        """As `nn.Module.to`. diffusers' version warns at every dtype about modules that stay float32; there are none."""
        return nn.Module.to(self, *args, **kwargs)

    def _apply(self, fn, recurse: bool = True) -> "AdaGNUNet":
        super()._apply(fn, recurse)
        for one in self.learned:
            one.apply(fn)
        return self

    def compile(self, *args, **kwargs) -> None:
        """Compile forward, as `nn.Module.compile`, and `denoise`, which pipelines call.

        Args:
            args: of torch.compile.
            kwargs: of torch.compile.
        """
        super().compile(*args, **kwargs)
        self.compiled_denoise = torch.compile(type(self).denoise, *args, **kwargs)  # unbound: copies call their own

    def __getstate__(self) -> dict:
        return {
            k: v for k, v in super().__getstate__().items() if k != "compiled_denoise"
        }  # as nn.Module drops its own

    def set_operator(self, operator: str) -> None:
        """Set how norm, modulation and SiLU are computed.

        Args:
            operator: "fused", "eager" or "auto" (fused where possible). See `ops.adagn_silu`.

        Raises:
            InputError: it is none of these.
        """
        if operator not in OPERATORS:
            raise InputError(f"the operator is one of {', '.join(OPERATORS)}, not {operator!r}.")
        for module in self.modules():
            if isinstance(module, Norm):
                module.operator = operator

    def set_layout(self, layout: str) -> None:
        """The old name of `set_memory_format`."""
        warnings.warn("set_layout is called set_memory_format now.", DeprecationWarning, stacklevel=2)
        self.set_memory_format(layout)

    def set_memory_format(self, memory_format: str) -> None:
        """Set the memory format of feature maps.

        Args:
            memory_format: "channels_last", "contiguous", or "auto": channels_last, but contiguous in fp32 on CUDA. The
                first two convert the weights too.

        Raises:
            InputError: it is none of these.
        """
        if memory_format not in MEMORY_FORMATS:
            raise InputError(f"the memory format is one of {', '.join(MEMORY_FORMATS)}, not {memory_format!r}.")
        self.memory_format = memory_format
        if memory_format != "auto":
            self.to(memory_format=torch.channels_last if memory_format == "channels_last" else torch.contiguous_format)

    # ------------------------------------------------------------------ inside

    def _channels_last(self, x: Tensor) -> bool:
        if self.memory_format != "auto":
            return self.memory_format == "channels_last"
        device = x.device.type
        half = x.dtype in (torch.float16, torch.bfloat16) or (device == "cuda" and torch.is_autocast_enabled(device))
        return best_memory_format(device, half) == "channels_last"

    def _run(self, module: nn.Module, h: Tensor, m: Modulation) -> Tensor:
        if not isinstance(module, Stage):
            return module(h)
        mod = [m[name] for name in module.block.sites]
        changes = self._changes(module.path, m)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, h, mod, changes)
        return module(h, mod, changes)

    def _changes(self, stage: str, m: Modulation) -> LayerChanges:
        """What learned classes change in a stage."""
        if stage not in m:
            return ()
        start = f"{stage}."
        parts = (
            {n.removeprefix(start): c for n, c in one.layers.items() if n.startswith(start)} for one in self.learned
        )
        return [(strength, changes) for strength, changes in zip(m[stage].rows.unbind(1), parts) if changes]

    def _find_sites(self) -> list[Site]:
        """Modules are registered in the order in which an image passes them, so named_modules() gives the depth."""
        self._stages = [path for path, module in self.named_modules() if isinstance(module, Stage)]
        for path in self._stages:
            self.get_submodule(path).path = path
        for path, module in self.named_modules():
            if isinstance(module, ResBlock):
                module.sites = tuple(
                    f"{path}.{name}" for name, norm in module.named_children() if isinstance(norm, ConditioningLayer)
                )
        norms = [(name, module) for name, module in self.named_modules() if isinstance(module, ConditioningLayer)]
        sites = [Site(name, self._side(name), norm.num_channels, depth) for depth, (name, norm) in enumerate(norms)]
        for site, (_, norm) in zip(sites, norms):
            if site.resolution**2 < norm.min_pixels:
                raise InputError(
                    f"model.conditioning {self.config.conditioning} cannot work on the {site.resolution}x{site.resolution} "
                    f"feature map at {site.name}: give fewer levels in model.channel_mult{', a smaller model.patch_size' * (self._patch_size > 1)}, "
                    "or larger images."
                )
        return sites

    def _side(self, name: str) -> int:
        """Side of the feature map at a site, from its path."""
        half, index, *_ = name.split(".")
        last = len(self.config.channel_mult) - 1
        level = {"down": int(index), "middle": last, "up": last - int(index)}[half]
        if ".resample." in name and name.endswith("norm2"):  # a residual block resamples between its norms
            level += 1 if half == "down" else -1
        return self.config.sample_size // self._patch_size >> level

    def _check_condition(
        self, timestep: Tensor | float, labels: Tensor | None, vectors: Tensor | None
    ) -> tuple[Tensor, ClassVectors | None, Tensor | None]:
        """timestep [B or 1]; the class vectors of B or 1 rows, None where no class is used; and `change_strength`."""
        device, k, null = self.projection.weight.device, self.config.num_classes, self.config.null_class
        timestep = torch.as_tensor(timestep, device=device).reshape(-1)
        if (labels is not None and not k) or (vectors is not None and self.embedding.classes is None):
            why = (
                f"conditioning {self.config.conditioning} ignores the class"
                if k
                else "it is unconditional, a network without classes"
            )
            raise InputError(f"the network takes no class_labels or class_vectors ({why}): do not pass them.")
        if not k:
            return timestep, None, None
        if (labels is None) == (vectors is None):
            raise InputError(
                f"class_labels {'are missing' if labels is None else 'and class_vectors were given'}: give one of them. The network "
                f"has classes 0..{k - 1}{f', or {k} for null' * null}."
            )
        strength = None
        if vectors is not None:
            rows = self._check_vectors(vectors)
            classes = ClassVectors(rows) if rows.ndim == 2 else ClassVectors(rows[:, 0], rows)
        else:
            rows = self._check_labels(labels, k, null)
            classes = self._vectors_of(rows, k + null) if self.embedding.classes is not None else None
            strength = self.change_strength(rows) if not rows.is_floating_point() else None
        count, times = rows.shape[0], timestep.shape[0]
        if times == 1 and count > 1:
            timestep, times = timestep.expand(count), count
        if count not in (1, times):
            raise InputError(f"{times} timesteps and {count} classes were given: give equally many.")
        return timestep, classes, strength

    def _vectors_of(self, labels: Tensor, table: int) -> ClassVectors:
        """The class vectors of labels or of weights. table: rows of the class table."""
        if not self.learned or labels.is_floating_point():
            return ClassVectors(self.embedding.class_vectors(labels))
        shared = self.embedding.class_vectors(labels.clamp(max=table - 1))
        return vectors_of_labels(self.learned, labels, shared, table, len(self._sites))

    def _project(
        self, timestep: Tensor, classes: Tensor | None, augment: Tensor | None, scales: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """All sites concatenated, and the tokens. classes: [B or 1, class_dim], or [B or 1, sites, class_dim]."""
        vector, tokens = self.embedding(timestep, classes, augment, scales)
        attended = (
            None if self.token_projection is None else _by_site(self.token_projection, tokens, 3, self._token_widths)
        )
        return _by_site(self.projection, F.silu(vector), 2, self._widths), attended

    def _check_augment(self, augment: Tensor, rows: int) -> Tensor:
        """rows: of the other conditions."""
        dim, augment = self.config.augment_dim, torch.as_tensor(augment)
        if not dim:
            raise InputError("the network takes no augmentation parameters (augment_dim is 0): do not pass augment.")
        if augment.ndim != 2 or augment.shape[1] != dim or not augment.is_floating_point():
            raise InputError(
                f"augment is numbers [B, {dim}] for this network, one row per image, not {augment.dtype} {list(augment.shape)}."
            )
        if augment.shape[0] != 1 and rows not in (1, augment.shape[0]):
            raise InputError(
                f"{augment.shape[0]} rows of augment were given for {rows} timesteps and classes: give equally many."
            )
        return augment.to(self.projection.weight)

    def _check_scales(
        self, scale: Tensor | float | None, conditions: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor | None:
        """Guidance scales [B]; None for a network that reads none. The null label has scale 1, which it was trained with.

        conditions: the other ones.
        """
        largest = self.config.max_guidance_scale
        if largest is None:
            if scale is None:
                return None
            raise InputError(
                "the network takes no guidance_scale (max_guidance_scale is unset): do not pass it. Guide with two passes."
            )
        scales = torch.as_tensor(1.0 if scale is None else scale, device=self.projection.weight.device).float()
        scales, rows = scales.reshape(-1), _rows(conditions)
        scales = scales.expand(rows) if scales.shape[0] == 1 else scales  # none given is scale 1 to the bit
        if rows not in (1, scales.shape[0]):
            raise InputError(
                f"{len(scales)} guidance scales were given for {rows} timesteps and classes: give equally many."
            )
        if _has_values(scales):
            check_guidance_scales(scales.tolist(), largest)
        if labels is None or (labels := torch.as_tensor(labels, device=scales.device)).is_floating_point():
            return scales
        return torch.where(labels.reshape(-1) == self.config.num_classes, 1.0, scales)

    def _check_vectors(self, vectors: Tensor) -> Tensor:
        dim, vectors = self.embedding.class_dim, torch.as_tensor(vectors)
        sites = len(self._sites)
        if vectors.shape[1:] not in ((dim,), (sites, dim)) or not vectors.is_floating_point():
            raise InputError(
                f"class_vectors are numbers [B, {dim}] or [B, {sites}, {dim}] for this network, not {vectors.dtype} "
                f"{list(vectors.shape)}."
            )
        return vectors.to(self.projection.weight)

    def _check_labels(self, labels: Tensor, k: int, null: bool) -> Tensor:
        labels = torch.as_tensor(labels, device=self.projection.weight.device)
        weights, shape = labels.is_floating_point(), labels.shape
        valid = shape[1:] in ((k,), (k + null,)) if weights else labels.dtype != torch.bool and shape[1:] in ((), (1,))
        if not valid:
            raise InputError(
                f"class_labels are whole numbers [B], or weights over the classes, one_hot(...).float() [B, {k}]"
                f"{f' (or {k + 1}, with null)' * null}, not {labels.dtype} {list(shape)}."
            )
        if weights:
            return labels
        labels = labels.reshape(-1).long()
        if _has_values(labels):
            bad = labels[(labels < 0) | (labels >= self.num_labels)]
            if len(bad):
                or_null = f", or {k} for null." if null else " (there is no null class)."
                raise InputError(f"class label {bad[0].item()} is out of range: expected 0..{k - 1}{or_null}")
        return labels


def check_guidance_scales(scales: Sequence[float], largest: float) -> None:
    """Raises InputError unless all guidance scales are ones that a network trained up to `largest` reads."""
    wrong = [s for s in scales if not 1 - SCALE_ROUNDING <= s <= largest * (1 + SCALE_ROUNDING)]
    if wrong:
        raise InputError(
            f"this network reads the guidance scale and was trained for 1 to {largest:g}, not {wrong[0]:g}: give one in this "
            "range, or train with a larger model.max_guidance_scale."
        )


def _has_values(tensor: Tensor) -> bool:
    """Whether values may be read: that would synchronize an accelerator, where the pipeline has checked them, and under
    torch.compile and torch.func there are none yet."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not in_functional_transform()


def best_memory_format(device: str, half: bool) -> str:
    """The memory format that "auto" means on a device type. half: convolutions compute in bf16 or fp16."""
    return "channels_last" if device == "cpu" or (device == "cuda" and half) else "contiguous"


def _by_site(linear: nn.Linear, x: Tensor, ndim: int, widths: list[int]) -> Tensor:
    """The layer at x, an array of ndim axes; one with an axis of sites after the first: the site's rows at its part of x."""
    if x.ndim == ndim:
        return linear(x)
    rows = zip(x.unbind(1), linear.weight.split(widths), linear.bias.split(widths))
    return torch.cat([F.linear(part, weight, bias) for part, weight, bias in rows], dim=-1)


def _params(layer: type[ConditioningLayer], plain: Tensor, attended: Tensor | None) -> tuple[Tensor, ...]:
    """The values of one site as its Params."""
    tokens = len(layer.token_params)
    parts = plain.chunk(len(layer.Params._fields) - tokens, dim=-1)
    return layer.Params(*parts, *(attended.chunk(tokens, dim=-1) if tokens else ()))


@contextmanager
def frozen(unet: AdaGNUNet) -> Iterator[None]:
    """No gradient and no dropout in the block."""
    training = unet.training
    unet.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        unet.train(training)


def _width(model_channels: int, mult: float) -> int:
    width = round(model_channels * mult)
    if abs(width - model_channels * mult) > 1e-6 or width < 1:  # 352 * (480 / 352) is 479.99999999999994
        raise InputError(
            f"model.channel_mult {mult:g} times model.model_channels {model_channels} is not a whole width."
        )
    return width


def _rows(conditions: Sequence[Tensor]) -> int:
    return max(condition.shape[0] for condition in conditions)  # not len(), which torch.export takes for a constant


def _per_sample(timestep: Tensor | float, sample: Tensor) -> Tensor:
    timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
    return timestep.expand(sample.shape[0]) if timestep.shape[0] == 1 else timestep


def _groups(groups: int, channels: int) -> int:
    if channels % groups:
        raise InputError(
            f"model.norm_groups {groups} does not divide a layer of {channels} channels: choose norm_groups (ADM 32) or "
            "model_channels so that it divides every width."
        )
    return groups


def _heads(channels: int, num_heads: int, num_head_channels: int | None) -> int:
    heads = channels // num_head_channels if num_head_channels else num_heads
    if not heads or channels % heads or (num_head_channels and channels % num_head_channels):
        raise InputError(
            f"attention over {channels} channels (the middle block always has it) cannot be split into "
            + (
                f"heads of {num_head_channels}: give model.num_head_channels {math.gcd(channels, num_head_channels)}."
                if num_head_channels
                else f"{num_heads} heads."
            )
        )
    return heads
