"""S1list.json, split lists, and the pairing rule: by hand and on the real list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sarwmix.sen12flood.grid import GridError, grid_from_polygon
from sarwmix.sen12flood.metadata import (
    SPLITS,
    make_pairs,
    pair_name,
    parse_pair_name,
    read_id_list,
    read_s1list,
    resolve_split,
)
from util.errors import UserError


def frame(date: str, flooding: object, name: str) -> dict[str, object]:
    return {"date": date, "FLOODING": flooding, "orbit": "ASCENDING", "filename": name}


def write_list(path: Path, content: object) -> Path:
    file = path / "S1list.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


# The pairing rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flooding", "expected"),
    [
        ([], []),
        ([False], []),
        ([True, True, True], []),  # no dry image, no first one
        ([False, True], [(0, 1, 1)]),
        ([True, False], [(1, 0, 1)]),  # the dry image is the first, whatever the order in time
        ([False, False], [(0, 1, 0)]),  # once, not twice
        ([False, False, True, False], [(0, 1, 0), (0, 2, 1), (0, 3, 0), (1, 2, 1), (1, 3, 0), (3, 2, 1)]),
    ],
)
def test_pairs_by_hand(flooding: list[bool], expected: list[tuple[int, int, int]]) -> None:
    assert make_pairs(flooding) == expected


def test_number_of_pairs_follows_the_formula() -> None:
    for dry in range(5):
        for wet in range(4):
            pairs = make_pairs([True] * wet + [False] * dry)
            assert len(pairs) == dry * wet + dry * (dry - 1) // 2
            assert sum(label for _, _, label in pairs) == dry * wet
            assert len({frozenset(pair[:2]) for pair in pairs}) == len(pairs)


def test_the_real_list_gives_the_published_numbers(realdata: Path) -> None:
    catalogue = read_s1list(realdata / "sen12flood_metadata" / "S1list.json")
    assert len(catalogue.sequences) == 335
    assert catalogue.problems == []
    split = resolve_split(catalogue, None, None)
    assert "derived" in split.origin
    found = {}
    for name in SPLITS:
        labels = [
            label
            for folder in split.folders[name]
            for _, _, label in make_pairs([f.flooding for f in catalogue.sequences[folder].frames])
        ]
        found[name] = (len(split.folders[name]), len(labels), sum(labels))
    assert found == {"train": (267, 16_816, 6_349), "test": (68, 3_767, 1_303)}


def test_derived_split_equals_the_lists_beside_the_real_data(realdata: Path) -> None:
    folder = realdata / "sen12flood_metadata"
    catalogue = read_s1list(folder / "S1list.json")
    lists = [folder / "derived" / f"sen12_{name}_by_folder_digits.csv" for name in SPLITS]
    assert resolve_split(catalogue, *lists).folders == resolve_split(catalogue, None, None).folders


def test_every_real_polygon_is_a_utm_square(realdata: Path) -> None:
    catalogue = read_s1list(realdata / "sen12flood_metadata" / "S1list.json")
    grids = {folder: grid_from_polygon(s.polygon, 512) for folder, s in catalogue.sequences.items()}
    assert len(grids) == 335
    assert all((g.width, g.height, g.pixel) == (512, 512, 10.0) for g in grids.values())
    # Known from a real Sentinel-2 band of this sequence.
    assert grids["0004"].crs == "EPSG:32734"
    assert grids["0004"].bounds == (280480.0, 6246870.0, 285600.0, 6251990.0)


def test_the_real_b04_grid_equals_the_polygon(realdata: Path) -> None:
    from sarwmix.sen12flood.grid import read_grid

    band = next((realdata / "sen12flood_s2_band").rglob("*.tif"))
    polygon = read_s1list(realdata / "sen12flood_metadata" / "S1list.json").sequences["0004"].polygon
    grid, rebuilt = read_grid(band), grid_from_polygon(polygon, 512)
    assert (grid.crs, grid.bounds, grid.width, grid.height) == (
        rebuilt.crs,
        rebuilt.bounds,
        rebuilt.width,
        rebuilt.height,
    )


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ((), "0 corners"),
        (((0, 0), (1, 0), (1, 1), (0, 1)), "no square of 5120 m"),
        (((0, 89), (1, 89), (1, 88), (0, 88)), "outside the range of UTM"),
        (((0, float("nan")), (1, 0), (1, 1), (0, 1)), "outside the range of UTM"),
    ],
)
def test_polygons_that_are_no_grid(polygon: tuple[tuple[float, float], ...], message: str) -> None:
    with pytest.raises(GridError, match=message):
        grid_from_polygon(polygon, 512)


# S1list.json --------------------------------------------------------------------------------------------------------


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Numbers, not texts ("10" is after "2"), and not dates: the published pairs are named in that order."""
    content = {
        "0001": {
            "count": 4,
            "10": frame("2019-03-03", True, "S1C"),
            "2": frame("2019-01-01", False, "S1B"),
            "1": frame("2019-02-01", False, "S1A"),
            "folder": "0001",
            "urls": [],
        }
    }
    frames = read_s1list(write_list(tmp_path, content)).sequences["0001"].frames
    assert [f.product for f in frames] == ["S1A", "S1B", "S1C"]
    assert make_pairs([f.flooding for f in frames]) == [
        (0, 1, 0),
        (0, 2, 1),
        (1, 2, 1),
    ]


def test_the_real_list_names_pairs_as_published(realdata: Path) -> None:
    """104 of the 20,583 pairs have an image of a later date first: of two dry images the lower number leads."""
    catalogue = read_s1list(realdata / "sen12flood_metadata" / "S1list.json")
    pairs = later = 0
    for sequence in catalogue.sequences.values():
        for first, second, label in make_pairs([f.flooding for f in sequence.frames]):
            one, two = sequence.frames[first], sequence.frames[second]
            pairs += 1
            later += label == 0 and (one.date, one.product) > (two.date, two.product)
    assert (pairs, later) == (20_583, 104)


