import numpy as np
import pytest

from diffusion_adagn.errors import InputError
from diffusion_adagn.labels import LabelSpace

ANIMALS = LabelSpace(("cat", "dog", "tench, Tinca tinca", "goldfish, Carassius auratus"))


@pytest.mark.parametrize(
    ("spec", "ids"),
    [
        ("cat", [0]),
        (3, [3]),
        (0, [0]),
        ("0", [0]),
        ("cat,dog,2", [0, 1, 2]),
        ("all", [0, 1, 2, 3]),
        ("null", [4]),
        (4, [4]),
        ("tench", [2]),
        ("Tinca tinca", [2]),
        ("tench, Tinca tinca", [2]),
        ("tench,Tinca tinca,cat", [2, 0]),
        ("dog, tench, Tinca tinca", [1, 2]),
        ("CAT", [0]),
        ("TENCH, tinca tinca", [2]),
        ("name:tench, Tinca tinca", [2]),
        (["cat", 3, "null"], [0, 3, 4]),
        ("cat,cat", [0, 0]),
        ("id:1", [1]),
        ("name:dog", [1]),
        (np.array([2, 0]), [2, 0]),
        (np.int64(1), [1]),
    ],
)
def test_parse_class_selections(spec, ids):
    assert ANIMALS.parse(spec) == ids


def test_null_id_is_k():
    for k in (1, 3, 10, 1000, 1001):
        space = LabelSpace(tuple(f"class {i}" for i in range(k)))
        assert space.parse("null") == [k] == [space.null_id]
        assert space.parse(0) == [0]


def test_ambiguous_name_and_id_are_rejected():
    folders = LabelSpace(("1", "2", "3"))
    with pytest.raises(InputError, match=r"name:1 or id:1"):
        folders.parse("1")
    assert folders.parse("name:1") == [0]
    assert folders.parse("id:1") == [1]
    assert folders.parse("0") == [0]  # no class is named 0
    assert LabelSpace(("0", "1", "2")).parse("1") == [1]  # name and id agree


def test_ambiguous_synonyms_are_rejected():
    space = LabelSpace(("crane, bird", "crane, machine", "cardigan, Cardigan Welsh corgi", "cardigan"))
    with pytest.raises(InputError, match=r"id:0 .*id:1"):
        space.parse("crane")
    assert space.parse("crane, bird") == [0]
    assert space.parse("cardigan") == [3]


def test_wordnet_ids():
    space = LabelSpace(("tench", "goldfish"), wnids=("n01440764", "n01443537"))
    assert space.parse("wnid:n01443537") == space.parse("n01443537") == [1]
    with pytest.raises(InputError, match="n01440764"):
        space.parse("wnid:n01440765")
    with pytest.raises(InputError, match="no WordNet ids"):
        ANIMALS.parse("wnid:n01440764")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("catt", "'cat'"),
        ("tenhc", "'tench'"),
        ("9", "class id 9"),
        (5, "class id 5"),
        (-1, "class id -1"),
        (True, "not True"),
        (1.5, "not 1.5"),
        ("", "no class"),
        ("cat,,tench", "between two commas"),
        ([], "no class"),
        ("id:x", "number"),
        (b"cat", "not b'cat'"),
    ],
)
def test_unknown_classes_are_rejected(spec, message):
    with pytest.raises(InputError, match=message):
        ANIMALS.parse(spec)


def test_null_without_null_label_is_rejected():
    space = LabelSpace(("a", "b"), has_null=False)
    assert space.null_id is None
    for spec in ("null", 2):
        with pytest.raises(InputError):
            space.parse(spec)


def test_unconditional_model_accepts_only_null():
    space = LabelSpace(())
    assert space.parse("null") == [0]
    for spec in ("cat", "all", 1):
        with pytest.raises(InputError, match="unconditional"):
            space.parse(spec)


def test_subset_preserves_ids_and_names():
    part = ANIMALS.subset([3, 1])
    assert part.names == ("goldfish, Carassius auratus", "dog")
    assert part.original_ids == (3, 1)
    assert part.null_id == 2
    assert part.subset([1]).original_ids == (1,)
    with pytest.raises(InputError, match="more than once"):
        ANIMALS.subset([1, 1])
    with pytest.raises(InputError, match="null"):
        ANIMALS.subset([4])


def test_names_are_unique_and_not_empty():
    with pytest.raises(InputError, match="unique"):
        LabelSpace(("a", "a"))
    with pytest.raises(InputError, match="empty"):
        LabelSpace(("a", " "))


def test_dict_round_trip():
    space = LabelSpace(("a", "b, c"), original_ids=(7, 9), wnids=("n00000001", "n00000002"), has_null=False)
    assert LabelSpace.from_dict(space.to_dict()) == space
    with pytest.raises(InputError, match="not a label space"):
        LabelSpace.from_dict({"name": ["a"]})


LEARNED = LabelSpace(("cat", "dog")).with_learned("pug", "classes/pug.safetensors").with_learned("7, seven")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("pug", [3]),
        ("classes/pug.safetensors,cat", [3, 0]),
        ("7, seven", [4]),
        ("id:3,null,name:pug", [3, 2, 3]),
        ("all", [0, 1]),
        ("classes/pug.safetensors,all", [3, 0, 1]),
        ("all, pug", [0, 1, 3]),
    ],
)
def test_learned_classes_follow_null(text, ids):
    assert LEARNED.parse(text) == ids
    assert LEARNED.K == 2 and LEARNED.null_id == 2 and list(LEARNED.learned_ids) == [3, 4]


def test_learned_classes_are_named():
    assert [LEARNED.name(i) for i in (0, 2, 3, 4)] == ["cat", "null", "pug", "7, seven"]
    assert LEARNED.label_names == ("cat", "dog", "null", "pug", "7, seven")
    assert LEARNED.with_names("0.5*classes/pug.safetensors + 0.5*cat") == "0.5*pug + 0.5*cat"
    assert LEARNED.with_files("pug@coarse, dog@fine") == "classes/pug.safetensors@coarse,dog@fine"
    with pytest.raises(InputError, match=r"no class 'pog'\. Nearest: 'pug'.*Learned classes: pug, 7, seven"):
        LEARNED.parse("pog")
    with pytest.raises(InputError, match="class id 5 does not exist"):
        LEARNED.parse(5)
    for name in ("cat", "null", "pug"):
        with pytest.raises(InputError, match="has the name of another class"):
            LEARNED.with_learned(name)


def test_learned_classes_are_recorded():
    again = LabelSpace.from_dict(LEARNED.to_dict())
    assert again.learned == LEARNED.learned and again.parse("pug") == [3]
    assert "learned" not in LabelSpace(("cat", "dog")).to_dict()
    without_null = LabelSpace(("cat", "dog"), has_null=False).with_learned("pug")
    assert without_null.parse("pug") == [2] and without_null.name(2) == "pug"
