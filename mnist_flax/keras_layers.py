"""The networks as Keras describes them: what a Keras configuration says, and what it should say.

A network is a list of nodes, each after its inputs and the result last. Read from a file or made
from a Linen module, equal networks give equal lists, whatever their layers are called.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn

from mnist_flax import models
from mnist_flax.errors import UserError

Config = dict[str, Any]

_MAX_LAYERS = 100
# What Keras calls the layers of the seven networks, however they are written.
_NUMBERED = re.compile(
    r"(input_layer|reshape|conv2d|max_pooling2d|concatenate|flatten|dense|dropout"
    r"|activation|re_lu|softmax)(_\d+)?"
)
# What Keras calls layers that have no weights and that none of the seven networks has, where one
# that computes something else has the same weights.
_FOREIGN = re.compile(
    r"(average_pooling2d|global_(average|max)_pooling2d|zero_padding2d|cropping2d|up_sampling2d"
    r"|rescaling|permute|lambda|elu|leaky_re_lu|thresholded_re_lu|add|average|maximum|multiply"
    r"|subtract)(_\d+)?|tf[._].*"
)
# Options that the seven networks leave alone, and how Keras writes that.
_USUAL = {
    "use_bias": (True,),
    "dilation_rate": ([1, 1], 1),
    "groups": (1,),
    "data_format": ("channels_last", None),
    "axis": (-1, 3),
    "noise_shape": (None,),
    "max_value": (None,),
    "negative_slope": (0,),
    "threshold": (0,),
}
# Layers that are what a Conv2D or Dense layer without one may have as its activation.
_ACTIVATIONS = {
    "Activation relu": "relu",
    "Activation softmax": "softmax",
    "ReLU": "relu",
    # The operation.
    "Relu": "relu",
    "Softmax": "softmax",
}
_MAX_PIXELS, _MAX_CHANNELS = 1024, 1024


class Node(NamedTuple):
    """One layer of a network.

    Attributes:
        text: what it computes, such as "Conv2D 32 5×5 valid relu".
        inputs: positions of the nodes that it takes; -1 is the image.
    """

    text: str
    inputs: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The layer's class in Keras."""
        return self.text.split()[0]


class Described(NamedTuple):
    """A network as a Keras configuration describes it.

    Attributes:
        nodes: its layers.
        names: the name of each node's layer.
        image_shape: (H, W, C) of its images, or None where the configuration does not say.
        order: names of all layers with their class, in the order of the configuration.
    """

    nodes: list[Node]
    names: list[str]
    image_shape: tuple[int, ...] | None
    order: list[tuple[str, str]]


def nodes_of(model: nn.Module) -> list[Node]:
    """The nodes of one of the package's networks, as its tutorial builds it."""
    nodes: list[Node] = []

    def add(text: str, *inputs: int) -> int:
        nodes.append(Node(text, inputs or (len(nodes) - 1,)))
        return len(nodes) - 1

    pool = "MaxPooling2D 2×2"
    if isinstance(model, models.Branched):
        add("Conv2D 32 3×3 same relu")
        trunk = add(pool)
        branches = []
        for _ in range(2):
            add("Conv2D 64 3×3 same relu", trunk)
            add(pool)
            branches.append(add("Conv2D 256 3×3 same relu"))
        add("Concatenate", *branches)
        add(pool)
        dense, conv_dropout, dense_dropout = (1000, 500), 0, 0
    else:
        for features, kernel, pooled in model.convs:
            add(f"Conv2D {features} {kernel}×{kernel} valid relu")
            if pooled:
                add(pool)
        dense = model.dense
        conv_dropout, dense_dropout = model.conv_dropout, model.dense_dropout
    if conv_dropout:
        add(f"Dropout {conv_dropout:g}")
    add("Flatten")
    for features in dense:
        add(f"Dense {features} relu")
    if dense_dropout:
        add(f"Dropout {dense_dropout:g}")
    add(f"Dense {model.num_classes} softmax")
    return nodes


