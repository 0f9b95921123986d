"""The setup of an evaluation: the extractor, the classifier and the reference of real images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ..config import DataConfig
from ..errors import InputError
from ..renamed import extractor_name
from ..runs.recorded import recorded_data
from ..runtime.distributed import main_first
from ..sampling.pipeline import ClassConditionalPipeline
from .extractors import Extractor, open_extractor
from .features import FeatureSet
from .points import SamplePlan, metrics_device
from .reference import RealImages, reference_of
from .settings import EvalConfig


@dataclass(frozen=True)
class EvalSetup:
    """The opened extractor, classifier and reference.

    Args:
        real: The real images; None if there are none.
        extractor: None: diagnostics only, and the reference has no features.
        classifier: None: accuracy is not measured.
        reference: None on all processes but the main one.
        class_names: The classes of the labels; () without labels.
        other_names: Names of the labels after these: null and learned classes.
    """

    real: RealImages | None
    extractor: Extractor | None
    classifier: Extractor | None
    reference: FeatureSet | None
    class_names: tuple[str, ...]
    other_names: tuple[str, ...] = ("null",)

    @property
    def extractors(self) -> list[Extractor]:
        return list({e.name: e for e in (self.extractor, self.classifier) if e is not None}.values())

    @property
    def against(self) -> str:
        """A description of the real images and the extractor, for the main process."""
        if self.reference is None:
            return "nothing"
        about = self.reference.about
        many = "published statistics" if about["count"] is None else f"{about['count']:,} images"
        name = None if self.extractor is None else extractor_name(self.extractor.name)
        by = "by their looks alone" if name is None else f"by the features of {name}"
        return f"{about['name']} ({many}), {by}"


def setup_of_model(
    source: str | Path, pipe: ClassConditionalPipeline, draw: SamplePlan, config: EvalConfig, state: PartialState
) -> EvalSetup:
    """The setup for a model's images. The main process goes first, since it may have to train a classifier.

    Raises:
        InputError: The real images have another size, number of channels or classes, or no real images are known.
    """
    recorded = recorded_data(source)
    if config.extractor == "none" and config.own_data and recorded is None:
        return EvalSetup(None, None, None, None, pipe.labels.names)
    check_reference(config, recorded, str(source))
    size, channels, labels = pipe.unet.config.sample_size, pipe.unet.config.in_channels, pipe.labels
    with main_first(state):  # the data may have to be decoded
        real = RealImages(config.against, config.data, recorded, size, channels)
    real.check_shape(size, size, channels, "the model's images")
    if real.dataset is not None:
        real.dataset.check_classes(labels)
    elif labels.K and real.stored is not None and real.class_names not in ((), labels.names):
        raise InputError(
            f"the reference {real.name} has other classes ({', '.join(real.class_names[:5])}, ...) than the model "
            f"({', '.join(labels.names[:5])}, ...): make one of data with the model's classes."
        )
    class_ids = draw.labels if labels.K else None
    with main_first(state):
        setup = open_setup(real, config, labels.names, class_ids, channels, state)
    check_same_extractors(setup.extractors, state)
    return replace(setup, other_names=labels.label_names[labels.K :])


def check_same_extractors(extractors: Sequence[Extractor], state: PartialState) -> None:
    """Check that all processes have the same extractors, since their features are concatenated.

    Args:
        extractors: The extractors of this process.
        state: The processes.

    Raises:
        InputError: On every process, if the weights differ.
    """
    gathered = gather_object([[(e.name, e.hash) for e in extractors]])
    for rank, hashes in enumerate(gathered):
        for (name, first), (_, other) in zip(gathered[0], hashes):
            if first != other:
                raise InputError(
                    f"the {name} of process 0 has other weights than that of process {rank} ({first}, {other}), so their features do not "
                    f"compare: each of {state.num_processes} processes must open the same. Share DIFFUSION_ADAGN_CACHE between the machines, "
                    "or copy its folder judges from the first machine to the others."
                )


def check_reference(config: EvalConfig, recorded: DataConfig | None, what: str) -> None:
    """Raises InputError where nothing is known that images could be measured against."""
    if config.own_data and recorded is None:
        raise InputError(
            f"there is nothing to measure {what} against, since no run's data settings are known: name real images by --against "
            "NAME_OR_PATH[:split], a folder or .npz of images, or a file of adagn evaluate reference (adagn sweep --extractor none "
            "does without)."
        )


def open_setup(
    real: RealImages,
    config: EvalConfig,
    class_names: tuple[str, ...],
    labels: np.ndarray | None,
    channels: int,
    state: PartialState,
) -> EvalSetup:
    """Open the extractor and, on the main process, compute the reference.

    Args:
        real: The real images.
        config: The settings.
        class_names: The classes of the measured images.
        labels: int64 [N], the labels of the measured images, ids of class_names; None without labels.
        channels: The channels of the measured images.
        state: The processes.

    Raises:
        InputError: The reference has only statistics, which a classifier cannot be trained on.
    """
    main, count = state.is_main_process, config.reference_count
    if config.extractor == "none":
        has_reference = main and real.dataset is not None
        reference = reference_of(real.dataset, None, count) if has_reference else None
        return EvalSetup(real, None, None, reference, class_names)
    if real.file is not None and real.learned is None and config.extractor in ("classifier", "sklearn"):
        raise InputError(
            f"{real.name} holds statistics of the FID's Inception network, and no images that {config.extractor} could learn from: type "
            "--extractor inception, or give real images by --against."
        )
    extractor = open_extractor(config.extractor, real.learned, state.device, main)
    train_one = config.classifier == "auto"
    classifier = _open_classifier(real, extractor, class_names, labels, state) if train_one else None
    reference = real.reference(extractor, count, class_names, channels) if main else None
    reference = reference and replace(reference, device=metrics_device(state))
    return EvalSetup(real, extractor, classifier, reference, class_names)


def _open_classifier(
    real: RealImages, extractor: Extractor, class_names: tuple[str, ...], labels: np.ndarray | None, state: PartialState
) -> Extractor | None:
    """The extractor if it has these classes, else a classifier trained on the data; None without classes."""
    if len(class_names) < 2 or labels is None or not (labels < len(class_names)).any():
        return None
    if extractor.class_names is not None and tuple(extractor.class_names) == class_names:
        return extractor
    learned = real.learned
    if learned is None or learned.label_space.names != class_names or (learned.counts() > 0).sum() < 2:
        return None
    return open_extractor("classifier", learned, state.device, state.is_main_process)
