"""LabelSpace: the classes of a data set or a model, and how users name them.

Imports nothing heavy, so that a wrong class name is reported at once.
"""

from __future__ import annotations

import difflib
import operator
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated

from annotated_types import MaxLen
from pydantic import AfterValidator, StrictBool, StrictInt, StrictStr

from .errors import InputError, reject_first
from .schema import document

ClassSpec = str | int | Sequence["str | int"]


MAX_CLASSES = 1_000_000
MAX_NAME_CHARS = 1000
SUM_PIECES = re.compile(r"((?:^|\s)[+-]\s+|,\s*|[@*]\s*)")  # between the names in a sum of class vectors


def names_in_sums(texts: Iterable[str]) -> list[str]:
    """What may be names of classes in sums of class vectors, such as "0.5*cat + 0.5*pug@fine"."""
    return [piece for text in texts for piece in SUM_PIECES.split(text)]


def _clean(text: str) -> str:
    """The text as one printable line: no control characters, no lone surrogates."""
    if not text.isprintable():
        text = text.encode("utf-8", "replace").decode()
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return re.sub(r"\s*,\s*", ", ", " ".join(text.split()))


@document
class LabelSpace:
    """K class names in the order of their ids 0..K-1, and whether there is a null label (id K).

    K = 0 is the label space of an unconditional network: its only label is "null".

    Args:
        names: One unique string per class. ImageNet-style names may contain synonyms: "tench, Tinca tinca".
        original_ids: The ids of these classes before a subset was taken. Default: 0..K-1.
        wnids: WordNet ids such as "n01440764"; empty if the data has none.
        has_null: False for networks without a null label (imported ones): they sample at guidance scale 1 only.
        learned: Names of classes that were learned after training and loaded. Their ids follow the null label.
        files: The file that each learned class was loaded from, by which it can be named too; "" if there is none.

    Raises:
        InputError: A name is empty, too long or repeated; there are more than MAX_CLASSES names; or the numbers of ids
            and of names differ.
    """

    names: Annotated[tuple[Annotated[str, AfterValidator(_clean)], ...], MaxLen(MAX_CLASSES)]
    original_ids: tuple[StrictInt, ...] = ()
    wnids: tuple[Annotated[StrictStr, AfterValidator(_clean)], ...] = ()
    has_null: StrictBool = True
    learned: tuple[Annotated[str, AfterValidator(_clean)], ...] = ()
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", self.files or ("",) * len(self.learned))
        object.__setattr__(self, "original_ids", self.original_ids or tuple(range(self.K)))
        names = (*self.names, *self.learned)
        odd = next((i for i, name in enumerate(names) if not 0 < len(name) <= MAX_NAME_CHARS), None)
        if odd is not None:
            name = f"a name of {len(names[odd]):,} characters" if names[odd] else "an empty name"
            raise InputError(f"class {odd} has {name}; expected 1 to {MAX_NAME_CHARS} characters.")
        repeated = sorted(n for n, count in Counter(names).items() if count > 1)
        if repeated:
            raise InputError(f"class names must be unique; given more than once: {', '.join(map(repr, repeated[:5]))}.")
        if len(self.original_ids) != self.K or (self.wnids and len(self.wnids) != self.K):
            given = f"{len(self.original_ids)} original_ids and {len(self.wnids)} wnids"
            text = f"a label space of {self.K} classes was given {given}; expected one per class, or no wnids."
            raise InputError(text)

    @property
    def K(self) -> int:
        """Number of real classes."""
        return len(self.names)

    @property
    def null_id(self) -> int | None:
        """Id of the null label, K; None if there is no null label."""
        return self.K if self.has_null else None

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of every id: the classes, "null" if there is a null label, the learned classes."""
        return (*self.names, *["null"] * self.has_null, *self.learned)

    @property
    def learned_ids(self) -> range:
        """The ids of the learned classes."""
        return range(self.K + self.has_null, self.K + self.has_null + len(self.learned))

    def with_files(self, text: str) -> str:
        """A selection or a mix with the files of learned classes in place of their names, for a command line."""
        files = dict(zip(self.learned, self.files))
        parts = [word.strip().partition("@") for word in text.split(",")]
        return ",".join(f"{files.get(name) or name}{at}{where}" for name, at, where in parts)

    def sum_with_files(self, text: str) -> str:
        """The same for a sum of class vectors, such as "0.5*cat + 0.5*pug"."""
        files = dict(zip(self.learned, self.files))
        return "".join(files.get(piece.strip()) or piece for piece in SUM_PIECES.split(text))

    def with_names(self, text: str) -> str:
        """A selection, a mix or a sum with the names of learned classes in place of their files, to be read."""
        for name, file in zip(self.learned, self.files):
            text = text.replace(file, name) if file else text
        return text

    def name(self, class_id: int) -> str:
        """The name of a class.

        Args:
            class_id: 0..K-1, the null label, or that of a learned class.

        Returns:
            The class name; "null" for the null label.
        """
        return self.label_names[class_id] if class_id >= self.K else self.names[class_id]

    def with_learned(self, name: str, file: str = "") -> LabelSpace:
        """The label space with one more learned class.

        Args:
            name: Of the class.
            file: That it was loaded from.

        Raises:
            InputError: There is a class of this name.
        """
        if name in self.label_names:
            where = f" in {file}" if file else ""
            raise InputError(
                f"the learned class '{name}'{where} has the name of another class: learn it again with another --name, or "
                "load one of the two."
            )
        return replace(self, learned=(*self.learned, name), files=(*self.files, file))

    # ------------------------------------------------------------------ parsing

    def parse(self, classes: ClassSpec) -> list[int]:
        """Class ids of a selection of classes.

        Args:
            classes: A string such as "cat", "cat,dog,7", "all", "null", "id:3", "name:3" or "wnid:n01440764"; the file
                of a learned class that was loaded; an integer; a list of both; or an integer array or tensor.

        Returns:
            One id per class, in the given order, repetitions included: 0..K-1, K for "null", or those of learned classes.

        Raises:
            InputError: A class is unknown or ambiguous. The message lists the choices or the nearest names.
        """
        if isinstance(classes, str):
            return self._parse_text(classes)
        if hasattr(classes, "reshape"):  # arrays and tensors
            classes = classes.reshape(-1).tolist()
        elif not isinstance(classes, Iterable) or isinstance(classes, bytes):
            classes = [classes]
        ids = [i for c in classes for i in (self._parse_text(c) if isinstance(c, str) else [self._check_id(c)])]
        return ids or self._parse_text("")  # which raises

    def _parse_text(self, text: str) -> list[int]:
        words = [" ".join(w.split()) for w in text.strip().removesuffix(",").split(",")]
        if "" in words:
            where = " between two commas" if any(words) else ""
            raise InputError(f"no class was given{where}. {self._help()}")
        ids, start = [], 0
        folded = {n.casefold() for n in (*self.names, *self.learned, *self.files)}
        longest = 1 + max((n.count(", ") for n in (*self.names, *self.learned, *self.files)), default=0)
        while start < len(words):
            # a name with commas takes precedence over its parts: try the longest run of words first
            for end in range(min(len(words), start + longest), start, -1):
                whole = ", ".join(words[start:end])
                if end == start + 1 and whole == "all" and "all" not in self.names and self.K:
                    ids += range(self.K)
                    start = end
                    break
                if end == start + 1 or whole.removeprefix("name:").strip().casefold() in folded:
                    ids.append(self._resolve(whole))
                    start = end
                    break
        return ids

    def _resolve(self, word: str) -> int:
        prefix = re.match("(id|name|wnid):", word)
        kind = prefix[1] if prefix and word not in self.names else ""
        word = word.removeprefix(f"{kind}:").strip() if kind else word
        number = int(word) if kind in ("", "id") and re.fullmatch(r"[+-]?\d{1,18}", word) else None
        named = self._by_name(word) if kind in ("", "name") else []
        numbered = [number] if number is not None and word.isdecimal() and self._is_id(number) else []
        if word == "null" and not kind:  # a class that is called Null is not meant
            named, numbered = [i for i in named if self.names[i] == word], [self.K] * self.has_null
        ids = list(dict.fromkeys(named + numbered))
        if len(ids) > 1:
            ways = [f"id:{i}" if i in numbered or len(named) > 1 else f"name:{word}" for i in ids]
            meanings = ", ".join(f"{i} ({self.name(i)})" for i in ids)
            raise InputError(f"'{word}' matches several classes: {meanings}. Write which one: {' or '.join(ways)}.")
        if ids:
            return ids[0]
        if kind in ("", "wnid") and word in self.wnids:
            return self.wnids.index(word)
        if number is not None:
            return self._check_id(number)
        raise InputError(self._unknown(word, kind))

    def _by_name(self, word: str) -> list[int]:
        """The class of exactly this name or file; else those of this name or, after that, this synonym in another case."""
        if word in self.names:
            return [self.names.index(word)]
        for learned in (self.learned, self.files):
            if word and word in learned:
                return [self.learned_ids[learned.index(word)]]
        folded = word.casefold()
        for words in ([n.casefold()] for n in self.names), (n.casefold().split(", ") for n in self.names):
            ids = [i for i, names in enumerate(words) if folded in names]
            if ids:
                return ids
        return []

    def _is_id(self, number: int) -> bool:
        return 0 <= number < self.K + self.has_null + len(self.learned)

    def _check_id(self, value: object) -> int:
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            raise InputError(f"a class is a name or a whole number, not {reprlib.repr(value)}. {self._help()}")
        if not self._is_id(number):
            raise InputError(f"class id {number} does not exist. {self._help()}")
        return number

    def _unknown(self, word: str, kind: str) -> str:
        short = word if len(word) <= MAX_NAME_CHARS else f"{word[:60]}... ({len(word):,} characters)"
        if kind == "id":
            return f"'id:{short}': expected a number. {self._help()}"
        if kind == "wnid" and not self.wnids:
            return f"these classes have no WordNet ids, so 'wnid:{short}' does not exist. {self._help()}"
        if word == "null" and not kind and self.K:
            return f"this model has no null label (has_null: false), so sampling needs a class. {self._help()}"
        table = {s.casefold(): s for n in (*self.names, *self.learned) for s in (n, *n.split(", "))}
        table = {w: w for w in self.wnids} if kind == "wnid" else table
        near = [table[m] for m in difflib.get_close_matches(short.casefold(), table, n=3, cutoff=0.5)]
        nearest = f" Nearest: {', '.join(map(repr, dict.fromkeys(near)))}." if near else ""
        return f"there is no class '{short}'.{nearest} {self._help()}"

    def _help(self) -> str:
        if not self.K:
            return "The model is unconditional: write 'null'."
        shown = ", ".join(n.split(", ")[0] for n in self.names[:12]) + (", ..." if self.K > 12 else "")
        null = f"; {self.K} or 'null' is the null label" if self.has_null else ""
        learned = f" Learned classes: {', '.join(self.learned)}." if self.learned else ""
        return f"Classes are 0..{self.K - 1}{null}, or by name: {shown}.{learned}"

    def parts_of_mix(self, text: str) -> Iterator[tuple[str, int, str | None]]:
        """Split a class mix such as "cat@coarse,dog".

        A name may contain commas and @: the longest class name matches first.

        Args:
            text: Parts CLASS or CLASS@WHERE, separated by commas.

        Yields:
            The part, its class id, and its WHERE (None: everywhere).

        Raises:
            InputError: A part is not exactly one class.
        """
        words = [w.strip() for w in text.split(",") if w.strip()]
        if not words:
            self.parse("")  # raises
        while words:
            for end in range(len(words), 0, -1):
                part = ", ".join(words[:end])
                name, separator, where = part.rpartition("@")
                if (class_id := self._one_class(part)) is not None:
                    yield part, class_id, None
                elif separator and "," not in where and (class_id := self._one_class(name)) is not None:
                    yield part, class_id, where
                else:
                    continue
                words = words[end:]
                break
            else:
                ids = self.parse(name if separator else part)  # raises the reason
                raise InputError(f"'{part}' names {len(ids)} classes: expected one.")

    def _one_class(self, text: str) -> int | None:
        try:
            ids = self.parse(text)
        except InputError:
            return None
        return ids[0] if len(ids) == 1 else None

    # ------------------------------------------------------------------ subsets, storage

    def subset(self, ids: Sequence[int]) -> LabelSpace:
        """The label space of a subset of the classes, renumbered 0.. in the given order.

        Original ids and names are preserved.

        Args:
            ids: Class ids, 0..K-1, each once.

        Raises:
            InputError: An id is repeated, or is the null label.
        """
        for i, count in Counter(ids).items():
            faults = {f"class {i} is named more than once ({count} times): name it once.": count > 1}
            faults[f"class {i} is 'null', which is no class of the data: remove it."] = i >= self.K
            reject_first(faults)
        selected = [tuple(of[i] for i in ids if of) for of in (self.names, self.original_ids, self.wnids)]
        return LabelSpace(*selected, self.has_null)

    def to_dict(self) -> dict:
        """The fields as JSON/YAML types, for `from_dict`."""
        lists = {name: list(getattr(self, name)) for name in ("names", "original_ids", "wnids")}
        learned = {"learned": list(self.learned)} if self.learned else {}
        return {**lists, "has_null": self.has_null, **learned}

    @classmethod
    def from_dict(cls, values: dict | Sequence[str]) -> LabelSpace:
        """The label space in the output of `to_dict`.

        Args:
            values: The dict, or a plain list of names.

        Raises:
            InputError: The values have another form.
        """
        if isinstance(values, list | tuple) and values:
            values = {"names": values}
        if not isinstance(values, Mapping) or "names" not in values:
            text = (
                "not a label space: expected names (a list of words), original_ids (of whole numbers), wnids (of words)"
            )
            raise InputError(f"{text} and has_null (true or false).")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known and (v is not None or k == "has_null")})
