"""An autoencoder laboratory for faces: pure functions over arrays, in JAX."""

__version__ = "0.1.0"
