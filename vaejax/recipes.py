"""Recipes that more than one experiment offers."""

from functools import partial

from vaejax import losses
from vaejax.models.residual import SpatialVAE
from vaejax.training.config import Recipe
from vaejax.training.optimizer import adam

# Many, varied faces: each vector of z tells of its own region, and more of a face is kept than a
# single vector would hold; a wide flow learns how regions go together. docs/faces.md has what it
# draws.
FACES = Recipe(
    "faces",
    SpatialVAE(width=64),
    partial(losses.sigma_vae_sharp),
    minutes=30.0,
    batch_size=16,
    learning_rate=2e-3,
    warmup_steps=100,
    cosine_decay=True,
    optimizer=partial(adam, b1=0.9, b2=0.99, clip_norm=1.0),
    ema_decay=0.999,
    flip=True,
    prior="flow",
    prior_width=1024,
)