def without_dropout(nodes: list[Node]) -> list[Node]:
    """The same network for prediction, where dropout does nothing."""
    kept: list[Node] = []
    moved = {-1: -1}
    for position, node in enumerate(nodes):
        inputs = tuple(moved[i] for i in node.inputs)
        if node.kind == "Dropout":
            moved[position] = inputs[0]
        else:
            moved[position] = len(kept)
            kept.append(Node(node.text, inputs))
    return kept


def creation_order(nodes: list[Node]) -> list[int]:
    """Positions of the nodes in the order in which Keras lists and saves their layers.

    It goes by the distance to the output, the farthest first, and takes branches in turn.
    """
    depth = [0] * len(nodes)
    for position in reversed(range(len(nodes))):
        for i in nodes[position].inputs:
            if i >= 0:
                depth[i] = max(depth[i], depth[position] + 1)
    return sorted(range(len(nodes)), key=lambda position: -depth[position])


def linen_names(nodes: list[Node]) -> dict[int, str]:
    """What Linen calls the layers with weights, by their positions: Conv_0, Conv_1, Dense_0."""
    counts: Counter[str] = Counter()
    names = {}
    for position, node in enumerate(nodes):
        if kind := {"Conv2D": "Conv", "Dense": "Dense"}.get(node.kind):
            names[position] = f"{kind}_{counts[kind]}"
            counts[kind] += 1
    return names


def describe(config: Config) -> Described:
    """Reads the configuration of a Keras 2 or 3 model, Sequential or Functional.

    Raises:
        UserError: it is of another kind of model.
        KeyError, TypeError, ValueError, RecursionError and the like: it is damaged.
    """
    kind, inner = config["class_name"], config["config"]
    if kind not in ("Sequential", "Functional", "Model"):
        raise UserError(f"it holds a {kind}, which is neither a Sequential nor a Functional model")
    # The first Keras 2 wrote the layers of a Sequential model as a bare list.
    inner = {"layers": inner} if isinstance(inner, list) else inner
    layers = {layer["config"]["name"]: layer for layer in inner["layers"]}
    if not 0 < len(layers) == len(inner["layers"]) <= _MAX_LAYERS:
        raise UserError(f"it holds a network of {len(inner['layers'])} layers, none of the seven")
    names = list(layers)
    if kind == "Sequential":
        inputs = {name: [before] for before, name in pairwise(names)} | {names[0]: []}
        last = names[-1]
    else:
        inputs = {name: _inbound(layer["inbound_nodes"]) for name, layer in layers.items()}
        last = _output(inner["output_layers"])

    shape = inner.get("build_input_shape")
    nodes: list[Node] = []
    node_names: list[str] = []
    result: dict[str, int] = {}

    def linear(name: str) -> bool:
        """Whether it is a Conv2D or Dense layer without an activation, and taken once."""
        uses = sum(taken.count(name) for taken in inputs.values())
        plain = _kind(layers[name]) in ("Conv2D", "Dense")
        return plain and _activation(layers[name]["config"]) == "linear" and uses == 1

    def visit(name: str) -> int:
        """The position of the node that gives a layer's result."""
        nonlocal shape
        if name not in result:
            taken = tuple(visit(i) for i in inputs[name]) or (-1,)
            kind, options = _kind(layers[name]), layers[name]["config"]
            # The operation of that name is called with its shape.
            reshapes = kind == "Reshape" and "target_shape" in options
            if taken == (-1,):
                shape = options.get("batch_shape") or options.get("batch_input_shape") or shape
                if reshapes:
                    shape = _reshaped(shape, options["target_shape"])
            text = _text(kind, options)
            if taken == (-1,) and (kind == "InputLayer" or reshapes):
                result[name] = -1
            elif text == "Activation" and len(taken) == 1:
                # The linear one, by which others have float32 after layers in fewer bits.
                (result[name],) = taken
            elif text in _ACTIVATIONS and len(inputs[name]) == 1 and linear(inputs[name][0]):
                (position,) = taken
                before = nodes[position]
                nodes[position] = Node(f"{before.text} {_ACTIVATIONS[text]}", before.inputs)
                result[name] = position
            else:
                nodes.append(Node(text, taken))
                node_names.append(name)
                result[name] = len(nodes) - 1
        return result[name]

    visit(last)
    if not nodes:
        raise UserError("it holds a network without layers")
    # Logits and probabilities come of the same weights.
    if re.fullmatch(r"Dense \d+", nodes[-1].text):
        nodes[-1] = Node(f"{nodes[-1].text} softmax", nodes[-1].inputs)
    order = [(name, layer["class_name"]) for name, layer in layers.items()]
    return Described(nodes, node_names, _image_shape(shape), order)


