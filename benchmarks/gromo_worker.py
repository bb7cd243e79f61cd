"""GroMo's growth step, timed in a process of its own that holds torch and no jax; prints JSON for growth_stall.py."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time

import numpy as np
import torch
from gromo.containers.growing_mlp import GrowingMLP


def main() -> None:
    """Train, grow once, train on; print the seconds of each step."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("data", help="an .npz file with x [N, D] float32 and y [N] int")
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--at", type=int, default=200)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--width", type=int, default=64)
    made.add_argument("--add", type=int, default=16, help="neurons to add, at most")
    made.add_argument("--seed", type=int, default=0)
    args = made.parse_args()
    torch.manual_seed(args.seed)
    with np.load(args.data) as data:
        x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
    model = GrowingMLP(x.shape[1], int(y.max()) + 1, args.width, 2, activation=torch.nn.ReLU())
    cut = [slice(i, i + args.batch) for i in range(0, len(x) - args.batch + 1, args.batch)]
    mean = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before_growth = model.number_of_parameters()
    seconds = []
    before = time.perf_counter()
    for i in range(args.steps):
        if i == args.at:
            grow(model, [(x[c], y[c]) for c in cut], args.add)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        part = cut[i % len(cut)]
        optimizer.zero_grad()
        loss = mean(model(x[part]), y[part])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    result = {
        "seconds": seconds,
        "at": args.at,
        "parameters": [before_growth, model.number_of_parameters()],
        "gromo": importlib.metadata.version("gromo"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    json.dump(result, sys.stdout)


def grow(model: GrowingMLP, batches: list[tuple[torch.Tensor, torch.Tensor]], most: int) -> None:
    """One growth step as GroMo's own examples do it: statistics over the training data, optimal update, apply."""
    total = torch.nn.CrossEntropyLoss(reduction="sum")
    model.set_growing_layers(index=0)
    model.init_computation()
    for x, y in batches:
        model.zero_grad()
        total(model(x), y).backward()
        model.update_computation()
    model.compute_optimal_updates(maximum_added_neurons=most)
    model.reset_computation()
    model.dummy_select_update()
    model.set_scaling_factor(1.0)
    model.apply_change()


if __name__ == "__main__":
    main()
