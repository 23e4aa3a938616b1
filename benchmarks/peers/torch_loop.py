"""PyTorch: a hand-written loop over tensors that already lie on the device."""

import time
from collections.abc import Callable
from itertools import count

import torch
from torch import nn

from benchmarks.peers import EPSILON, LEARNING_RATE, PROBE, RHO, Data, Job, Peer


class Branched(nn.Module):
    def __init__(self):
        super().__init__()

        def block(inputs, features):
            conv = nn.Conv2d(inputs, features, 3, padding=1)
            return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))

        self.trunk = block(1, 32)
        self.branches = nn.ModuleList(
            nn.Sequential(block(32, 64), block(64, 256)) for _ in range(2)
        )
        sizes = (2 * 256 * 3 * 3, 1000, 500)
        self.dense = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))
        self.logits = nn.Linear(sizes[-1], 10)

    def forward(self, x):
        x = self.trunk(x)
        x = torch.cat([branch(x) for branch in self.branches], dim=1).flatten(1)
        for layer in self.dense:
            x = layer(x).relu()
        return self.logits(x)


def network(spec: dict | None) -> nn.Module:
    if spec is None:
        return Branched()
    modules, channels, size = [], 1, 28
    for features, kernel, pooled in spec["convs"]:
        modules += [nn.Conv2d(channels, features, kernel), nn.ReLU()]
        channels, size = features, size - kernel + 1
        if pooled:
            modules, size = [*modules, nn.MaxPool2d(2)], size // 2
    modules += [nn.Dropout(spec["conv_dropout"]), nn.Flatten()]
    inputs = channels * size * size
    for features in spec["dense"]:
        modules += [nn.Linear(inputs, features), nn.ReLU()]
        inputs = features
    return nn.Sequential(*modules, nn.Dropout(spec["dense_dropout"]), nn.Linear(inputs, 10))


def captured(step: Callable[[torch.Tensor], None], row: torch.Tensor) -> Callable:
    """A step that replays one CUDA graph of all its kernels, as PyTorch's notes on graphs show."""
    static_row = row.clone()
    # A few steps beforehand, for what is made in the first.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static_row)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(static_row)

    def replay(row: torch.Tensor) -> None:
        static_row.copy_(row)
        graph.replay()

    return replay


def create(job: Job, data: Data, variant: str) -> Peer:
    device = "cuda" if job.device == "gpu" else "cpu"
    # TF32, as the other frameworks use on GPU by default.
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    torch.backends.cudnn.benchmark = True
    layout = torch.contiguous_format if variant == "eager" else torch.channels_last
    images = torch.from_numpy(data.images)
    # With one channel both are contiguous, and the strides decide in which convolutions compute.
    if layout == torch.channels_last:
        images = images.permute(0, 3, 1, 2)
    else:
        images = images.reshape(-1, 1, 28, 28)
    images = images.to(device, torch.float32) / 255
    labels = torch.from_numpy(data.labels).to(device, torch.int64)
    rows = torch.from_numpy(data.rows).to(device, torch.int64)

    model = network(job.spec).to(device, memory_format=layout)
    capturable = variant in ("graph", "compile_graph")
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = (
        torch.optim.Adam(
            model.parameters(), LEARNING_RATE, eps=EPSILON, fused=True, capturable=capturable
        )
        if job.optimizer == "adam"
        else torch.optim.RMSprop(
            # It adds epsilon to the root, where Keras adds it inside.
            model.parameters(),
            LEARNING_RATE,
            alpha=RHO,
            eps=EPSILON**0.5,
            foreach=True,
            capturable=capturable,
        )
    )
    mixed = torch.autocast(device, torch.bfloat16, enabled=job.dtype == "bfloat16")
    cross_entropy = nn.CrossEntropyLoss()
    total, correct = torch.zeros((), device=device), torch.zeros((), device=device)

    def measure(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with mixed:
            logits = model(x)
            loss = cross_entropy(logits, y)
        return loss, (logits.detach().argmax(1) == y).sum()

    if variant in ("compile", "compile_graph"):
        measure = torch.compile(measure)
    elif variant == "cudagraphs":
        measure = torch.compile(measure, mode="reduce-overhead")

    def step(row: torch.Tensor) -> None:
        optimizer.zero_grad()
        # Not within what is compiled, whose graphs would copy all images in each step.
        loss, right = measure(images[row], labels[row])
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())
        correct.add_(right)

    if capturable:
        step = captured(step, rows[0])
    turn = count()

    def run(steps: int) -> tuple[int, float]:
        total.zero_(), correct.zero_()
        clock = time.perf_counter()
        for _ in range(steps):
            step(rows[next(turn) % len(rows)])
        # Waits for the device.
        total.item(), correct.item()
        return steps, time.perf_counter() - clock

    @torch.no_grad()
    def loss() -> float:
        model.eval()
        value = cross_entropy(model(images[PROBE]), labels[PROBE]).item()
        model.train()
        return value

    memory = torch.cuda.max_memory_allocated if device == "cuda" else lambda: None
    return Peer(parameters, run, loss, memory)
