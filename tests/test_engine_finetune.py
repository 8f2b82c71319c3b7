"""Evaluation counts each sample once for any number of processes and batch size; training steps are reproducible."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from engine_finetune import Augmentation, Evaluation, evaluate, extract_features, gather_in_order, train_one_epoch
from sarwmix.data.loader import build_loader
from sarwmix.mixup import Mixup
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import MultilabelTask, Predictor, build_task
from sarwmix.transforms import SarTransform
from tests.conftest import ROOT, clean_environment, mpirun_command
from tests.finetune_fixtures import MeanModel, MemoryDataset
from util.distributed import Processes
from util.errors import UserError
from util.log import Progress
from util.training import Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transform() -> SarTransform:
    return SarTransform(size=8, mean=(-19.0, -12.0), std=(5.0, 5.0))


def alone(value: object) -> list:
    return [value]


def run_evaluation(data: MemoryDataset, model: torch.nn.Module, batch_size: int) -> Evaluation:
    loader = build_loader(data, batch_size=batch_size, shuffle=False, drop_last=False)
    return evaluate(
        model,
        loader,
        task=MultilabelTask(data.spec.classes),
        transform=transform(),
        device=CPU,
        split="test",
        names=data.names,
        all_gather=alone,
        all_gather_arrays=alone,
    )


def in_processes(data: MemoryDataset, model: torch.nn.Module, batch_size: int, world: int) -> list[Evaluation]:
    """Evaluate with `world` processes in threads that meet at each gather, as collectives do."""
    import threading

    barrier, board = threading.Barrier(world), [None] * world
    results: list[Evaluation | None] = [None] * world
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        def gather(value: object) -> list:
            board[rank] = value
            barrier.wait(20)
            everything = list(board)
            barrier.wait(20)
            return everything

        loader = build_loader(data, batch_size=batch_size, shuffle=False, drop_last=False, rank=rank, world_size=world)
        try:
            results[rank] = evaluate(
                model,
                loader,
                task=MultilabelTask(data.spec.classes),
                transform=transform(),
                device=CPU,
                split="test",
                names=data.names,
                all_gather=gather,
                all_gather_arrays=gather,
            )
        except BaseException as error:  # noqa: BLE001 - reported by the test
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return [result for result in results if result is not None]


@pytest.mark.parametrize("count", [1, 2, 65, 130])
def test_metrics_do_not_depend_on_processes_or_batch_size(count: int) -> None:
    data = MemoryDataset(count)
    torch.manual_seed(0)
    model = MeanModel()
    task = MultilabelTask(data.spec.classes)
    reference = task.report(run_evaluation(data, model, 64).outputs)
    for batch_size in (1, 7, 64):
        for world in (1, 2, 3):
            for evaluation in in_processes(data, model, batch_size, world):
                assert len(evaluation.outputs["scores"]) == count
                assert np.array_equal(evaluation.outputs["target"], data.labels)
                report = task.report(evaluation.outputs)
                loss, expected = report.scalars.pop("loss"), reference.scalars["loss"]
                assert loss == pytest.approx(expected, abs=1e-5)
                assert report.scalars == {k: v for k, v in reference.scalars.items() if k != "loss"}


def test_outputs_come_in_the_order_of_the_data_set() -> None:
    data = MemoryDataset(20)
    torch.manual_seed(0)
    model = MeanModel().eval()
    evaluation = run_evaluation(data, model, 3)
    with torch.no_grad():
        logits = model(transform()(torch.from_numpy(data.images)).images)
    np.testing.assert_allclose(evaluation.outputs["scores"], torch.sigmoid(logits.double()).numpy(), atol=1e-5)
    assert list(evaluation.names) == list(data.names)


@pytest.mark.parametrize("indices", [[0, 1, 1, 2], [0, 1], [0, 1, 2, 3]])
def test_a_sample_lost_or_counted_twice_is_noticed(indices: list[int]) -> None:
    with pytest.raises(RuntimeError, match="has 3 samples"):
        gather_in_order(
            [torch.tensor(indices)],
            [{"x": torch.zeros(len(indices))}],
            count=3,
            split="val",
            all_gather=alone,
            all_gather_arrays=alone,
        )


def test_nan_logits_are_an_error_that_names_the_samples() -> None:
    data = MemoryDataset(6)
    model = MeanModel()

    class Broken(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = model(images)
            logits[1, 2] = float("nan")  # the second of each batch
            return logits

    with pytest.raises(UserError) as caught:
        run_evaluation(data, Broken(), 3)
    assert "2 of 6 samples of split test" in str(caught.value)
    assert "test_0001, test_0004" in str(caught.value)


def test_features_come_in_order_and_are_checked() -> None:
    data = MemoryDataset(11)
    model = MeanModel().eval()

    def extract() -> np.ndarray:
        return extract_features(
            model,
            build_loader(data, batch_size=4, shuffle=False, drop_last=False),
            task=MultilabelTask(data.spec.classes),
            transform=transform(),
            device=CPU,
            split="test",
            names=data.names,
            all_gather=alone,
            all_gather_arrays=alone,
        )

    with torch.no_grad():
        expected = model.forward_features(transform()(torch.from_numpy(data.images)).images).numpy()
    np.testing.assert_allclose(extract(), expected, atol=1e-5)
    data.images[5] = 1e30
    with pytest.raises(UserError, match="features of 1 samples .* test_0005"):
        extract()


def train(
    data: MemoryDataset,
    model: torch.nn.Module,
    augmentation: Augmentation,
    *,
    start_step: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int], bool] = lambda step: False,
    lr: float = 0.05,
    epoch: int = 0,
) -> tuple[torch.optim.Optimizer, float]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), fused=True)
    loader = build_loader(data, batch_size=8, shuffle=True, drop_last=True, seed=1)
    loader.set_epoch(epoch)
    result = train_one_epoch(
        Trainer(model, optimizer, processes=Processes(), output_dir=".", lr_at=lambda at: lr),
        loader.iter_from(start_step),
        task=MultilabelTask(data.spec.classes),
        transform=transform(),
        augmentation=augmentation,
        seed=1,
        epoch=epoch,
        steps=len(loader),
        start_step=start_step,
        progress=Progress(len(loader), title="", enabled=False),
        on_step=on_step,
    )
    return optimizer, result.stats["train_loss"]


EVERYTHING = Augmentation(Mixup(mixup=0.8, cutmix=1.0, mode="elem"), erase_prob=0.25, smoothing=0.1)


@pytest.mark.parametrize("augmentation", [Augmentation(), EVERYTHING], ids=["plain", "everything"])
def test_training_learns_and_stopping_in_the_middle_changes_nothing(augmentation: Augmentation) -> None:
    data = MemoryDataset(64)
    torch.manual_seed(0)
    whole = MeanModel()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    optimizer, first = train(data, whole, augmentation)

    parts = MeanModel()
    parts.load_state_dict(start)
    other, _ = train(data, parts, augmentation, on_step=lambda done: done == 3)
    torch.randn(100)  # whatever happens in between
    train(data, parts, augmentation, start_step=3, optimizer=other)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name

    for epoch in range(1, 20):
        _, last = train(data, whole, augmentation, optimizer=optimizer, epoch=epoch)
    assert last < 0.9 * first


def test_mixing_reaches_the_loss() -> None:
    """With labels mixed, the loss of a model that answers the unmixed labels perfectly is not 0."""
    data = MemoryDataset(8)

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.scale * 50 * torch.ones(len(images), 4)

    data.labels[:] = 1  # type: ignore[index]
    data.labels[::2] = 0  # type: ignore[index]
    _, plain = train(data, Oracle(), Augmentation(), lr=1e-9)
    _, smooth = train(data, Oracle(), Augmentation(smoothing=0.2), lr=1e-9)
    assert plain == pytest.approx(25, abs=0.01)  # half of the labels are wrong by a logit of 50
    assert smooth == pytest.approx(25, abs=0.01)  # smoothing is symmetric here
    data.labels[:] = 1  # type: ignore[index]
    _, plain = train(data, Oracle(), Augmentation(), lr=1e-9)
    _, smooth = train(data, Oracle(), Augmentation(smoothing=0.2), lr=1e-9)
    assert plain == pytest.approx(0, abs=0.01)
    assert smooth == pytest.approx(0.1 * 50, abs=0.01)


SCRIPT = """
import json, sys
import numpy as np, torch
from engine_finetune import evaluate
from sarwmix.data.loader import build_loader
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import MultilabelTask, Predictor, build_task
from tests.finetune_fixtures import MeanModel, MemoryDataset
from tests.test_engine_finetune import transform
from util.distributed import setup_processes
from util.training import Trainer

