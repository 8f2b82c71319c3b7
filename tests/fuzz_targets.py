"""What the fuzzer damages: every kind of file that a command reads, with the code that reads it."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.bigearthnet_fixtures import metadata_rows, patch_image, patch_labels, patch_name, write_benv2, write_parquet
from tests.fuzzing import ODD, Target, change_value

COUNT = 6  # patches


def _everything(dataset: str, folder: Path, split: str, **options: Any) -> Any:
    """Open a data set and read all of it."""
    from sarwmix.data.registry import build_dataset

    data = build_dataset(dataset, folder, split, **options)
    batch = data.get_batch(np.arange(len(data)))
    return [list(data.names), *(batch[key] for key in ("image", "image1", "image2", "label") if key in batch)]


def _packed(folder: Path) -> None:
    from sarwmix.data.packed import pack
    from sarwmix.data.registry import build_dataset

    write_benv2(folder.parent / "source", COUNT)
    pack([build_dataset("benv2", folder.parent / "source", split) for split in ("train", "val")], folder)
    shutil.rmtree(folder.parent / "source")


def _other_index(rng: random.Random, folder: Path) -> None:
    """Index arrays that contradict each other, behind right checksums."""
    name = rng.choice(["names.npy", "offsets.npy", "split.npy", "labels.npy", "invalid.npy"])
    array = np.load(folder / name)
    how = rng.randrange(6)
    if how == 0:
        array = array[: len(array) - 1]
    elif how == 1:
        array = np.concatenate([array, array])
    elif how == 2:
        array = array.astype(rng.choice(["float32", "int16", "<U5"]))
    elif how == 3:
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice([255, 200, 77, 0])
    elif how == 4:
        array = array[::-1].copy()
    else:
        array = array.reshape(-1, 1)
    np.save(folder / name, array)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = f"{zlib.crc32((folder / name).read_bytes()):08x}"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _zarr(zarr_format: int) -> Any:
    def make(folder: Path) -> None:
        from sarwmix.data.io.zarr import write_zarr

        patches = [(patch_name(i), patch_image(i), ["Pastures"]) for i in range(COUNT)]
        write_zarr(folder / "x.zarr", patches, zarr_format=zarr_format)
        (folder / "benv1_train.csv").write_text("".join(f"x,{patch_name(i)}\n" for i in range(COUNT)))

    return make


def _use_zarr(folder: Path) -> Any:
    return _everything("benv1", folder / "x.zarr", "train", metadata=str(folder / "benv1_train.csv"))


def _other_codec(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted([*folder.rglob(".zarray"), *folder.rglob("V?/zarr.json")]))
    content = json.loads(path.read_text())
    if content["zarr_format"] == 2:
        content |= rng.choice(
            [{"dtype": "|O"}, {"filters": [{"id": "pickle"}]}, {"compressor": {"id": "pickle"}}, {"chunks": [10**6, 9]},
             {"dtype": "|O", "filters": [{"id": "json2"}]}, {"compressor": {"id": "zlib"}}, {"shape": [10**6, 10**6]},
             {"compressor": {"id": "blosc"}}, {"dtype": [["a", "<f4"]]}, {"chunks": [1, 1]}, {"fill_value": "x"}]
        )  # fmt: skip
    else:
        codec = rng.choice(["pickle", "numcodecs.pickle", "zstd", "blosc", "vlen-utf8", "sharding_indexed"])
        content |= rng.choice(
            [{"data_type": "object"}, {"codecs": [{"name": "bytes"}, {"name": codec, "configuration": {}}]},
             {"codecs": [{"name": codec}]}, {"data_type": "string"}, {"storage_transformers": [{"name": "x"}]},
             {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**6, 10**6]}}}, {"node_type": "x"}]
        )  # fmt: skip
    path.write_text(json.dumps(content))


def _lmdb(folder: Path) -> None:
    from sarwmix.data.io.lmdb import write_lmdb

    write_lmdb(folder / "x.lmdb", [patch_name(i) for i in range(COUNT)], lambda name: patch_image(_number(name)))
    write_parquet(folder / "metadata.parquet", metadata_rows(range(COUNT)))
    (folder / "x.lmdb" / "lock.mdb").unlink(missing_ok=True)


def _number(name: str) -> int:
    return int(name.split("_")[-2])


def _flip_pages(rng: random.Random, folder: Path) -> None:
    """Other numbers in the pages of an LMDB that lead to the records."""
    path = folder / "x.lmdb" / "data.mdb"
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 2, 4])):
        page = rng.choice([0, 1, *range(2, len(data) // 4096)])
        data[4096 * page + rng.randrange(160)] = rng.randrange(256)
    path.write_bytes(data)


def _lists(folder: Path) -> None:
    rows = [f'x,"{patch_labels(i)}",c,d,{patch_name(i)}' for i in range(COUNT)]
    (folder / "benv1_train.csv").write_text("\n".join(rows) + "\n")
    (folder / "benv2_test.csv.gz").write_bytes(gzip.compress(("\n".join(rows) + "\n").encode()))
    (folder / "split.csv").write_text("chip\n" + "\n".join(f"Ghana_{i}_S1Hand.tif" for i in range(40)))
    (folder / "ids.csv").write_text("\n".join(f"{i:04d}" for i in range(40)))
    (folder / "published.csv").write_bytes(Path("sarwmix/tables/published_results.csv").read_bytes())
    table = {"original_labels": {"a": 0}, "BigEarthNet-19_labels": {"b": 0}, "label_conversion": [[0]]}
    (folder / "label_indices.json").write_text(json.dumps(table))
    (folder / "x_labels_metadata.json").write_text(json.dumps({"scene_source": "s", "acquisition_time": "t"}))
    (folder / "statistics.json").write_text(json.dumps(
        {"bands": ["VH", "VV"], "unit": "dB", "mean": [-19.0, -12.0], "std": [5.0, 5.0], "p01": [-31.0, -24.0],
         "p99": [-7.0, -1.0], "origin": "here"}))  # fmt: skip


def _use_lists(folder: Path) -> Any:
    import scripts.list_acquisitions as acquisitions
    import scripts.prepare_datasets as prepare
    from sarwmix.data.registry import get_spec
    from sarwmix.data.spec import read_statistics_file
    from sarwmix.datasets.bigearthnet import read_metadata
    from sarwmix.datasets.sen1floods11 import read_list
    from sarwmix.reports.comparison import read_published
    from sarwmix.sen12flood.metadata import read_id_list
    from util.errors import UserError

    found: list[Any] = []
    failed: UserError | None = None
    for read in (
        lambda: list(read_metadata([folder / "benv1_train.csv"], ["train"]).names),
        lambda: prepare.read_rows(folder / "benv2_test.csv.gz"),
        lambda: read_list(folder / "split.csv"),
        lambda: read_id_list(folder / "ids.csv"),
        lambda: read_published(folder / "published.csv"),
        lambda: acquisitions.read_row(folder / "x_labels_metadata.json"),
        lambda: read_statistics_file(folder / "statistics.json", get_spec("demo")),
    ):
        try:
            found.append(read())
        except UserError as error:
            failed = error
    try:
        prepare.check_label_indices(folder / "label_indices.json")
    except UserError as error:
        if "class names or their order" not in str(error):
            failed = error
    if failed is not None:
        raise failed
    return found


def _pairs(store: bool) -> Any:
    def make(folder: Path) -> None:
        from tests.sen12_fixtures import make_raw, run

        base = folder.parent / "made"
        run(make_raw(base), base, out=folder, layout="store" if store else "npy")
        shutil.rmtree(base)

    return make


def _checkpoint(folder: Path) -> None:
    from tests.prediction_fixtures import write_finetuned, write_pretrained

    write_finetuned(folder / "a.pth")
    write_pretrained(folder / "b.pth")


def _open_both(folder: Path) -> Any:
    from sarwmix.inference.model import from_checkpoint
    from sarwmix.models.loading import read_weights

    found = []
    for name in ("a.pth", "b.pth"):
        found.append(sorted(read_weights(str(folder / name))["model"]))
        model = from_checkpoint(folder / name)
        found.append((model.kind, model.bands, model.classes, model.sample_size))
    return found


def _other_entry(rng: random.Random, folder: Path) -> None:
    """A checkpoint with another entry, tensor or shape, and the checksum that belongs to it."""
    import torch

    from util.checkpoint import save_checkpoint

    path = folder / rng.choice(["a.pth", "b.pth"])
    content = torch.load(path, weights_only=True)
    how = rng.randrange(5)
    if how == 0:
        key = rng.choice(list(content["model"]))
        odd = [torch.zeros(1).expand(10**6, 10**6), torch.zeros(3), torch.full((4,), float("nan")), "x", 3, None,
               torch.zeros(2, 2).to_sparse(), {"a": torch.zeros(1)}]  # fmt: skip
        content["model"][key] = rng.choice(odd)
    elif how == 1:
        content[rng.choice(list(content))] = rng.choice([odd for odd in ODD if odd != "\ud800" and odd != 10**30])
    elif how == 2:
        content["model_config"] = change_value(rng, content["model_config"])
    elif how == 3:
        content["data"] = change_value(rng, content["data"])
    else:
        content["model_config"]["img_size"] = rng.choice([65_536, 10**9, 0, -1, 64, 256, 4096, 1.5, "128"])
    progress = {"epoch": 3, "step": 0, "run_id": "1234"}
    right = {key: isinstance(content.get(key), type(value)) for key, value in progress.items()}
    if all(right.values()) and isinstance(content, dict):
        save_checkpoint(path, content)
    else:
        torch.save(content, path)


def _export(folder: Path) -> None:
    from sarwmix.inference.export import export_model
    from tests.prediction_fixtures import write_finetuned

    source = write_finetuned(folder.parent / "x.pth")
    shutil.rmtree(folder)
    export_model(source, folder, program=False)
    source.unlink()


def _use_export(folder: Path) -> Any:
    from sarwmix.inference.model import from_pretrained
    from sarwmix.models.loading import read_weights

    model = from_pretrained(folder)
    return sorted(read_weights(str(folder / "model.safetensors"))["model"]), model.bands, model.classes


def _run(folder: Path) -> None:
    from tests.test_report import finetune_run

    finetune_run(folder / "run")
    np.save(folder / "features.npy", np.zeros((4, 3), np.float32))


def _use_run(folder: Path) -> Any:
    from sarwmix.finetune.probes import load_features
    from sarwmix.reports.page import write_report
    from sarwmix.tasks.intervals import read_predictions
    from util.errors import UserError

    out = folder.parent / "page"
    failed = None
    try:
        found = read_predictions(folder / "run").names
    except UserError as error:
        failed, found = error, None
    write_report([folder / "run"], out)
    features = load_features(folder / "features.npy", 4)
    if failed is not None:
        raise failed
    return found, None if features is None else np.array(features)


def _raw(folder: Path) -> None:
    from sarwmix.synthetic.sen12flood import generate, make_zip
    from tests.sen12_fixtures import TINY

    raw = generate(folder.parent / "raw", TINY)
    make_zip(raw, folder / "x.zip")
    (folder / "S1list.json").write_bytes((raw / "S1list.json").read_bytes())
    tiles = sorted(raw.rglob("*_corrected_VV.tif"))[:1] + sorted(raw.rglob("S2_*_B04.tif"))[:1]
    for tile, name in zip(tiles, ("vv.tif", "b04.tif"), strict=True):
        (folder / name).write_bytes(tile.read_bytes())
    shutil.rmtree(raw)


def _use_raw(folder: Path) -> Any:
    from sarwmix.sen12flood.align import TileError, read_tile
    from sarwmix.sen12flood.archive import Archive, extract
    from sarwmix.sen12flood.grid import GridError, read_grid
    from sarwmix.sen12flood.metadata import read_s1list
    from util.errors import UserError

    found: list[Any] = []
    try:
        found.append(read_tile(folder / "vv.tif").pixels)
    except TileError as error:  # becomes a problem of the preparation
        found.append(str(error))
    try:
        found.append(read_grid(folder / "b04.tif"))
    except GridError as error:
        found.append(str(error))
    archive = Archive(folder / "x.zip")
    catalogue = read_s1list(folder / "S1list.json")
    out = folder.parent / "extracted"
    shutil.rmtree(out, ignore_errors=True)
    members = archive.needed(catalogue.sequences)
    archive.read_s1list()
    found.append(extract(str(archive.path), members, str(out), False))
    if any("\n" in one for one in found if isinstance(one, str)):
        raise UserError("a reason of\nseveral lines")
    return found, len(members)


def _scenes(folder: Path) -> None:
    from tests.prediction_fixtures import backscatter, write_scene

    write_scene(folder / "a.tif", backscatter(300, 260))
    write_scene(folder / "b_VH.tif", backscatter(260, 260)[:1], descriptions=("VH",), compress="deflate", tiled=True)
    write_scene(folder / "b_VV.tif", backscatter(260, 260)[1:], descriptions=("VV",), compress="deflate", tiled=True)


def _neighbour(dataset: str, samples: int) -> Any:
    def make(folder: Path) -> None:
        from sarwmix.synthetic.neighbours import make_neighbour_data

        make_neighbour_data(dataset, folder, samples=samples)

    return make


def _ombria(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("BEFORE", "AFTER", "MASK"):
        (folder / "train" / kind).mkdir(parents=True)
        (folder / "test" / kind).mkdir(parents=True)
        for number in (1, 2, 51, 52):
            values = rng.integers(0, 255, (256, 256)).astype(np.uint8)
            Image.fromarray(values).save(folder / "train" / kind / f"S1_{kind.lower()}_{number:04d}.png")


TARGETS = (
    Target("packed store", _packed, lambda folder: _everything("benv2", folder, "train+val", check="all"),
           ("*.npy", "manifest.json"), (_other_index,)),
    Target("Zarr 2", _zarr(2), _use_zarr, ("**/.z*", "**/0.0"), (_other_codec,)),
    Target("Zarr 3", _zarr(3), _use_zarr, ("**/zarr.json", "**/c/0/0"), (_other_codec,)),
    Target("LMDB", _lmdb, lambda folder: _everything("benv2", folder / "x.lmdb", "train", check="all",
                                                     metadata=str(folder / "metadata.parquet")),
           ("x.lmdb/*",), (_flip_pages,)),
    Target("patches and parquet", lambda folder: write_benv2(folder, COUNT) and None,
           lambda folder: _everything("benv2", folder, "train"), ("**/*.tif", "*.parquet")),
    Target("lists and tables", _lists, _use_lists, ("*",)),
    Target("pairs, npy", _pairs(False), lambda folder: _everything("sen12flood", folder, "train"),
           ("*.json", "*.csv", "train/*.npy")),
    Target("pairs, store", _pairs(True), lambda folder: _everything("sen12flood", folder, "train"),
           ("*.json", "*.csv", "*.npy")),
    Target("checkpoints", _checkpoint, _open_both, ("*.pth",), (_other_entry,), 0.5),
    Target("export", _export, _use_export, ("config.json", "model.safetensors")),
    Target("run", _run, _use_run, ("run/*", "features.npy"), share=0.4),
    Target("SEN12-FLOOD raw", _raw, _use_raw, ("*",)),
    Target("scenes", _scenes, lambda folder: _everything("s1_scenes", folder, "train", unit="dB"), ("*.tif",)),
    Target("eurosat_sar", _neighbour("eurosat_sar", 3), lambda folder: _everything("eurosat_sar", folder, "train"),
           ("**/*.tif",)),
    Target("dfc2020", _neighbour("dfc2020", 3), lambda folder: _everything("dfc2020", folder, "train"), ("**/*.tif",)),
    Target("sen1floods11", _neighbour("sen1floods11", 3), lambda folder: _everything("sen1floods11", folder, "train"),
           ("**/*.tif", "**/*.csv"), share=0.4),
    Target("satlas", _neighbour("satlas", 3), lambda folder: _everything("satlas", folder, "train"),
           ("**/*.png", "**/*.json"), share=0.5),
    Target("ombria", _ombria, lambda folder: _everything("ombria", folder, "train"), ("**/*.png",)),
)  # fmt: skip
