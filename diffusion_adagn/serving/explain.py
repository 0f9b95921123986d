"""What the modulation says about the classes of a model, as numbers, sentences and one chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..labels import LabelSpace
from ..render.text import number
from ..trace import sentences
from ..trace.analysis import class_geometry, main_field, network_half, short_names, sum_variances, variances
from ..trace.atlas import Atlas
from ..trace.plots import LABEL, site_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAREST = 3


def explain_model(atlas: Atlas) -> dict:
    """Where time and class enter, and which classes are alike.

    Args:
        atlas: of the model.

    Returns:
        Plain JSON types: sentences; of each site its place and the fractions of variance by time, class and both; of
        each class the nearest ones with their cosines; the noise levels of the atlas.
    """
    sites = [s.site for s in atlas.sites.values()]
    by_field, main = variances(atlas), main_field(atlas)
    short = short_names([s.name for s in sites])
    total = sum(sum_variances(group.values()).classes for group in by_field.values())
    pairs = [(s, by_field[main][s.name]) for s in sites if s.name in by_field[main]]
    geometry = class_geometry(atlas)
    said = [sentences.class_entry(main, pairs, atlas.num_classes, short)]
    said.append(sentences.field_fractions(by_field))
    said.append(sentences.describe_geometry(geometry, total, atlas.num_classes))
    return {
        "conditioning": atlas.conditioning,
        "sentences": said,
        "sites": [
            {
                "name": s.name,
                "resolution": s.resolution,
                "channels": s.channels,
                "depth": s.depth,
                "half": network_half(s),
                "variance": {
                    field: dict(zip(("time", "class", "both"), (v / (group[s.name].total or 1) for v in group[s.name])))
                    for field, group in by_field.items()
                    if s.name in group
                },
            }
            for s in sites
        ],
        "nearest_classes": {} if geometry is None else {n: _nearest(geometry, i) for i, n in enumerate(geometry.names)},
        "noise_levels": [float(f"{sigma:.4g}") for sigma in atlas.sigma],
    }


def _nearest(geometry, i: int) -> list[dict]:
    """The classes with the largest cosine to class i."""
    order = [j for j in np.argsort(-geometry.cosine[i]).tolist() if j != i][:NEAREST]
    return [{"class": geometry.names[j], "cosine": round(float(geometry.cosine[i, j]), 3)} for j in order]


def explain_class(atlas: Atlas, labels: LabelSpace, class_id: int) -> dict:
    """Where one class differs from the mean of all classes.

    Args:
        atlas: of the model.
        labels: its classes.
        class_id: a class whose values the atlas stores.

    Returns:
        Plain JSON types: the class, sentences, its nearest classes, and per site the RMS over channels and noise levels
        of its deviation from the class mean.
    """
    field, name = main_field(atlas), labels.name(class_id)
    index = atlas.class_ids.index(class_id)
    deviation = {}
    for site in atlas.sites.values():
        if field in site.fields:
            f = site.fields[field]
            deviation[site.site.name] = float(np.sqrt(np.square(f.values[:, index] - f.class_mean).mean()))
    far = max(deviation, key=deviation.get)
    site = atlas.sites[far].site
    place = f"{far} ({site.resolution}x{site.resolution}, {network_half(site)})"
    said = [
        f"{field} of class {name} differs most from the mean of all classes at {place}: RMS {number(deviation[far])}."
    ]
    geometry = class_geometry(atlas)
    nearest = [] if geometry is None or name not in geometry.names else _nearest(geometry, geometry.names.index(name))
    if nearest:
        alike = ", ".join(f"{one['class']} (cosine {one['cosine']:+.2f})" for one in nearest)
        said.append(f"The classes with the most similar modulation are {alike}.")
    return {
        "class_id": class_id,
        "class_name": name,
        "field": field,
        "sentences": said,
        "nearest_classes": nearest,
        "deviation": {site: round(value, 6) for site, value in deviation.items()},
    }


def draw_class(atlas: Atlas, explained: dict) -> Figure:
    """The deviation of a class from the class mean, one bar per site in the order of depth.

    Args:
        atlas: of the model.
        explained: what `explain_class` returned.
    """
    sites = [s.site for s in atlas.sites.values() if s.site.name in explained["deviation"]]
    bars = {explained["field"]: {name: [value] for name, value in explained["deviation"].items()}}
    part = (f"class {explained['class_name']}: RMS deviation from the class mean, by depth", LABEL)
    return site_bars(sites, bars, short_names([s.name for s in sites]), [part])
