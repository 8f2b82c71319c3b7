"""The list of data sets: entries, options, statistics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sarwmix.data import registry
from sarwmix.data.spec import DatasetSpec, Statistics, read_statistics_file, statistics_file_content
from tests.bigearthnet_fixtures import write_benv2
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_contract_numbers() -> None:
    benv2 = registry.get_spec("benv2")
    assert benv2.bands == ("VH", "VV")
    assert benv2.unit == "dB"
    assert benv2.size == 120
    assert len(benv2.classes) == 19
    default = benv2.statistics[benv2.default_statistics]
    assert (default.mean, default.std) == ((-19.1966, -12.5144), (5.4501, 5.0019))
    assert default.p01[0] == pytest.approx(-19.1966 - 2.3263 * 5.4501, abs=1e-4)
    assert default.p99[1] == pytest.approx(-12.5144 + 2.3263 * 5.0019, abs=1e-4)
    assert "normal approximation" in default.origin
    reben = benv2.statistics["reben"]
    assert (reben.mean, reben.std) == ((-19.3526, -12.6439), (5.5905, 5.1335))
    for choice in ("s1", "s1_full"):
        assert registry.get_spec("benv2", choice).statistics["reben"] is reben
    turned = registry.get_spec("benv2", "VV,VH").statistics["reben"]
    assert (turned.mean, turned.std) == ((-12.6439, -19.3526), (5.1335, 5.5905))
    benv1 = registry.get_spec("benv1")
    published = benv1.statistics[benv1.default_statistics]
    assert benv1.default_statistics == "published"
    assert (published.mean, published.std) == ((-19.2309, -12.5951), (3.1672, 2.9644))
    assert "within-image" in published.origin


def test_all_required_data_sets_are_there() -> None:
    assert {"benv1", "benv2", "demo", "s1_scenes", "sen12flood"} <= set(registry.names())
    assert set(registry.names("multilabel")) >= {"benv1", "benv2", "demo"}
    assert "sen12flood" in registry.names("pair")


def test_unknown_names_say_what_exists() -> None:
    with pytest.raises(UserError, match=r"'benv3'.*did you mean 'benv[12]'.*there are: benv2, benv1"):
        registry.get_spec("benv3")


def test_duplicates_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        registry.register(registry.get_spec("benv2"))


def test_options_are_strict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no option 'metadat' \(did you mean 'metadata'\?\).*exclude_snow_cloud"):
        registry.build_dataset("benv2", tmp_path, "train", metadat="x")
    with pytest.raises(UserError, match="no split 'validation'"):
        registry.build_dataset("benv2", tmp_path, "validation")
    with pytest.raises(UserError, match="names a part twice"):
        registry.build_dataset("benv2", tmp_path, "train+train")
    with pytest.raises(UserError, match="on_error"):
        registry.build_dataset("benv2", tmp_path, "train", on_error="ignore")
    with pytest.raises(UserError, match="does not exist"):
        registry.build_dataset("benv2", tmp_path / "absent", "train")
    with pytest.raises(UserError, match="empty"):
        registry.build_dataset("benv2", "", "train")


def test_none_counts_as_not_given(tmp_path: Path) -> None:
    write_benv2(tmp_path, count=5)
    dataset = registry.build_dataset("benv2", tmp_path, "train", metadata=None, statistics=None, id_col=None)
    assert dataset.statistics == registry.BENV2_STATISTICS


def test_statistics_by_name_and_by_file(tmp_path: Path) -> None:
    spec = registry.get_spec("benv2")
    assert registry.resolve_statistics(spec, "reben") is registry.REBEN_STATISTICS
    mine = Statistics((-20.0, -13.0), (5.0, 4.0), (-30.0, -22.0), (-8.0, -1.0), "measured")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(statistics_file_content(mine, spec)))
    assert registry.resolve_statistics(spec, str(path)) == mine
    # Bands are matched by name, not by position.
    turned = {"bands": ["VV", "VH"], "unit": "dB", "origin": "measured"}
    for key in ("mean", "std", "p01", "p99"):
        turned[key] = list(getattr(mine, key))[::-1]
    path.write_text(json.dumps(turned))
    assert registry.resolve_statistics(spec, path) == mine


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "JSON"),
        ("[]", "object"),
        ('{"bands": ["VH", "VV"], "unit": "linear"}', "unit"),
        ('{"bands": ["VV"], "unit": "dB"}', "VH is needed"),
        ('{"bands": ["VH", "VV"], "unit": "dB", "mean": [1, 2]}', "std"),
        (
            '{"bands": ["VH","VV"],"unit":"dB","mean":[1,2],"std":[0,1],"p01":[0,0],"p99":[1,1],"origin":"x"}',
            "positive",
        ),
        (
            '{"bands": ["VH","VV"],"unit":"dB","mean":[1,NaN],"std":[1,1],"p01":[0,0],"p99":[1,1],"origin":"x"}',
            "finite",
        ),
        ('{"bands": ["VH","VV"],"unit":"dB","mean":[1],"std":[1],"p01":[0],"p99":[1],"origin":"x"}', "2 bands"),
    ],
)
def test_bad_statistics_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_statistics_file(path, registry.get_spec("benv2"))


def test_missing_statistics_say_what_exists(tmp_path: Path) -> None:
    spec = registry.get_spec("benv2")
    with pytest.raises(UserError, match="presets benv2, reben"):
        registry.resolve_statistics(spec, tmp_path / "absent.json")
    with pytest.raises(UserError, match="no statistics preset 'rebn'"):
        registry.resolve_statistics(spec, "rebn")


def test_entries_are_checked() -> None:
    good = {
        "name": "x", "task": "multilabel", "bands": ("VH",), "default_statistics": "a", "classes": ("c",),
        "statistics": {"a": Statistics((0.0,), (1.0,), (-1.0,), (1.0,), "x")}, "splits": ("train",), "size": 8,
        "builder": "m:f", "description": "",
    }  # fmt: skip
    DatasetSpec(**good)  # type: ignore[arg-type]
    for change in (
        {"task": "detection"}, {"unit": "linear"}, {"default_statistics": "b"}, {"bands": ("VH", "VV")},
        {"classes": ("c", "c")}, {"builder": "m"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="x: "):
            DatasetSpec(**{**good, **change})  # type: ignore[arg-type]


def test_import_is_light() -> None:
    code = "import sys, sarwmix.data.registry; print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bands_of_every_data_set_can_be_chosen() -> None:
    for name in registry.names():
        spec = registry.get_spec(name)
        for band_set, bands in spec.band_sets.items():
            assert registry.get_spec(name, band_set).bands == bands
        assert registry.get_spec(name, spec.bands[-1]).bands == spec.bands[-1:]
