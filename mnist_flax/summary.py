"""Prints a network layer by layer: python -m mnist_flax.summary larger"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnist_flax import cli, layers, models
from mnist_flax.errors import UserError
from mnist_flax.state import count_parameters


class Row(NamedTuple):
    """One layer: its name and type, output shape without the batch, and parameters."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int


def rows(model: nn.Module, image_shape: tuple[int, int, int] = (28, 28, 1)) -> list[Row]:
    """The layers of a network in the order in which they run; nothing is computed.

    Raises:
        UserError: the images are too small for the network.
    """
    found: list[Row] = []

    def note(next_call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or module.scope.path == ():
            return next_call(*args, **kwargs)
        name, place = "/".join(module.scope.path), len(found)
        found.append(None)
        y = next_call(*args, **kwargs)
        shape = y.shape[1:]
        if isinstance(module, layers.Conv):
            # Of a pooled convolution this is the shape before its pool, which has its own row.
            size = layers.conv_output_size(args[0].shape[1:3], module.kernel_size, module.padding)
            shape = (*size, module.features)
            if module.pool:
                found.append(Row(f"{name}/pool", "MaxPool", y.shape[1:], 0))
        parameters = count_parameters(module.variables.get("params", {}))
        found[place] = Row(name, type(module).__name__, shape, parameters)
        return y

    with nn.intercept_methods(note):
        # The arguments inside as well: nothing is to be computed, on no device.
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape))))
    return found


def table(title: str, layer_rows: list[Row], image_shape: tuple[int, int, int]) -> str:
    """The layers as Keras's `model.summary()` shows them."""
    head = ("Layer (type)", "Output shape", "Parameters")
    body = [("input", str((None, *image_shape)), "0")] + [
        (f"{row.name} ({row.kind})", str((None, *row.shape)), f"{row.parameters:,}")
        for row in layer_rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in (head, *body)]
    rule = "─" * len(lines[0])
    total = sum(row.parameters for row in layer_rows)
    return "\n".join(
        [f"Network: {title}", lines[0], rule, *lines[1:], rule]
        + [f"Total parameters: {total:,} ({4 * total / 2**20:.2f} MiB in float32)"]
    )


def main() -> None:
    parser = cli.parser("mnist_flax.summary", __doc__)
    parser.add_argument("network", metavar="NETWORK", help=", ".join(models.names()))
    parser.add_argument("--image-shape", default="28,28,1", help="height,width,channels")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    args = parser.parse_args()
    try:
        height, width, channels = (int(n) for n in args.image_shape.split(","))
    except ValueError:
        raise UserError(
            f"--image-shape={args.image_shape} must be height,width,channels, such as 28,28,1"
        ) from None
    if min(height, width, channels, args.classes) < 1:
        raise UserError("--image-shape and --classes must be at least 1")
    shape = (height, width, channels)
    model = models.create(args.network, num_classes=args.classes)
    print(table(args.network, rows(model, shape), shape))


if __name__ == "__main__":
    cli.run(main)
