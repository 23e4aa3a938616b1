"""A PyTorch script: read MNIST, train one epoch, evaluate."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.peers import torch_loop


def run(folder: str) -> None:
    job = json.loads(Path(folder, "job.json").read_text())
    with np.load(Path(folder, "data.npz")) as data:
        device = "cuda" if job["device"] == "gpu" else "cpu"
        tensors = {name: torch.from_numpy(data[name]).to(device) for name in data.files}
    images = {k: tensors[f"x_{k}"].permute(0, 3, 1, 2).float() / 255 for k in ("train", "test")}
    labels = {k: tensors[f"y_{k}"].long() for k in ("train", "test")}
    model = torch_loop.network(job["spec"]).to(device)
    make = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[job["optimizer"]]
    optimizer, cross_entropy = make(model.parameters()), nn.CrossEntropyLoss()
    rows = torch.randperm(len(labels["train"])).split(job["batch_size"])
    for step, row in enumerate(rows):
        optimizer.zero_grad()
        loss = cross_entropy(model(images["train"][row]), labels["train"][row])
        loss.backward()
        optimizer.step()
        if step == 0:
            # Waits for the device.
            loss.item()
            print("first step at", time.time())
    model.eval()
    with torch.no_grad():
        chunks = zip(images["test"].split(500), labels["test"].split(500), strict=True)
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in chunks)
    print(loss.item(), right / len(labels["test"]))


if __name__ == "__main__":
    run(*sys.argv[1:])