def test_missing_and_broken_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; expected the S1list.json .* --s1list"):
        read_s1list(tmp_path / "S1list.json")
    for content, message in (("{", "cannot be read as JSON"), ("[1]", "no table of sequences"), ("{}", "no table")):
        with pytest.raises(UserError, match=message):
            read_s1list(write_list(tmp_path, content))
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_s1list(write_list(tmp_path, "[" * 100_000))


def test_frames_listed_twice(tmp_path: Path) -> None:
    content = {
        "0001": {
            "1": frame("2019-01-01", False, "A"),
            "2": frame("2019-01-01", False, "A"),
            "3": frame("2019-01-07", True, "B"),
            "4": frame("2019-01-07", False, "B"),
        }
    }
    catalogue = read_s1list(write_list(tmp_path, content))
    assert [f.product for f in catalogue.sequences["0001"].frames] == ["A"]
    assert [p.kind for p in catalogue.problems] == ["listed twice", "contradictory labels"]
    assert "used once" in str(catalogue.problems[0])
    assert "left out; correct it" in str(catalogue.problems[1])


def test_repeated_keys_are_noticed(tmp_path: Path) -> None:
    one = json.dumps(frame("2019-01-01", False, "A"))
    catalogue = read_s1list(write_list(tmp_path, f'{{"0001": {{"1": {one}, "1": {one}}}, "0002": {{}}, "0002": {{}}}}'))
    assert [(p.kind, p.where) for p in catalogue.problems] == [("listed twice", "0002"), ("listed twice", "0001")]
    assert len(catalogue.sequences) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"date": "2019-01-01", "filename": "A"}, "expected date, FLOODING, filename"),
        (frame("2019-01-01", "yes", "A"), "FLOODING is 'yes'; expected true or false"),
        (frame("2019-01-01", True, "../A"), "no plain name"),
        (frame("2019-01-01", True, "A__B"), "no plain name"),
        ("text", "expected date, FLOODING, filename"),
    ],
)
def test_bad_frames_are_left_out_and_listed(tmp_path: Path, bad: object, message: str) -> None:
    catalogue = read_s1list(write_list(tmp_path, {"0001": {"1": bad, "2": frame("2019-01-01", False, "B")}}))
    assert [f.product for f in catalogue.sequences["0001"].frames] == ["B"]
    assert [p.kind for p in catalogue.problems] == ["bad frame"]
    assert message in str(catalogue.problems[0])


def test_stray_spaces_in_the_list(tmp_path: Path) -> None:
    catalogue = read_s1list(write_list(tmp_path, {" 0001": {"1": frame("2019-01-01", False, "A ")}}))
    assert catalogue.sequences["0001"].frames[0].product == "A"
    assert [p.kind for p in catalogue.problems] == ["stray spaces", "stray spaces"]


@pytest.mark.parametrize("folder", ["..", "a/b", "", "a\\b"])
def test_ids_that_are_no_folder_names(tmp_path: Path, folder: str) -> None:
    catalogue = read_s1list(write_list(tmp_path, {folder: {}, "0001": {}}))
    assert list(catalogue.sequences) == ["0001"]
    assert [p.kind for p in catalogue.problems] == ["bad id"]


# Split lists --------------------------------------------------------------------------------------------------------


def catalogue_of(tmp_path: Path, *ids: str):
    return read_s1list(write_list(tmp_path, {i: {"1": frame("2019-01-01", False, "A")} for i in ids}))


def test_derived_split(tmp_path: Path) -> None:
    split = resolve_split(catalogue_of(tmp_path, "0002", "7", "0001", "61"), None, None)
    assert split.folders == {"train": ("0001", "0002"), "test": ("61", "7")}


def test_split_lists(tmp_path: Path) -> None:
    train, test = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("0002 \n\n0001\n0001\n0009\n")
    test.write_text("7\n")
    split = resolve_split(catalogue_of(tmp_path, "0001", "0002", "7"), train, test)
    assert split.folders == {"train": ("0001", "0002"), "test": ("7",)}
    assert [p.kind for p in split.problems] == ["stray spaces", "listed twice", "unknown id"]
    assert "id '0002 ' has spaces; expected the id alone" in str(split.problems[0])
    assert "a.csv" in split.origin


def test_split_lists_that_are_refused(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, "0001", "7")
    train, test = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("0001\n7\n")
    test.write_text("7\n")
    with pytest.raises(UserError, match="1 folder.s. are in both .* such as 7; a place must be in one split only"):
        resolve_split(catalogue, train, test)
    with pytest.raises(UserError, match="only one split list is given"):
        resolve_split(catalogue, train, None)
    with pytest.raises(UserError, match="does not exist; expected one folder id per line"):
        read_id_list(tmp_path / "none.csv")
    train.write_text("\n \n")
    with pytest.raises(UserError, match="is empty"):
        read_id_list(train)
    train.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_id_list(train)


def test_pair_names() -> None:
    name = pair_name("0140", "S1A_x_1", "S1B_y_2", 1)
    assert name == "0140__S1A_x_1__S1B_y_2__1"
    assert parse_pair_name(name) == ("0140", "S1A_x_1", "S1B_y_2", 1)
    for bad in ("a__b__c", "a__b__c__2", "__b__c__1", "a__b__c__1__d"):
        with pytest.raises(ValueError, match="is not of the form"):
            parse_pair_name(bad)
