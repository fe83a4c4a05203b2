"""From a folder or a zip of images to batches of uint8 arrays, with NumPy alone."""