def _reshaped(batch_shape: Any, target: list[int]) -> list[int | None]:
    """A batch's shape after a Reshape, in which one size may be -1: what the others leave."""
    if batch_shape and target.count(-1) == 1:
        left = math.prod(batch_shape[1:]) // -math.prod(target)
        target = [left if size == -1 else size for size in target]
    return [None, *target]


def _image_shape(batch_shape: Any) -> tuple[int, ...] | None:
    """(H, W, C) of a batch of images; None where it says something else."""
    if batch_shape is None or len(batch_shape) != 4:
        return None
    shape, most = batch_shape[1:], (_MAX_PIXELS, _MAX_PIXELS, _MAX_CHANNELS)
    if not all(type(n) is int and 0 < n <= limit for n, limit in zip(shape, most, strict=True)):
        raise UserError(
            f"its images are of the shape {shape}, not height, width and channels in numbers up "
            f"to {_MAX_PIXELS}, {_MAX_PIXELS} and {_MAX_CHANNELS}"
        )
    return tuple(shape)


def config_of(nodes: list[Node], image_shape: tuple[int, int, int]) -> tuple[Config, list[str]]:
    """The configuration of a model that Keras 2 and 3 build, and the name of each node's layer.

    A chain of layers becomes a Sequential model, anything else a Functional one. Layers are named
    as Keras would name them, and weights start as by default.
    """
    order = creation_order(nodes)
    kinds = (nodes[position].kind for position in order)
    names = dict(zip(order, numbered(kinds), strict=True))
    image = {"batch_input_shape": [None, *image_shape], "dtype": "float32", "name": "input_layer"}
    layers = [{"class_name": "InputLayer", "config": image}]
    for position in order:
        options = _options(nodes[position].text) | {"name": names[position], "dtype": "float32"}
        layers.append({"class_name": nodes[position].kind, "config": options})
    ordered_names = [names[position] for position in range(len(nodes))]
    if all(node.inputs == (position - 1,) for position, node in enumerate(nodes)):
        inner = {"name": "sequential", "layers": layers}
        return {"class_name": "Sequential", "config": inner}, ordered_names

    names[-1] = "input_layer"
    for layer, position in zip(layers, [-1, *order], strict=True):
        inputs = nodes[position].inputs if position >= 0 else ()
        layer["name"] = layer["config"]["name"]
        layer["inbound_nodes"] = [[[names[i], 0, 0, {}] for i in inputs]] if inputs else []
    inner = {
        "name": "functional",
        "layers": layers,
        "input_layers": ["input_layer", 0, 0],
        "output_layers": [names[len(nodes) - 1], 0, 0],
    }
    return {"class_name": "Model", "config": inner}, ordered_names


def numbered(kinds: Iterable[str]) -> list[str]:
    """Keras's own names of layers of these classes: conv2d, conv2d_1, max_pooling2d, ..."""
    counts: Counter[str] = Counter()
    names = []
    for kind in kinds:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
        names.append(f"{name}_{counts[name]}" if counts[name] else name)
        counts[name] += 1
    return names


def foreign(names: Iterable[str], numbered: bool) -> list[str]:
    """Which layers are of classes that no network has.

    Args:
        names: what they are called: by class and number, or where not `numbered`, by names that
            may be a user's own.
    """
    if numbered:
        return sorted(name for name in names if not _NUMBERED.fullmatch(name))
    return sorted(name for name in names if _FOREIGN.fullmatch(name))


