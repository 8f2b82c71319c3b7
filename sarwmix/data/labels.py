"""BigEarthNet class names: the 19 classes in the project's order, the 43 CORINE names, and the grouping between them.

The grouping is the public BigEarthNet-19 nomenclature (Sumbul et al., "BigEarthNet-MM: A Large-Scale, Multimodal,
Multilabel Benchmark Archive", IEEE GRSM 2021, table II). Eleven of the 43 names have no place among the 19.

Classes are matched by name everywhere: other tools order the same 19 names alphabetically.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from util.errors import UserError

if TYPE_CHECKING:
    import numpy as np

CLASSES_19: tuple[str, ...] = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)

# Each of the 43 names with the class it belongs to; None: not part of the 19-class nomenclature.
GROUPING_43: dict[str, str | None] = {
    "Continuous urban fabric": "Urban fabric",
    "Discontinuous urban fabric": "Urban fabric",
    "Industrial or commercial units": "Industrial or commercial units",
    "Road and rail networks and associated land": None,
    "Port areas": None,
    "Airports": None,
    "Mineral extraction sites": None,
    "Dump sites": None,
    "Construction sites": None,
    "Green urban areas": None,
    "Sport and leisure facilities": None,
    "Non-irrigated arable land": "Arable land",
    "Permanently irrigated land": "Arable land",
    "Rice fields": "Arable land",
    "Vineyards": "Permanent crops",
    "Fruit trees and berry plantations": "Permanent crops",
    "Olive groves": "Permanent crops",
    "Pastures": "Pastures",
    "Annual crops associated with permanent crops": "Permanent crops",
    "Complex cultivation patterns": "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation": (
        "Land principally occupied by agriculture, with significant areas of natural vegetation"
    ),
    "Agro-forestry areas": "Agro-forestry areas",
    "Broad-leaved forest": "Broad-leaved forest",
    "Coniferous forest": "Coniferous forest",
    "Mixed forest": "Mixed forest",
    "Natural grassland": "Natural grassland and sparsely vegetated areas",
    "Moors and heathland": "Moors, heathland and sclerophyllous vegetation",
    "Sclerophyllous vegetation": "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland/shrub": "Transitional woodland, shrub",
    "Beaches, dunes, sands": "Beaches, dunes, sands",
    "Bare rock": None,
    "Sparsely vegetated areas": "Natural grassland and sparsely vegetated areas",
    "Burnt areas": None,
    "Inland marshes": "Inland wetlands",
    "Peatbogs": "Inland wetlands",
    "Salt marshes": "Coastal wetlands",
    "Salines": "Coastal wetlands",
    "Intertidal flats": None,
    "Water courses": "Inland waters",
    "Water bodies": "Inland waters",
    "Coastal lagoons": "Marine waters",
    "Estuaries": "Marine waters",
    "Sea and ocean": "Marine waters",
}
CLASSES_43: tuple[str, ...] = tuple(GROUPING_43)

_CODE_19 = {name: code for code, name in enumerate(CLASSES_19)}
_CODE_43 = {name: None if group is None else _CODE_19[group] for name, group in GROUPING_43.items()}

_QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""")


def parse_label_list(text: str) -> list[str]:
    """Names in a label cell of a CSV file.

    Reads a Python-style list (``['Pastures', 'Inland waters']``), what numpy prints (no commas, line breaks between the
    names), a JSON list, names joined with ``|`` or ``;``, and one bare name. A comma alone never separates, because
    class names contain commas.

    Raises:
        UserError: The brackets or quotes do not close.
    """
    text = text.strip()
    if not text or text in ("[]", "()"):
        return []
    if text[0] in "[(":
        if text[-1] not in "])":
            raise UserError(f"label list {text!r} does not end with a bracket")
        body = text[1:-1]
        found = [first or second for first, second in _QUOTED.findall(body)]
        rest = _QUOTED.sub("", body).strip(" ,\n\r\t")
        if re.sub(r"[\s,]", "", rest):
            raise UserError(f"label list {text!r} has text outside quotes: {rest!r}; expected ['name', 'name', ...]")
        return [re.sub(r"\\(.)", r"\1", name).strip() for name in found]
    separator = "|" if "|" in text else ";"
    return [name.strip().strip("'\"") for name in text.split(separator) if name.strip()]


def class_codes(names: Iterable[str], *, where: str, nomenclature: str = "19") -> list[int]:
    """Column numbers of label names in the 19-class order, sorted, each once.

    Args:
        names: Names of one patch.
        where: What an error message calls the patch, such as ``"metadata.csv row 7"``.
        nomenclature: ``"19"``: names of the 19 classes; ``"43"``: names of the 43, grouped (those outside the 19 are
            left out); ``"any"``: either of them.

    Raises:
        UserError: A name is unknown; the message has the name and ``where``.
    """
    codes = set()
    for name in names:
        if nomenclature != "43" and name in _CODE_19:
            codes.add(_CODE_19[name])
        elif nomenclature != "19" and name in _CODE_43:
            code = _CODE_43[name]
            if code is not None:
                codes.add(code)
        else:
            raise UserError(f"{where}: unknown label {name!r}{_expected(nomenclature)}")
    return sorted(codes)


def group_43_to_19(names: Sequence[str], *, where: str = "labels") -> list[str]:
    """The 19-class names of a list of 43-class names, in the project's order; empty when none has a place there."""
    return [CLASSES_19[code] for code in class_codes(names, where=where, nomenclature="43")]


def multi_hot(codes: Sequence[Sequence[int]], classes: int = len(CLASSES_19)) -> np.ndarray:
    """Label lists as a matrix of zeros and ones, uint8 (len(codes), classes)."""
    import numpy as np

    matrix = np.zeros((len(codes), classes), dtype=np.uint8)
    for row, columns in enumerate(codes):
        matrix[row, list(columns)] = 1
    return matrix


def names_of(row: Sequence[int] | np.ndarray) -> list[str]:
    """Class names of one multi-hot row."""
    return [name for name, value in zip(CLASSES_19, row, strict=True) if value]


def _expected(nomenclature: str) -> str:
    if nomenclature == "43":
        return "; expected one of the 43 CORINE names of BigEarthNet (sarwmix/data/labels.py)"
    return f"; expected one of the 19 classes: {'; '.join(CLASSES_19)}"
