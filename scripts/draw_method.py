#!/usr/bin/env python3
"""Draw what the method does to two patches: mixing by cells, and loss weights from backscatter.

It made docs/figures/method.png:

    python scripts/draw_method.py --data_path data/demo --out docs/figures/method.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.args import Parser
from util.cli import run_cli
from util.errors import UserError


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="demo", help="registered data set (default: %(default)s)")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="its data")
    parser.add_argument("--names", nargs=2, metavar="NAME", help="two patches (not given: two with much contrast)")
    parser.add_argument("--seed", type=int, default=2, help="of the mask (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write")
    args = parser.parse_args()

    import numpy as np
    import torch

    from sarwmix.data.registry import build_dataset
    from sarwmix.figures.method import method_figure
    from sarwmix.transforms import resize

    data = build_dataset(args.dataset, args.data_path, "train")
    known = list(data.names)
    if args.names:
        for name in args.names:
            if name not in known:
                raise UserError(f"{args.data_path} has no training patch {name!r}; the first is {known[0]!r}")
        chosen = [known.index(name) for name in args.names]
    else:
        some = range(min(256, len(data)))
        spread = [float(np.nanstd(data.read(i)[-1])) for i in some]
        chosen = list(np.argsort(spread)[-2:])
    pair = torch.from_numpy(np.stack([data.read(int(i)) for i in chosen]))
    mask = torch.zeros(16)
    mask[torch.randperm(16, generator=torch.Generator().manual_seed(args.seed))[:8]] = 1
    band = len(data.spec.bands) - 1
    method_figure(args.out, resize(pair, 128)[:, band : band + 1].numpy(), mask.numpy(), band=data.spec.bands[band])
    print(f"written: {args.out}")


if __name__ == "__main__":
    run_cli(main)
