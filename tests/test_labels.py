"""Class names, the 43 -> 19 grouping, and the reading of label cells."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from sarwmix.data import labels
from tests.bigearthnet_fixtures import REALDATA, needs_realdata
from util.errors import UserError


def test_names_are_complete_and_unique() -> None:
    assert len(labels.CLASSES_19) == len(set(labels.CLASSES_19)) == 19
    assert len(labels.CLASSES_43) == len(set(labels.CLASSES_43)) == 43
    assert sum(group is None for group in labels.GROUPING_43.values()) == 11
    assert {group for group in labels.GROUPING_43.values() if group} == set(labels.CLASSES_19)


@needs_realdata
def test_grouping_equals_the_official_table() -> None:
    table = json.loads((REALDATA / "bigearthnet_metadata/v1/label_indices.json").read_text())
    official_43 = sorted(table["original_labels"], key=table["original_labels"].get)
    official_19 = sorted(table["BigEarthNet-19_labels"], key=table["BigEarthNet-19_labels"].get)
    assert tuple(official_43) == labels.CLASSES_43
    assert tuple(official_19) == labels.CLASSES_19
    for number, members in enumerate(table["label_conversion"]):
        grouped = {name for name, group in labels.GROUPING_43.items() if group == official_19[number]}
        assert grouped == {official_43[member] for member in members}


@needs_realdata
def test_grouping_of_real_patches() -> None:
    checked = 0
    with (REALDATA / "bigearthnet_s1/index.csv").open() as file:
        for row in csv.DictReader(file):
            if row["v1_labels43"]:
                assert labels.group_43_to_19(row["v1_labels43"].split("|")) == row["v1_labels19"].split("|")
                checked += 1
    assert checked == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['Pastures', 'Inland waters']", ["Pastures", "Inland waters"]),
        ("['Pastures' 'Moors, heathland and sclerophyllous vegetation'\n 'Inland waters']",
         ["Pastures", "Moors, heathland and sclerophyllous vegetation", "Inland waters"]),
        ('["Transitional woodland, shrub"]', ["Transitional woodland, shrub"]),
        ("('Pastures',)", ["Pastures"]),
        ("  [ 'Pastures' ]  ", ["Pastures"]),
        ("Pastures|Beaches, dunes, sands", ["Pastures", "Beaches, dunes, sands"]),
        ("Pastures; Inland waters", ["Pastures", "Inland waters"]),
        ("Transitional woodland, shrub", ["Transitional woodland, shrub"]),
        ("[]", []),
        ("", []),
    ],
)  # fmt: skip
def test_label_cells(text: str, expected: list[str]) -> None:
    assert labels.parse_label_list(text) == expected


@pytest.mark.parametrize("text", ["['Pastures'", "['Pastures', Inland waters]", "[Pastures]"])
def test_broken_label_cells_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="label list"):
        labels.parse_label_list(text)


def test_unknown_label_is_named_with_its_place() -> None:
    with pytest.raises(UserError, match=r"table row 7: unknown label 'Pasture'.*Pastures"):
        labels.class_codes(["Pasture"], where="table row 7")
    with pytest.raises(UserError, match="43 CORINE"):
        labels.class_codes(["Urban fabric"], where="x", nomenclature="43")
    with pytest.raises(UserError, match="19 classes"):
        labels.class_codes(["Salines"], where="x", nomenclature="19")


def test_names_outside_the_19_classes_vanish() -> None:
    assert labels.group_43_to_19(["Airports", "Bare rock"]) == []
    assert labels.class_codes(["Salines", "Salt marshes", "Airports"], where="x", nomenclature="any") == [16]


def test_multi_hot_and_back() -> None:
    matrix = labels.multi_hot([[0, 18], []])
    assert matrix.dtype == np.uint8
    assert matrix.shape == (2, 19)
    assert labels.names_of(matrix[0]) == ["Urban fabric", "Marine waters"]
    assert labels.names_of(matrix[1]) == []
