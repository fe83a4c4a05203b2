"""A trained model for use elsewhere: ONNX networks, one safetensors file, a model card.

    exported = Exported(model, params, batch_stats, prior, attributes)
    networks = payload(exported)    # the bytes of each ONNX file, and what a program needs to know
    load(folder)                    # an `Exported` again, from the folder's model.safetensors

`training.publish` makes an `Exported` of a run and writes the folder.
"""

from vaejax.export.arrays import ARRAYS, load, to_safetensors
from vaejax.export.exported import Exported, metadata
from vaejax.export.networks import Payload, payload

__all__ = ["ARRAYS", "Exported", "Payload", "load", "metadata", "payload", "to_safetensors"]
