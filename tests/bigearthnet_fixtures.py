"""Tiny BigEarthNet data of known content, in every storage, for the tests of data sets, packing and loading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sarwmix.data.labels import CLASSES_19

REALDATA = Path(__file__).resolve().parents[2] / "shared" / "realdata"
needs_realdata = pytest.mark.skipif(not REALDATA.is_dir(), reason="../shared/realdata is not beside the checkout")
SCENES = ("S1A_IW_GRDH_1SDV_20170613T165043", "S1B_IW_GRDH_1SDV_20180204T043253")
SPLIT_TEXT = {"train": "train", "val": "validation", "test": "test"}


def patch_name(index: int) -> str:
    return f"{SCENES[index % 2]}_33UUP_{index}_{(index * 7) % 90}"


def patch_image(index: int) -> np.ndarray:
    """dB values that look like backscatter and differ from patch to patch, float32 (2, 120, 120)."""
    random = np.random.default_rng(1000 + index)
    means = np.array([-19.0, -12.5])[:, None, None]
    return (means + 4.0 * random.standard_normal((2, 120, 120))).astype(np.float32)


def patch_labels(index: int) -> list[str]:
    return [CLASSES_19[index % 19], CLASSES_19[(index * 5 + 3) % 19]] if index % 4 else [CLASSES_19[index % 19]]


def split_of(index: int) -> str:
    return ("train", "val", "train", "test", "train")[index % 5]


def write_tiff(path: Path, band: np.ndarray, **profile: object) -> None:
    """A single-band GeoTIFF in the form of the official files, unless ``profile`` says otherwise."""
    import rasterio
    from rasterio.transform import from_origin

    path.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {
        "driver": "GTiff",
        "count": 1,
        "height": band.shape[0],
        "width": band.shape[1],
        "dtype": str(band.dtype),
        "crs": "EPSG:32633",
        "transform": from_origin(373200, 5353200, 10, 10),
        **profile,
    }
    with rasterio.open(path, "w", **settings) as target:
        target.write(band, 1)


def write_tree(root: Path, indices: Sequence[int], *, nested: bool = True) -> None:
    for index in indices:
        name, image = patch_name(index), patch_image(index)
        folder = root / "_".join(name.split("_")[:5]) / name if nested else root / name
        for channel, band in enumerate(("VH", "VV")):
            write_tiff(folder / f"{name}_{band}.tif", image[channel])


def metadata_rows(indices: Sequence[int]) -> list[dict[str, object]]:
    return [
        {
            "patch_id": f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_{index}_1",
            "labels": patch_labels(index),
            "split": SPLIT_TEXT[split_of(index)],
            "country": "Austria",
            "s1_name": patch_name(index),
            "s2v1_name": f"S2A_MSIL2A_20170613T101031_{index}_1",
            "contains_seasonal_snow": False,
            "contains_cloud_or_shadow": index % 7 == 6,
        }
        for index in indices
    ]


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_benv2(root: Path, count: int = 12) -> Path:
    """A whole BigEarthNet v2 folder: tree and metadata.parquet; patches 6, 13, ... are flagged as cloudy."""
    write_tree(root, range(count))
    write_parquet(root / "metadata.parquet", metadata_rows(range(count)))
    return root


def expected_indices(splits: Sequence[str], count: int, *, cloudy: bool = False) -> list[int]:
    """Patch numbers of a split in the order that a data set delivers them."""
    return [i for split in splits for i in range(count) if split_of(i) == split and (cloudy or i % 7 != 6)]
