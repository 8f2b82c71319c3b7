"""Steps as CUDA graphs, without a GPU: a stand-in records by keeping the work and launches it on the same memory.

What is checked is all that surrounds a graph: fixed inputs, gradients that stay in place, accumulation, short last
groups, random numbers, running statistics, and the mean over processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_engine_pretrain import batches, build_trainer, epoch, tiny

from engine_finetune import Augmentation
from engine_finetune import train_one_epoch as finetune_epoch
from sarwmix.mixup import Mixup
from sarwmix.models.settings import ModelSettings
from sarwmix.tasks.base import build_task
from sarwmix.transforms import SarTransform
from util.cuda_graph import StepGraphs, is_recording
from util.distributed import Processes, average_gradients
from util.errors import UserError
from util.log import Progress
from util.training import arrange


def graphs_of(model: torch.nn.Module) -> tuple[StepGraphs, list[int]]:
    """Graphs by a stand-in for CUDA's, and how often one was recorded and launched."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    counts = [0, 0]

    def capture(work: Any, pool: Any) -> tuple[Any, torch.Tensor, Any]:
        assert is_recording()
        counts[0] += 1
        result = work().clone()
        memory = [p.grad for p in parameters]

        def launch() -> None:
            counts[1] += 1
            others = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            result.copy_(work())
            for p, kept, other in zip(parameters, memory, others, strict=True):
                kept.copy_(p.grad)
                p.grad = other

        return launch, result, None

    return StepGraphs(model, parameters, capture), counts


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_pretraining_is_the_same(accum_iter: int, tmp_path: Path) -> None:
    """5 batches in groups of 2: the last group is shorter, its losses are divided by another number."""
    states = []
    for graphed in (False, True):
        model = tiny()
        graphs, counts = graphs_of(model)
        trainer = build_trainer(model, tmp_path, accum_iter=accum_iter, graphs=graphs if graphed else None)
        for number in range(2):
            result = epoch(trainer, batches(5), epoch=number)
        states.append((model.state_dict(), result.stats["train_loss"], result.stats["grad_norm"]))
    (one, loss, norm), (other, graph_loss, graph_norm) = states
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (loss, norm) == (graph_loss, graph_norm)
    assert counts == [accum_iter, 10]  # one for each size of a group


def test_finetuning_is_the_same_with_everything_random(tmp_path: Path) -> None:
    """Drop path, dropout, mixing and erasing draw the same numbers; running statistics see each batch once."""
    states = []
    for graphed in (False, True):
        torch.manual_seed(0)
        task = build_task("multilabel", ("a", "b", "c"))
        model = task.build_model(ModelSettings("mixmim_tiny", 128, 2, drop_path_rate=0.3, drop_rate=0.2))
        model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(model.num_features), model.head)
        loader = batches(4)
        for batch in loader:
            batch["label"] = torch.tensor([[1.0, 0, 1]]).expand(4, 3)
        graphs, _ = graphs_of(model)
        trainer = build_trainer(model, tmp_path, graphs=graphs if graphed else None)
        finetune_epoch(
            trainer,
            loader,
            task=task,
            transform=SarTransform(size=128, mean=(-19.2, -12.5), std=(5.4, 5.0)),
            augmentation=Augmentation(Mixup(0.5), erase_prob=0.5, smoothing=0.1),
            seed=0,
            epoch=0,
            steps=4,
            progress=Progress(4, title="", enabled=False),
        )
        states.append(model.state_dict())
    assert int(states[0]["head.0.num_batches_tracked"]) == 4
    different = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    # The stand-in computes a batch twice when it records, so that statistics of a forward pass move once more.
    assert all("running" in key or "tracked" in key for key in different)


def test_many_shapes_are_refused() -> None:
    model = torch.nn.Linear(3, 1)
    graphs, counts = graphs_of(model)

    def work(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).sum()
        loss.backward()
        return loss.detach()

    for rows in range(1, 9):
        assert graphs.run(work, torch.ones(rows, 3), first=True, last=True) == model(torch.ones(rows, 3)).sum()
    assert counts == [8, 8]
    with pytest.raises(RuntimeError, match="--cuda_graph met 9 different shapes"):
        graphs.run(work, torch.ones(9, 3), first=True, last=True)


def test_refusals() -> None:
    with pytest.raises(UserError, match="--cuda_graph needs a CUDA device, this run computes on cpu"):
        arrange(torch.nn.Linear(1, 1), Processes(), cuda_graph=True)
    several = Processes(rank=0, world_size=2, device=torch.device("cuda", 0))
    with pytest.raises(UserError, match="BatchNorm"):
        arrange(torch.nn.BatchNorm1d(3), several, cuda_graph=True)


def _average(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (5, 1))]
    for number, parameter in enumerate(parameters[:2]):  # the last one has no gradient
        parameter.grad = torch.full(parameter.shape, float(10 * number + rank))
    places = [p.grad.data_ptr() for p in parameters[:2]]
    average_gradients(parameters, Processes(rank=rank, world_size=2), most=6)
    assert [p.grad.data_ptr() for p in parameters[:2]] == places  # in place: the graph writes there again
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 0.5))
    assert torch.equal(parameters[1].grad, torch.full((4,), 10.5))
    assert parameters[2].grad is None
    dist.destroy_process_group()


def test_gradients_are_averaged_in_place(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_average, args=(f"file://{tmp_path / 'meet'}",), nprocs=2)
