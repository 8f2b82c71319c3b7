#!/usr/bin/env python3
"""Does weighting the loss by backscatter help? The study of docs/weighting_study.md, arm by arm and seed by seed.

    python scripts/weighting_study.py --data_path OMBRIA --seeds 1 2 3 4     # runs what has no record yet
    python scripts/weighting_study.py --report                               # table and figure from the records

Each run pretrains mixmim_tiny on pairs before and after floods, without labels, and probes the cells of the pairs whose
masks fit, one event left out at a time. A finished run leaves one small record in --records; records that are there are
not made again, so that the study can be stopped, continued and added to anywhere.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util.args import Parser
from util.cli import run_cli
from util.errors import EXIT_OK, UserError
from util.files import atomic_write, make_directory, read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

    from models_mixmim import MixMIM
    from sarwmix.data.base import SarDataset

RECORDS = ROOT / "docs" / "weighting_study"
RANDOM = "random start"
REFERENCE = "none"
ARMS: dict[str, str] = {
    RANDOM: "",
    REFERENCE: "--weight_mode none",
    "stated default": "",
    "released form": "--weight_domain zscore --weight_level pixel",
    "dB, data-set range, s = 3": "--weight_domain db --weight_norm dataset --weight_exp_scale 3",
    "noise": "--weight_mode noise",
    "8 x 8 looks, no weights": "--weight_mode none --target_looks 8",
    "dB, s = 3, permuted": "--weight_domain db --weight_norm dataset --weight_exp_scale 3 --weight_permute",
}
STEPS, BATCH, RATE, WARMUP = 250, 16, 2e-3, 40
SIZE = 128
"""Part of the definition of the study; docs/weighting_study.md says how they were found."""


def get_parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").split("\n\n")
    parser = Parser(
        description=text[0],
        epilog=f"{text[1]}\n\n{text[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_path", default="", metavar="DIR", help="a clone of OMBRIA")
    parser.add_argument("--records", default=str(RECORDS), metavar="DIR", help="folder of the records")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="seed by seed, all arms of each")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="NAME", help="which arms")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="steps of pretraining; part of a record")
    parser.add_argument(
        "--report", action="store_true", help="table.md and differences.png from the records, and leave"
    )
    return parser


def main() -> int:
    args = get_parser().parse_args()
    records = make_directory(args.records)
    if args.report:
        report(records)
        return EXIT_OK
    if not args.data_path:
        raise UserError("--data_path is missing: the folder of a clone of OMBRIA")
    study = Study(args.data_path, args.steps)
    for seed in args.seeds:
        for arm in args.arms:
            path = records / f"{re.sub('[^A-Za-z0-9]+', '_', arm)}-steps{args.steps}-seed{seed}.json"
            if path.is_file():
                known = read_json(path)
                if known["flags"] != ARMS[arm]:
                    raise UserError(f"{path} was made with {known['flags']!r}, not {ARMS[arm]!r}; move it away")
                continue
            record = study.run(arm, seed)
            write_json(path, record)
            print(f"seed {seed}  {arm}: AP {record['ap']:.4f}, {record['cpu_s']:.0f} s of CPU", flush=True)
    return EXIT_OK


def report(folder: Path) -> None:
    """table.md and differences.png from the records of a folder; seeds that lack an arm are left out."""
    import numpy as np

    from sarwmix.reports.differences import as_markdown, compare_arms, draw

    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    seeds = sorted({record["seed"] for record in found})
    complete = [seed for seed in seeds if {r["arm"] for r in found if r["seed"] == seed} >= set(ARMS)]
    if not complete:
        raise UserError(f"{folder} has no seed with a record of each of the {len(ARMS)} arms yet")
    events = sorted(found[0]["ap_of_event"])
    values = {arm: {r["seed"]: np.array([r["ap_of_event"][event] for event in events])
                    for r in found if r["arm"] == arm and r["seed"] in complete} for arm in ARMS}  # fmt: skip
    arms = compare_arms(values, REFERENCE, untested=[RANDOM])
    hours = sum(record["cpu_s"] for record in found) / 3600
    text = as_markdown(arms, "AP", REFERENCE)
    of = ", ".join(map(str, complete))
    text += f"\n{len(found)} runs on record, {hours:.2f} core-hours; seeds in the table: {of}.\n"
    with atomic_write(folder / "table.md", "w") as stream:
        stream.write(text)
    draw(arms, folder / "differences.png", metric="average precision", reference=REFERENCE)
    print(text)


class Study:
    """The data in memory, and the runs over them."""

    def __init__(self, data_path: str, steps: int) -> None:
        import numpy as np
        import torch

        from sarwmix.data.registry import build_dataset
        from sarwmix.finetune.cells import cell_shares

        self.steps = steps
        everything = "train+val+test"
        self.data: SarDataset = build_dataset("ombria", data_path, everything)
        self.images = torch.cat([self.data[i]["image"][None] for i in range(len(self.data))])  # (N, 2, 256, 256) dB
        probed = build_dataset("ombria", data_path, everything, masks="agreeing")
        batch = probed.get_batch(np.arange(len(probed)))
        # Two tiles of each pair, on the diagonal: neighbours add little.
        self.tiles = torch.cat([batch["image"][..., :SIZE, :SIZE], batch["image"][..., SIZE:, SIZE:]])
        labels = torch.cat([batch["label"][..., :SIZE, :SIZE], batch["label"][..., SIZE:, SIZE:]]).numpy()
        self.target = (cell_shares(labels) > 0.5).astype(np.float64)
        events = np.array([name.split("_")[0] for name in batch["name"]] * 2)
        self.events = np.repeat(events, (SIZE // 32) ** 2)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """One arm with one seed: pretraining, then the probe."""
        import torch

        from models_mixmim import MixMIM, model_config

        began = time.process_time()
        torch.manual_seed(seed)
        model = MixMIM(img_size=SIZE, in_chans=2, norm_pix_loss=True, **model_config("mixmim_tiny"))
        losses = [] if arm == RANDOM else self.pretrain(model, ARMS[arm], seed)
        trained = time.process_time() - began
        scores = self.probe(model)
        from sarwmix.finetune.cells import precision_by_cluster

        ap = precision_by_cluster(scores, self.target, self.events)
        return {
            "arm": arm,
            "flags": ARMS[arm],
            "seed": seed,
            "steps": 0 if arm == RANDOM else self.steps,
            "batch_size": BATCH,
            "lr": RATE,
            "ap": sum(ap.values()) / len(ap),
            "ap_of_event": {event: round(value, 5) for event, value in ap.items()},
            "loss": [round(value, 4) for value in losses],
            "cpu_s": round(time.process_time() - began, 1),
            "cpu_s_pretraining": round(trained, 1),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }

    def pretrain(self, model: MixMIM, flags: str, seed: int) -> list[float]:
        """Pretrain in place; returns the mean loss of each tenth of the steps."""
        import torch

        import main_pretrain
        from sarwmix.transforms import draw_flips
        from util.optim import build_adamw, parameter_groups
        from util.schedule import learning_rate
        from util.seeding import step_generator

        args = main_pretrain.get_parser().parse_args(["--dataset", "ombria", "--data_path", ".", *shlex.split(flags)])
        options = main_pretrain.weight_options(args)
        transform = main_pretrain.make_transform(self.data, SIZE, options, args.target, args.target_looks)
        optimizer = build_adamw(parameter_groups(model, weight_decay=0.05), lr=RATE, betas=(0.9, 0.95))
        losses: list[float] = []
        model.train()
        for step in range(self.steps):
            rate = learning_rate(step, lr=RATE, min_lr=0.0, warmup_epochs=WARMUP, epochs=self.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Equal seeds see equal crops, flips and masks in all arms.
            draw = step_generator(seed, 0, step, 0, "crops")
            chosen = torch.randint(len(self.images), (BATCH,), generator=draw).tolist()
            corners = torch.randint(self.images.shape[-1] - SIZE + 1, (BATCH, 2), generator=draw).tolist()
            crops = torch.stack([self.images[i, :, y : y + SIZE, x : x + SIZE]
                                 for i, (y, x) in zip(chosen, corners, strict=True)])  # fmt: skip
            flips = draw_flips(BATCH, step_generator(seed, 0, step, 0, "flips"))
            batch = transform(crops, flips, transform.draw_order(step_generator(seed, 0, step, 0, "weights")))
            mask = model.draw_mask(0.5, step_generator(seed, 0, step, 0, "mask"))
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch.images, batch.weights, mask=mask, target=batch.target).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        tenth = max(1, self.steps // 10)
        return [sum(losses[i : i + tenth]) / len(losses[i : i + tenth]) for i in range(0, self.steps, tenth)]

    def probe(self, model: MixMIM) -> np.ndarray:
        """Scores of all cells, each by a regression that did not see its event."""
        import torch

        from sarwmix.finetune.cells import cell_features, leave_clusters_out

        model.eval()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.data.statistics.mean, self.data.statistics.std))
        with torch.no_grad():
            parts = [cell_features(model.feature_pyramid((tiles - mean) / std), SIZE // 32)
                     for tiles in self.tiles.split(64)]  # fmt: skip
        features: torch.Tensor = torch.cat(parts)
        return leave_clusters_out(features.numpy(), self.target, self.events)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_cli(main)
