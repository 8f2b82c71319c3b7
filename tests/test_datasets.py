"""The base class: samples, batches, names in flat memory, unreadable samples."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from sarwmix.data import registry
from sarwmix.data.base import NameList, SarDataset, UnreadableSample, finish_image
from util.errors import UserError

SPEC = registry.get_spec("benv2")


class Memory(SarDataset):
    """Image i is the constant i; some indices cannot be read."""

    def __init__(self, count: int = 10, bad: tuple[int, ...] = (), **options: str) -> None:
        labels = np.zeros((count, 19), dtype=np.uint8)
        labels[np.arange(count), np.arange(count) % 19] = 1
        names = [f"patch_{i}" for i in range(count)]
        super().__init__(SPEC, "train", registry.BENV2_STATISTICS, names, labels, **options)
        self.bad = bad

    def read_into(self, index: int, out: np.ndarray) -> None:
        if index in self.bad:
            raise UnreadableSample(self.names[index], f"/data/{index}.tif", "truncated")
        out[...] = index
        out[0, 0, 0] = np.nan


def test_sample() -> None:
    sample = Memory()[3]
    assert set(sample) == {"image", "label", "valid", "name"}
    assert sample["image"].shape == (2, 120, 120)
    assert sample["image"].dtype == torch.float32
    assert sample["label"].dtype == torch.float32
    assert sample["label"].nonzero().flatten().tolist() == [3]
    assert sample["valid"].dtype == torch.bool
    assert not sample["valid"][0, 0, 0]
    assert int(sample["valid"].sum()) == 2 * 120 * 120 - 1
    assert sample["name"] == "patch_3"
    assert Memory()[-1]["name"] == "patch_9"
    with pytest.raises(IndexError):
        Memory()[10]


def test_batch() -> None:
    batch = Memory().get_batch(np.array([4, 0, 9]))
    assert batch["image"][:, 1, 5, 5].tolist() == [4.0, 0.0, 9.0]
    assert batch["index"].tolist() == [4, 0, 9]
    assert batch["name"] == ["patch_4", "patch_0", "patch_9"]
    assert batch["label"].argmax(1).tolist() == [4, 0, 9]
    assert batch["replaced"] == []


def test_batch_into_a_given_buffer() -> None:
    out = np.empty((2, 2, 120, 120), dtype=np.float32)
    batch = Memory().get_batch(np.array([1, 2]), out)
    assert batch["image"].data_ptr() == out.ctypes.data


def test_unreadable_sample_stops_or_is_replaced() -> None:
    with pytest.raises(UnreadableSample, match=r"patch_3 cannot be used: /data/3.tif: truncated"):
        Memory(bad=(3,)).get_batch(np.array([2, 3]))
    batch = Memory(bad=(3, 4), on_error="replace").get_batch(np.array([2, 3, 7]))
    assert batch["index"].tolist() == [2, 5, 7]
    assert batch["name"] == ["patch_2", "patch_5", "patch_7"]
    assert batch["label"].argmax(1).tolist() == [2, 5, 7]
    assert batch["image"][1, 1, 3, 3] == 5
    assert batch["replaced"] == [("patch_3", "/data/3.tif: truncated")]
    # The order wraps around at the end.
    assert Memory(bad=(9,), on_error="replace").get_batch(np.array([9]))["index"].tolist() == [0]


def test_too_many_unreadable_neighbours_are_an_error() -> None:
    with pytest.raises(UnreadableSample, match="the next 8 samples cannot be used either"):
        Memory(count=20, bad=tuple(range(5, 14)), on_error="replace").get_batch(np.array([5]))
    assert Memory(count=20, bad=tuple(range(5, 13)), on_error="replace").get_batch(np.array([5]))["index"] == 13


def test_unreadable_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(UnreadableSample("a", "/b", "c")))
    assert (error.name, error.path, error.reason) == ("a", "/b", "c")
    assert isinstance(error, UserError)


def test_empty_and_double_names_are_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        Memory(count=0)
    with pytest.raises(UserError, match="'b' appears twice"):
        SarDataset(SPEC, "train", registry.BENV2_STATISTICS, ["a", "b", "cc", "b"], None)
    with pytest.raises(UserError, match="1 labels for 2"):
        SarDataset(SPEC, "train", registry.BENV2_STATISTICS, ["a", "b"], np.zeros((1, 19), np.uint8))


def test_identity_depends_on_names_and_order_only() -> None:
    def identity(names: list[str]) -> dict[str, str | int]:
        return SarDataset(SPEC, "train", registry.BENV2_STATISTICS, names, None).identity()

    assert identity(["a", "bc"]) == identity(["a", "bc"])
    assert identity(["a", "bc"]) != identity(["bc", "a"])
    assert identity(["a", "bc"]) != identity(["ab", "c"])
    assert identity(["a", "bc"])["count"] == 2


def test_unlabelled_batches_have_no_label() -> None:
    dataset = Memory()
    dataset.labels = None
    assert "label" not in dataset.get_batch(np.array([1]))
    assert "label" not in dataset[1]


def test_class_numbers_stay_integers() -> None:
    dataset = Memory()
    dataset.labels = np.arange(10, dtype=np.int64)
    assert dataset.get_batch(np.array([4, 2]))["label"].tolist() == [4, 2]
    assert dataset[7]["label"].dtype == torch.int64


def test_subset() -> None:
    part = Memory(bad=(3,), on_error="replace").subset(np.array([8, 3, 1]))
    assert list(part.names) == ["patch_8", "patch_3", "patch_1"]
    batch = part.get_batch(np.array([0, 1, 2]))
    assert batch["image"][:, 1, 1, 1].tolist() == [8.0, 1.0, 1.0]
    assert batch["replaced"][0][0] == "patch_3"
    assert part[0]["label"].argmax() == 8


def test_names() -> None:
    words = ["alpha", "", "βeta", "c"]
    names = NameList.of(words)
    assert list(names) == words
    assert names[-1] == "c"
    assert list(names[1:3]) == words[1:3]
    assert list(names.take(np.array([3, 0, 0]))) == ["c", "alpha", "alpha"]
    assert names.take(np.array([3, 0, 0])).first_duplicate() == "alpha"
    assert names.first_duplicate() is None
    with pytest.raises(IndexError):
        names[4]
    many = NameList.of(f"S1A_patch_{i}" for i in range(5000))
    assert many.first_duplicate() is None
    assert many[4321] == "S1A_patch_4321"


def test_finish_image() -> None:
    image = np.zeros((2, 4, 4), dtype=np.float32)
    image[0, 0, 0], image[1, 1, 1], image[1, 2, 2] = np.inf, -np.inf, np.nan
    finish_image(image, "a", "p")
    assert np.isnan(image).sum() == 3
    image[1] = np.nan
    with pytest.raises(UnreadableSample, match="no valid pixel in band 1"):
        finish_image(image, "a", lambda: "place")