processes = setup_processes(device="cpu")
torch.set_num_threads(1)
found = {}
for count in (2, 65):
    data, task = MemoryDataset(count), MultilabelTask([f"class {k}" for k in range(4)])
    torch.manual_seed(0)
    model = MeanModel()
    for batch_size in (1, 7, 64):
        loader = build_loader(data, batch_size=batch_size, shuffle=False, drop_last=False, rank=processes.rank,
                              world_size=processes.world_size)
        evaluation = evaluate(model, loader, task=task, transform=transform(), device=processes.device, split="test",
                              names=data.names, all_gather=processes.all_gather_objects,
                              all_gather_arrays=processes.all_gather_arrays)
        assert len(evaluation.outputs["scores"]) == len(data)
        scalars = task.report(evaluation.outputs).scalars
        scalars.pop("loss")
        found[f"{count} {batch_size}"] = scalars
if processes.is_main:
    print("RESULT " + json.dumps(found))
processes.close()
"""


@pytest.mark.mpi
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_real_processes_give_the_same_metrics(world: int, tmp_path: Path) -> None:
    import subprocess

    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    command = [*mpirun_command(world), sys.executable, str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=clean_environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT ")).removeprefix("RESULT "))
    assert len(found) == 6
    for case, scalars in found.items():
        data = MemoryDataset(int(case.split()[0]))
        torch.manual_seed(0)
        expected = MultilabelTask(data.spec.classes).report(run_evaluation(data, MeanModel(), 64).outputs).scalars
        expected.pop("loss")
        assert scalars == expected, case


def test_a_compiled_model_meets_one_size_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short last batch is filled up, so that nothing is compiled for it; its outputs are the same."""
    task = build_task("multilabel", ("a", "b", "c"))
    torch.manual_seed(0)
    model = task.build_model(ModelSettings("mixmim_tiny", 128, 2))
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(7, 2, 128, 128)
    plain = Predictor(model, torch.device("cpu"), None)
    expected = [plain(images[:4]), plain(images[4:])]
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_blocks(backend=counter)
    predictor = Predictor(model, torch.device("cpu"), None)
    with torch.no_grad():
        found = [predictor(images[:4])]
        compiled = counter.frame_count
        found.append(predictor(images[4:]))
    assert counter.frame_count == compiled > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
