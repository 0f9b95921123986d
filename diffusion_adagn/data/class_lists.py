"""Named lists of ImageNet classes, for `data.classes`. Each list is sorted by WordNet id."""

from __future__ import annotations

import functools
from pathlib import Path

# fastai's ten classes that are easy to distinguish (github.com/fastai/imagenette)
_IMAGENETTE = """
n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257
"""

# fastai's ten dog breeds (github.com/fastai/imagenette)
_IMAGEWOOF = """
n02086240 n02087394 n02088364 n02089973 n02093754 n02096294 n02099601 n02105641 n02111889 n02115641
"""

# imagenet100.txt of Contrastive Multiview Coding, Tian et al. 2019 (github.com/HobbitLong/CMC)
_IMAGENET100 = """
n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797
n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653
n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531
n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051
n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322
n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
"""

# one ImageNet class for each of CIFAR-10's: airliner, sports car, robin, tabby, golden retriever, tree frog, sorrel (a
# horse), container ship, trailer truck. ILSVRC2012 has no deer.
_CIFAR10 = """
n02690373 n04285008 n01558993 n02123045 n02099601 n01644373 n02389026 n03095699 n04467665
"""

NAMES = ("imagenette", "imagewoof", "imagenet100", "imagenet_first100", "imagenet_cifar10")


@functools.cache
def class_list(name: str) -> tuple[str, ...]:
    """The WordNet ids of a list in NAMES, ascending. Raises KeyError for another name."""
    if name == "imagenet_first100":
        return tuple(imagenet_classes())[:100]
    lists = (_IMAGENETTE, _IMAGEWOOF, _IMAGENET100, "", _CIFAR10)
    return tuple(sorted(dict(zip(NAMES, lists))[name].split()))


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id -> names of the 1000 ImageNet classes, in the order of their class ids."""
    lines = (Path(__file__).parent / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))
