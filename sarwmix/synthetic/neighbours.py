"""Small generated data in the layouts of the neighbouring data sets, for tests and for trying commands out.

Layouts, file names, types, units, band names and label values are those of the real data; the pictures are not: smooth
random terrain whose lowest parts are water, with speckle. Scores on them say that a command works, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sarwmix.data.labels import CLASSES_19
from sarwmix.data.registry import DFC_CLASSES, EUROSAT_CLASSES, S2_L1C, S2_L2A
from sarwmix.synthetic.benv2 import smooth_noise, speckle
from util.errors import UserError
from util.files import atomic_write, make_directory, read_json, write_json

COVERS = ("water", "crop", "tree", "developed", "bare")
SAR_DB = {"VV": (-21.0, -11.0, -9.0, -5.0, -14.0), "VH": (-28.0, -18.0, -14.5, -12.0, -22.0)}
"""Backscatter of the covers, dB."""
VISIBLE = (450.0, 700.0, 450.0, 1500.0, 1900.0)
INFRARED = (250.0, 2900.0, 2600.0, 1900.0, 2500.0)
"""Reflectance x 1e4 of the covers below and above 0.7 um."""
PIXEL = 10.0


def cover_map(rng: np.random.Generator, size: int, *, wet: float = 0.3) -> np.ndarray:
    """Numbers of `COVERS`, uint8 (size, size): water in the lowest `wet` part of smooth terrain, the others by another
    field."""
    height = smooth_noise(rng, (size, size), size / 4)
    other = smooth_noise(rng, (size, size), size / 6)
    limits = np.quantile(other, [0.4, 0.7, 0.85])
    cover = (1 + np.digitize(other, limits)).astype(np.uint8)
    if wet > 0:
        cover[height < np.quantile(height, wet)] = 0
    return cover


def backscatter(rng: np.random.Generator, cover: np.ndarray) -> dict[str, np.ndarray]:
    """VV and VH of a map of covers, float32 dB with speckle."""
    shape = cover.shape
    out = {}
    for band, levels in SAR_DB.items():
        level = np.asarray(levels)[cover] + 0.7 * smooth_noise(rng, (shape[0], shape[1]), shape[0] / 8)
        out[band] = (level + 10 * np.log10(np.maximum(speckle(rng, (shape[0], shape[1])), 1e-3))).astype(np.float32)
    return out


def reflectance(rng: np.random.Generator, cover: np.ndarray, band: str) -> np.ndarray:
    """One Sentinel-2 band of a map of covers, uint16 reflectance x 1e4 of 1 or more."""
    levels = VISIBLE if band in ("B01", "B02", "B03", "B04", "B10") else INFRARED
    clean = np.asarray(levels)[cover] * (0.03 if band == "B10" else 1.0)
    return np.clip(clean * (1 + 0.06 * rng.standard_normal(cover.shape)), 1, 18_000).astype(np.uint16)


def write_geotiff(
    path: Path,
    bands: np.ndarray,
    *,
    crs: str,
    origin: tuple[float, float],
    pixel: float,
    names: tuple[str, ...] = (),
    nodata: float | None = None,
) -> None:
    """Write (C, H, W) with band descriptions, compressed.

    Args:
        origin: x and y of the upper left corner.
    """
    import rasterio
    from rasterio.transform import from_origin

    make_directory(path.parent)
    count, height, width = bands.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=bands.dtype, crs=crs, nodata=nodata,
        transform=from_origin(origin[0], origin[1], pixel, pixel), compress="deflate",
    ) as output:  # fmt: skip
        output.write(bands)
        for number, name in enumerate(names, start=1):
            output.set_band_description(number, name)


def write_png(path: Path, bands: np.ndarray) -> None:
    """Write uint8 (C, H, W) of one or three bands."""
    from PIL import Image

    make_directory(path.parent)
    Image.fromarray(bands[0] if len(bands) == 1 else np.moveaxis(bands, 0, -1)).save(path)


def make_eurosat(out: Path, samples: int, rng: np.random.Generator) -> None:
    """`samples` patches of each class; the class decides the mixture of covers."""
    for number, name in enumerate(EUROSAT_CLASSES):
        for patch in range(1, samples + 1):
            cover = cover_map(rng, 64, wet=0.1 * number)
            bands = backscatter(rng, cover)
            write_geotiff(
                out / name / f"{name}_{patch}.tif",
                np.stack([bands["VV"], bands["VH"]]) + np.float32(0.5 * (number % 3)),
                crs="EPSG:32633",
                origin=(300_000 + 640 * patch, 5_000_000 + 640 * number),
                pixel=PIXEL,
                names=("VV", "VH"),
            )


DFC_OF_COVER = (10, 6, 1, 7, 9)  # water, cropland, forest, urban, barren
IGBP_OF_COVER = (17, 12, 4, 13, 16)


def make_dfc2020(out: Path, samples: int, rng: np.random.Generator) -> None:
    """`samples` training patches in two seasons and half as many for evaluation, with both label sets."""
    assert len(DFC_CLASSES) == max(DFC_OF_COVER)
    places = [("ROIs0000_autumn", "ROIs0000_autumn", "Mumbai"), ("ROIs0000_winter", "ROIs0000_winter", "KippaRing")]
    jobs = [(*places[number % 2], number) for number in range(samples)]
    jobs += [("", "ROIs0000_validation", "0", number) for number in range(max(2, samples // 2))]
    for folder, prefix, place, number in jobs:
        cover = cover_map(rng, 256)
        bands = backscatter(rng, cover)
        dfc = np.asarray(DFC_OF_COVER, dtype=np.uint8)[cover]
        igbp = np.asarray(IGBP_OF_COVER, dtype=np.uint8)[cover]
        savanna = smooth_noise(rng, (256, 256), 40) > 1.2
        dfc[savanna & (cover > 0)], igbp[savanna & (cover > 0)] = 3, 8
        dfc[:4], igbp[:4] = 0, 0  # unlabelled rim
        layers = {
            "s1": np.stack([bands["VV"], bands["VH"]]),
            "dfc": dfc[None],
            "lc": np.stack([igbp, igbp, igbp, igbp]),
        }
        for kind, values in layers.items():
            stem = f"{prefix}_{kind}_{place}_p{number}.tif"
            write_geotiff(
                out / folder / f"{kind}_{place}" / stem,
                values,
                crs="EPSG:32643",
                origin=(250_000 + 2560 * number, 2_100_000),
                pixel=PIXEL,
            )


def make_sen1floods11(out: Path, samples: int, rng: np.random.Generator) -> None:
    """`samples` training chips, half as many for validation and test, and one of Bolivia, in the official layout."""
    half = max(2, samples // 2)
    parts = {"train": samples, "valid": half, "test": half, "bolivia": 1}
    root = out / "data/flood_events/HandLabeled"
    lists = make_directory(out / "splits/flood_handlabeled")
    chip = 0
    for part, count in parts.items():
        rows = []
        for number in range(count):
            chip += 1
            name = f"{'Bolivia' if part == 'bolivia' else 'Ghana'}_{100_000 + chip}"
            cover = cover_map(rng, 512)
            bands = backscatter(rng, cover)
            sar = np.stack([bands["VV"], bands["VH"]])
            sar[:, :6, 40:90] = np.nan  # a corner beyond the swath
            optical = np.stack([reflectance(rng, cover, band) for band in S2_L1C]).astype(np.int16)
            label = (cover == 0).astype(np.int16)
            label[200:240, 300 : 340 + 10 * number] = -1  # cloud
            where: dict[str, Any] = {"crs": "EPSG:4326", "origin": (-1.0 + 0.046 * chip, 9.0), "pixel": 8.983e-05}
            write_geotiff(root / f"S1Hand/{name}_S1Hand.tif", sar, names=("VV", "VH"), nodata=float("nan"), **where)
            names = tuple("B8A" if band == "B8A" else f"B{int(band[1:])}" for band in S2_L1C)
            write_geotiff(root / f"S2Hand/{name}_S2Hand.tif", optical, names=names, nodata=0, **where)
            write_geotiff(root / f"LabelHand/{name}_LabelHand.tif", label[None], **where)
            rows.append(f"{name}_S1Hand.tif,{name}_LabelHand.tif\n")
        with atomic_write(lists / f"flood_{part}_data.csv", "w") as file:
            file.write("".join(rows))


SATLAS_OF_COVER = (1, 6, 3, 2, 7)  # water, crop, tree, developed, bare


def make_satlas(out: Path, samples: int, rng: np.random.Generator) -> None:
    """`samples` training tiles and half as many for the test, from two images; one tile has an older second image."""
    newer = "S2B_MSIL1C_20221230T180749_N0509_R041_T13UCR_20221230T195817"
    older = "S2A_MSIL1C_20160808T181452_N0204_R041_T12SVC_20160808T181447"
    tiles = [(1867 + number, 3287) for number in range(samples + max(2, samples // 2))]
    for number, (column, row) in enumerate(tiles):
        cover = cover_map(rng, 512)
        name = f"{column}_{row}"
        label = np.asarray(SATLAS_OF_COVER, dtype=np.uint8)[cover]
        label[:, :8] = 0  # invalid
        write_png(out / f"static/{name}/land_cover.png", label[None])
        for image in (newer, older) if number == 0 else (newer,):
            red, green, blue = (reflectance(rng, cover, band) for band in ("B04", "B03", "B02"))
            colour = np.stack([red, green, blue]) * (255 / 3558)
            write_png(out / f"sentinel2/{image}/tci/{name}.png", np.clip(colour, 1, 255).astype(np.uint8))
            for band in ("B05", "B06", "B07", "B08", "B11", "B12"):
                values = np.clip(reflectance(rng, cover, band) // 32, 1, 255).astype(np.uint8)
                write_png(out / f"sentinel2/{image}/{band.lower()}/{name}.png", values[None])
    metadata = make_directory(out / "metadata")
    write_json(metadata / "train_lowres.json", [list(tile) for tile in tiles[:samples]])
    write_json(metadata / "test_lowres.json", [list(tile) for tile in tiles[samples:]])


LABEL_OF_COVER = ("Inland waters", "Arable land", "Coniferous forest", "Urban fabric", "Beaches, dunes, sands")


def make_benv2(out: Path, samples: int, rng: np.random.Generator) -> None:
    """`samples` training patches, half as many for validation and test, Sentinel-1 and all Sentinel-2 bands."""
    import pandas as pd

    assert set(LABEL_OF_COVER) <= set(CLASSES_19)
    scene, tile = "S1A_IW_GRDH_1SDV_20170613T165043", "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
    half = max(2, samples // 2)
    parts = ["train"] * samples + ["validation"] * half + ["test"] * half
    rows = []
    for number, part in enumerate(parts):
        place = f"{number // 80}_{number % 80}"
        s1_name, s2_name = f"{scene}_33UUP_{place}", f"{tile}_{place}"
        cover = cover_map(rng, 120, wet=float(rng.choice([0.0, 0.3, 0.6])))
        where: dict[str, Any] = {"crs": "EPSG:32633", "origin": (300_000 + 1200 * number, 5_300_000)}
        for band, values in backscatter(rng, cover).items():
            path = out / f"BigEarthNet-S1/{scene}/{s1_name}/{s1_name}_{band}.tif"
            write_geotiff(path, values[None], pixel=PIXEL, **where)
        s1_folder = out / f"BigEarthNet-S1/{scene}/{s1_name}"
        labels = [LABEL_OF_COVER[k] for k in np.unique(cover) if (cover == k).mean() > 0.05]
        facts = {"labels": labels, "acquisition_time": "2017-06-13T16:50:43", "scene_source": scene,
                 "corresponding_s2_patch": s2_name}  # fmt: skip
        write_json(s1_folder / f"{s1_name}_labels_metadata.json", facts)
        for band in S2_L2A:
            step = 6 if band in ("B01", "B09") else 1 if band in ("B02", "B03", "B04", "B08") else 2
            values = reflectance(rng, cover[::step, ::step], band)
            path = out / f"BigEarthNet-S2/{tile}/{s2_name}/{s2_name}_{band}.tif"
            write_geotiff(path, values[None], pixel=PIXEL * step, **where)
        rows.append(
            {
                "patch_id": s2_name,
                "labels": labels,
                "split": part,
                "country": "Austria",
                "s1_name": s1_name,
                "s2v1_name": f"S2A_MSIL2A_20170613T101031_{place}",
                "contains_seasonal_snow": False,
                "contains_cloud_or_shadow": False,
            }
        )
    pd.DataFrame(rows).to_parquet(out / "metadata.parquet", index=False)


MAKERS: Mapping[str, tuple[Callable[[Path, int, np.random.Generator], None], int]] = {
    "eurosat_sar": (make_eurosat, 10),
    "dfc2020": (make_dfc2020, 8),
    "sen1floods11": (make_sen1floods11, 4),
    "satlas": (make_satlas, 4),
    "benv2": (make_benv2, 16),
}
"""Data set -> what writes it, and how many training samples (of each class for eurosat_sar) by default."""
MARK = "generated.json"


def make_neighbour_data(dataset: str, out: str | Path, *, samples: int | None = None, seed: int = 0) -> int:
    """Write generated data of a data set into a new or empty folder.

    Args:
        dataset: One of `MAKERS`.
        out: The folder; with its mark in it, data of the same settings are left as they are.
        samples: Training samples, of each class for eurosat_sar.
        seed: The same seed gives the same files.

    Returns:
        Number of training samples asked for.

    Raises:
        UserError: No such data set, too few samples, or a folder with something else in it.
    """
    if dataset not in MAKERS:
        raise UserError(f"no generated data for {dataset!r}; there are: {', '.join(MAKERS)}")
    make, usual = MAKERS[dataset]
    count = usual if samples is None else samples
    if count < 3:
        raise UserError(f"--samples {count}: expected 3 or more, so that every split has some")
    folder = Path(out)
    settings = {"dataset": dataset, "samples": count, "seed": seed}
    if folder.exists() and any(folder.iterdir()):
        mark = folder / MARK
        if mark.is_file() and read_json(mark) == settings:
            return count
        raise UserError(f"{folder} holds other files; give a new folder")
    make(make_directory(folder), count, np.random.default_rng([seed, len(dataset)]))
    write_json(folder / MARK, settings)
    return count
