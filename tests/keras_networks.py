"""The networks as the tutorials build them, in real Keras."""

import keras
import numpy as np
from keras import layers

CNNS = {
    "convnet": dict(convs=[(32, 3, 1), (64, 3, 1), (64, 3, 0)], dense=[64]),
    "double_conv_3x3": dict(convs=[(32, 3, 0), (64, 3, 1)], dense=[128], dropout=(0.25, 0.5)),
    "double_conv_5x5": dict(convs=[(32, 5, 0), (64, 5, 1)], dense=[128], dropout=(0.25, 0.5)),
    "single_conv_5x5": dict(convs=[(32, 5, 1)], dense=[128], dropout=(0.25, 0.5)),
    "baseline": dict(convs=[(32, 5, 1)], dense=[128], dropout=(0.2, 0)),
    "larger": dict(convs=[(30, 5, 1), (15, 3, 1)], dense=[128, 50], dropout=(0.2, 0)),
}


def create(name, image_shape=(28, 28, 1), dropout=True, activation="softmax"):
    """The tutorial's model, its layers with weights named as Linen names them.

    `activation` is that of the last layer: None for logits.
    """
    if name == "branched":
        return _branched(image_shape, activation)
    spec = CNNS[name]
    rates = spec.get("dropout", (0, 0)) if dropout else (0, 0)
    model = keras.Sequential([layers.Input(image_shape)])
    for i, (filters, size, pooled) in enumerate(spec["convs"]):
        model.add(layers.Conv2D(filters, (size, size), activation="relu", name=f"Conv_{i}"))
        if pooled:
            model.add(layers.MaxPooling2D((2, 2)))
    if rates[0]:
        model.add(layers.Dropout(rates[0]))
    model.add(layers.Flatten())
    for i, units in enumerate(spec["dense"]):
        model.add(layers.Dense(units, activation="relu", name=f"Dense_{i}"))
    if rates[1]:
        model.add(layers.Dropout(rates[1]))
    model.add(layers.Dense(10, activation=activation, name=f"Dense_{len(spec['dense'])}"))
    return model


def _branched(image_shape, activation):
    def conv(filters, name):
        return layers.Conv2D(filters, (3, 3), activation="relu", padding="same", name=name)

    inputs = layers.Input(image_shape)
    pool1 = layers.MaxPooling2D()(conv(32, "Conv_0")(inputs))
    pool2_1 = layers.MaxPooling2D()(conv(64, "Conv_1")(pool1))
    pool2_2 = layers.MaxPooling2D()(conv(64, "Conv_3")(pool1))
    both = [conv(256, "Conv_2")(pool2_1), conv(256, "Conv_4")(pool2_2)]
    x = layers.Flatten()(layers.MaxPooling2D()(layers.concatenate(both)))
    x = layers.Dense(1000, activation="relu", name="Dense_0")(x)
    x = layers.Dense(500, activation="relu", name="Dense_1")(x)
    return keras.Model(inputs, layers.Dense(10, activation=activation, name="Dense_2")(x))


def params_of(model):
    """Its weights as Linen parameters."""
    return {
        layer.name: dict(zip(("kernel", "bias"), map(np.asarray, layer.get_weights()), strict=True))
        for layer in model.layers
        if layer.get_weights()
    }


def set_params(model, params):
    """Gives it the weights of Linen parameters."""
    for name, layer in params.items():
        model.get_layer(name).set_weights([np.asarray(layer["kernel"]), np.asarray(layer["bias"])])
