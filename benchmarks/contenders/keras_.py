"""Keras on TensorFlow: its layers and its Adam in one `tf.function`."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from keras import layers

from benchmarks.contenders import B1, KL_WEIGHT, LATENT_DIM, LEARNING_RATE, Contender, Task


def activate(x, name: str, activation: str, norm: bool = True):
    """Apply an activation, and the report's norm behind it."""
    x = layers.LeakyReLU(0.02)(x) if activation == "leaky" else layers.Activation(activation)(x)
    return layers.BatchNormalization(epsilon=1e-3, name=f"{name}-norm")(x) if norm else x


def build(task: Task) -> tuple[keras.Model, keras.Model]:
    """Build the encoder and the decoder; the layers have the names of vaejax's parameters."""

    def convolution(kind, name, features, stride):
        return kind(features, 5, stride, padding="same", name=f"{name}-layer")

    x = inputs = keras.Input((task.size, task.size, 3))
    for name, features, stride in task.encoder:
        x = activate(convolution(layers.Conv2D, name, features, stride)(x), name, "leaky")
    x = layers.Flatten()(x)
    x = activate(layers.Dense(1024, name="dense-layer")(x), "dense", "selu")
    means = [
        layers.Dense(LATENT_DIM, name=f"{name}-layer", dtype="float32")(x)
        for name in ("mean", "log_variance")
    ]
    encoder = keras.Model(inputs, means)

    side, channels = task.decoder_input
    x = z = keras.Input((LATENT_DIM,))
    x = activate(layers.Dense(1024, name="dense-layer")(x), "dense", "selu")
    x = layers.Dense(side**2 * channels, name="reshape-layer")(x)
    x = layers.Reshape((side, side, channels))(activate(x, "reshape", "selu", norm=False))
    for name, features, stride, normed in task.decoder:
        x = convolution(layers.Conv2DTranspose, name, features, stride)(x)
        x = activate(x, name, "leaky", normed)
    x = convolution(layers.Conv2DTranspose, "output", 3, task.last_stride)(x)
    x = activate(x, "output", "sigmoid")
    return encoder, keras.Model(z, x)


def contender(task: Task) -> Contender:
    """Return the update in one `tf.function`."""
    tf.config.threading.set_intra_op_parallelism_threads(task.threads)
    tf.config.threading.set_inter_op_parallelism_threads(task.threads)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if task.precision == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    arrays, images, noise = task.load()
    encoder, decoder = build(task)
    leaves = {"gamma": "scale", "beta": "bias"}
    for branch, model in (("encoder", encoder), ("decoder", decoder)):
        for variable in model.trainable_variables:
            owner, leaf = variable.path.split("/")[-2:]
            name = "/".join([branch, *owner.split("-"), leaves.get(leaf, leaf)])
            variable.assign(arrays.pop(name))
    assert not arrays, f"parameters that no layer has: {list(arrays)}"
    variables = encoder.trainable_variables + decoder.trainable_variables
    adam = keras.optimizers.Adam(LEARNING_RATE, beta_1=B1, epsilon=1e-8)
    adam.build(variables)
    pixels = tf.constant(images)

    @tf.function(jit_compile=bool(gpus))
    def update(noise):
        with tf.GradientTape() as tape:
            x = tf.cast(pixels, tf.float32) / 255
            mean, log_variance = encoder(x, training=False)
            output = decoder(mean + tf.exp(log_variance / 2) * noise, training=False)
            error = tf.reduce_mean((x - tf.cast(output, tf.float32)) ** 2)
            kl = 0.5 * tf.reduce_mean(mean**2 + tf.exp(log_variance) - log_variance - 1)
            loss = error + KL_WEIGHT * kl
        adam.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    def losses() -> list[float]:
        return [float(update(tf.constant(update_noise))) for update_noise in noise]

    def updates(count: int) -> None:
        value = None
        for _ in range(count):
            value = update(tf.random.normal(noise.shape[1:]))
        float(value)

    def matrix_products(count: int) -> None:
        x = a = tf.cast(tf.random.normal((4096, 4096)) / 64, task.precision)
        for _ in range(count):
            x = a @ x
        float(tf.cast(x[0, 0], tf.float32))

    def device_memory() -> int | None:
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] if gpus else None

    version = f"keras {keras.__version__}, tensorflow {tf.__version__}"
    return Contender(version, losses, updates, matrix_products, device_memory)