def _kind(layer: Config) -> str:
    """The class of a layer, with its package where that is not Keras."""
    module = layer.get("module") or "keras"
    if module.partition(".")[0] not in ("keras", "tf_keras"):
        return f"{module}>{layer['class_name']}"
    return layer.get("registered_name") or layer["class_name"]


def _options(text: str) -> Config:
    """The options of a layer that `nodes_of` describes."""
    match text.split():
        case ["Conv2D", filters, size, padding, activation]:
            return {
                "filters": int(filters),
                "kernel_size": [int(n) for n in size.split("×")],
                "padding": padding,
                "activation": activation,
                "data_format": "channels_last",
            }
        case ["MaxPooling2D", size]:
            pool_size = [int(n) for n in size.split("×")]
            return {"pool_size": pool_size, "data_format": "channels_last"}
        case ["Dropout", rate]:
            return {"rate": float(rate)}
        case ["Dense", units, activation]:
            return {"units": int(units), "activation": activation}
        case ["Flatten"]:
            return {"data_format": "channels_last"}
        case ["Concatenate"]:
            return {}
    raise ValueError(f"no layer of the seven networks: {text}")


def _text(kind: str, options: Config) -> str:
    """What a layer computes; what it does beyond the usual is added, so that it is not missed."""
    pool_size = options.get("pool_size", [2, 2])
    match kind:
        case "Conv2D":
            size, padding = _size(options["kernel_size"]), options["padding"]
            words, strides = [options["filters"], size, padding], _size(1)
        case "MaxPooling2D":
            words, strides = [_size(pool_size)], _size(pool_size)
            if options.get("padding", "valid") != "valid":
                words.append(options["padding"])
        case "Dense":
            words, strides = [options["units"]], None
        case "Dropout":
            words, strides = [f"{options['rate']:g}"], None
        case _:
            words, strides = [], None
    if options.get("strides") and _size(options["strides"]) != strides:
        words.append(f"strides {_size(options['strides'])}")
    for key, usual in _USUAL.items():
        if options.get(key, usual[0]) not in usual:
            words.append(f"{key}={options[key]}")
    if (activation := _activation(options)) != "linear":
        words.append(activation)
    return " ".join(map(str, [kind, *words]))


def _activation(options: Config) -> Any:
    activation = options.get("activation") or "linear"
    match activation:
        # What TensorFlow calls its `tf.nn.softmax`.
        case "softmax_v2" | {"class_name": "function", "config": "softmax_v2"}:
            return "softmax"
        # A layer as an activation.
        case {"class_name": "Activation" | "ReLU" | "Softmax" as kind, "config": dict(inner)}:
            return _ACTIVATIONS.get(_text(kind, inner), activation)
    return activation


def _size(size: Any) -> str:
    return "×".join(map(str, [size, size] if isinstance(size, int) else size))


def _inbound(calls: list) -> list[str]:
    """Names of the layers whose results a layer is called with."""
    if not calls:
        return []
    if len(calls) > 1:
        raise UserError("it holds a network that uses one layer several times")
    (call,) = calls
    if isinstance(call, dict):
        named = dict(call.get("kwargs", {}))
        # A layer is called with its input, or with inputs=.
        tensors, *options = call["args"] or [named.pop("inputs")]
        tensors = tensors if isinstance(tensors, list) else [tensors]
        options += named.values()
    else:
        tensors, options = call, []
    names = []
    for tensor in tensors:
        match tensor:
            case {"config": {"keras_history": [str(name), *_]}}:
                names.append(name)
            case [str(name), int(), int(), *kwargs]:
                names.append(name)
                options += dict(*kwargs).values()
            case _:
                # Such as the 1 of 1 - x.
                options.append("a constant")
    # Such as training=True, by which dropout acts in prediction too.
    if any(option not in (None, False) for option in options):
        raise UserError("it holds a network that calls a layer with further arguments")
    return names


def _output(outputs: Any) -> str:
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if outputs and isinstance(outputs, list):
        if isinstance(outputs[0], str):
            return outputs[0]
        if len(outputs) == 1:
            return outputs[0][0]
    raise UserError("it holds a network that has other than one output")
