"""The contenders of `benchmarks/input.py`: those that prepare images, and those that read them."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """What all contenders read: the same images as files, as a prepared set and as raw pixels."""

    source: str  # a folder of images
    files: list[str]  # that vaejax accepts
    prepared: str
    pixels: str  # the training images of the prepared set, raw, in a file
    images: int  # the number of training images
    size: int
    batch: int
    seconds: float
    threads: int


# Preparing: a contender returns a function that decodes all files and returns their number


def vaejax_prepares(task: Task) -> Callable[[], int]:
    """Write a prepared set by vaejax."""
    from vaejax.data import prepare, records
    from vaejax.data.gather import Threads

    image = np.zeros((task.size, task.size, 3), np.uint8)  # imports TFDS before the measurement
    records.serialize(records.Record(image=image, person="", path="", sha256=""))

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "set"
            prepare.prepare(
                Path(task.source), size=task.size, out=out, workers=Threads(task.threads),
                allow_refused=True, say=lambda _: None,
            )  # fmt: skip
            return records.read_dataset_report(out)["accepted"]

    return run


def tf_prepares(task: Task) -> Callable[[], int]:
    """Decode and resize by TensorFlow's own functions."""
    tf = tensorflow(task)

    def decode(path):
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        small = tf.image.resize(tf.ensure_shape(image, (None, None, 3)), [task.size] * 2, "area")
        return tf.cast(tf.round(small), tf.uint8)

    files = tf.data.Dataset.from_tensor_slices(task.files)
    batches = files.map(decode, num_parallel_calls=task.threads).batch(task.batch).prefetch(2)
    return lambda: sum(len(batch) for batch in batches.as_numpy_iterator())


def torch_prepares(task: Task) -> Callable[[], int]:
    """Decode and resize by Pillow, in the worker processes of a DataLoader."""
    torch = pytorch(task)
    from PIL import Image

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(task.files)

        def __getitem__(self, index):
            with Image.open(task.files[index]) as image:
                small = image.convert("RGB").resize([task.size] * 2, Image.Resampling.BOX)
            return np.array(small)

    workers = task.threads
    batches = torch.utils.data.DataLoader(Files(), batch_size=task.batch, num_workers=workers)
    return lambda: sum(len(batch.numpy()) for batch in batches)


# Reading: a contender is an endless stream of batches


def vaejax_reads(task: Task) -> Iterator[np.ndarray]:
    """Stream from the prepared set."""
    from vaejax.data.batches import Images, stream

    images = Images(Path(task.prepared), "train")
    return iter(stream(images, batch_size=task.batch, seed=0))


def tf_reads(task: Task) -> Iterator[np.ndarray]:
    """Read the file of raw pixels through a shuffle buffer."""
    tf = tensorflow(task)
    shape = (task.batch, task.size, task.size, 3)
    images = tf.data.FixedLengthRecordDataset(task.pixels, int(np.prod(shape[1:])))
    batches = images.shuffle(min(10_000, task.images)).repeat().batch(task.batch)
    decoded = batches.map(
        lambda raw: tf.reshape(tf.io.decode_raw(raw, tf.uint8), shape),
        num_parallel_calls=task.threads,
    )
    return iter(decoded.prefetch(2).as_numpy_iterator())


def torch_reads(task: Task, *, workers: bool, by_batch: bool = False) -> Iterator[np.ndarray]:
    """Read a memory map of the raw pixels by a DataLoader, image by image or batch by batch."""
    torch = pytorch(task)
    shape = (task.images, task.size, task.size, 3)

    class Images(torch.utils.data.Dataset):
        def __init__(self):
            self.pixels = np.memmap(task.pixels, np.uint8, "c", shape=shape)

        def __len__(self):
            return task.images

        def __getitem__(self, index):
            return self.pixels[index]

    class Batches(Images):
        def __getitems__(self, indices):
            return self.pixels[indices]

    batches = torch.utils.data.DataLoader(
        Batches() if by_batch else Images(),
        batch_size=task.batch,
        shuffle=True,
        drop_last=True,
        num_workers=task.threads if workers else 0,
        persistent_workers=workers,
        collate_fn=torch.from_numpy if by_batch else None,
    )
    while True:
        for batch in batches:
            yield batch.numpy()


def tensorflow(task: Task) -> Any:
    """Import TensorFlow, limited to the threads of the task."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(task.threads)
    tf.config.threading.set_inter_op_parallelism_threads(task.threads)
    return tf


def pytorch(task: Task) -> Any:
    """Import PyTorch, limited to the threads of the task."""
    import torch
    import torch.utils.data

    torch.set_num_threads(task.threads)
    return torch


PREPARING: dict[str, Callable[[Task], Callable[[], int]]] = {
    "vaejax": vaejax_prepares,
    "tf.data": tf_prepares,
    "PyTorch": torch_prepares,
}
READING: dict[str, Callable[[Task], Iterator[np.ndarray]]] = {
    "vaejax": vaejax_reads,
    "tf.data": tf_reads,
    "PyTorch": partial(torch_reads, workers=False),
    "PyTorch, workers": partial(torch_reads, workers=True),
    "PyTorch, by batch": partial(torch_reads, workers=False, by_batch=True),
}
