// Convolutions of images of few channels by square kernels, with any stride. The pixels of an image
// that meet a row of the kernel are contiguous in memory, so that they are the row of a matrix
// without being copied; the kernel's rows multiply it one after the other.
//
// `image` is [images, height, width, channels], `features` (the convolution's output) is
// [images, rows, columns, outputs] and `kernel` is [taps, taps, channels, outputs].
#pragma once

#include "common.h"

// The sizes of a convolution.
struct Windows {
  int64_t images, height, width, channels;  // of the image
  int64_t rows, columns, outputs;           // of the features
  int64_t taps, stride, top, left;          // of the kernel; zeros above and left of the image

  int64_t window_row() const { return taps * channels; }  // floats, contiguous in the image
  int64_t window_row_vectors() const { return ceil_to(window_row(), kLanes); }
  int64_t padded_row() const {  // floats of a padded image row; whole vectors may read past its end
    return std::max(left + width, (columns - 1) * stride + taps) * channels + window_row_vectors();
  }
  int64_t window_size() const { return taps * window_row(); }
  // image rows that the windows of `count` rows of features cover
  int64_t covered(int64_t count) const { return (count - 1) * stride + taps; }
  int64_t padded_outputs() const { return ceil_to(outputs, kPanel); }
};
constexpr int64_t kStrip = 8;  // rows of features that a thread takes at a time

// Copy the image rows that the windows of `strip` rows of features cover, from row `first` on, with
// zeros around them.
static void pad(const Windows& g, const float* image, int64_t first, int64_t strip, float* out) {
  std::memset(out, 0, 4 * g.covered(strip) * g.padded_row());
  for (int64_t r = 0; r < g.covered(strip); r++) {
    const int64_t y = first * g.stride + r - g.top;
    if (0 <= y && y < g.height)
      std::memcpy(out + r * g.padded_row() + g.left * g.channels,
                  image + y * g.width * g.channels, 4 * g.width * g.channels);
  }
}

// Copy rows of `width` floats to `to` as rows of `padded` floats, filled up with zeros, and return
// `to`; or return `from` if the widths are equal.
static const float* pad_rows(const float* from, int64_t rows, int64_t width, int64_t padded,
                             float* to) {
  if (width == padded) return from;
  for (int64_t i = 0; i < rows; i++) {
    std::memcpy(to + i * padded, from + i * width, 4 * width);
    std::memset(to + i * padded + width, 0, 4 * (padded - width));
  }
  return to;
}

// The three maps return false if there is no memory for them.

static bool windows_forward(ffi::ThreadPool& pool, const Windows& g, const float* image,
                            const float* kernel, float* features) {
  const int64_t strips = (g.rows + kStrip - 1) / kStrip, wide = g.padded_outputs();
  const int64_t per_worker = g.covered(kStrip) * g.padded_row() + g.columns * wide;
  Scratch scratch(g.window_size() * wide + workers(pool) * per_worker);
  float* packed = scratch.take(g.window_size() * wide);
  if (!packed) return false;
  kernel = pad_rows(kernel, g.window_size(), g.outputs, wide, packed);
  parallel(pool, g.images * strips, [&](int64_t item, int64_t worker) {
    float* padded = packed + g.window_size() * wide + worker * per_worker;
    float* wide_row = padded + g.covered(kStrip) * g.padded_row();
    const int64_t n = item / strips, first = item % strips * kStrip;
    const int64_t strip = std::min(kStrip, g.rows - first);
    pad(g, image + n * g.height * g.width * g.channels, first, strip, padded);
    for (int64_t i = 0; i < strip; i++) {
      float* row = features + (n * g.rows + first + i) * g.columns * g.outputs;
      float* to = wide == g.outputs ? row : wide_row;
      for (int64_t o = 0; o < wide; o += kPanel)
        for (int64_t p = 0; p < g.taps; p++)
          multiply(g.columns, g.window_row(), padded + (i * g.stride + p) * g.padded_row(),
                   g.stride * g.channels, 1, kernel + p * g.window_row() * wide + o, wide, kLanes,
                   to + o, wide, p > 0);
      if (to != row)
        for (int64_t j = 0; j < g.columns; j++)
          std::memcpy(row + j * g.outputs, wide_row + j * wide, 4 * g.outputs);
    }
  });
  return true;
}

static bool windows_input_gradient(ffi::ThreadPool& pool, const Windows& g, const float* features,
                                   const float* kernel, float* image) {
  const int64_t wide = ceil_to(g.taps * g.window_row_vectors(), kPanel);
  const int64_t covered = std::max(g.covered(g.rows), g.top + g.height);
  const int64_t per_worker = covered * g.padded_row() + g.columns * wide;
  Scratch scratch(g.outputs * wide + workers(pool) * per_worker);
  // the kernel as [outputs, taps, window_row_vectors]
  float* packed = scratch.take(g.outputs * wide);
  if (!packed) return false;
  std::memset(packed, 0, 4 * g.outputs * wide);
  for (int64_t p = 0; p < g.taps; p++)
    for (int64_t q = 0; q < g.window_row(); q++)
      for (int64_t o = 0; o < g.outputs; o++)
        packed[o * wide + p * g.window_row_vectors() + q] =
            kernel[(p * g.window_row() + q) * g.outputs + o];
  // Window rows of columns this far apart do not overlap: adding one need not wait until the one
  // before is stored.
  const int64_t apart =
      (g.window_row_vectors() + g.stride * g.channels - 1) / (g.stride * g.channels);
  parallel(pool, g.images, [&](int64_t n, int64_t worker) {
    float* padded = packed + g.outputs * wide + worker * per_worker;
    float* window_rows = padded + covered * g.padded_row();
    std::memset(padded, 0, 4 * covered * g.padded_row());
    for (int64_t i = 0; i < g.rows; i++) {
      const float* row = features + (n * g.rows + i) * g.columns * g.outputs;
      for (int64_t o = 0; o < wide; o += kPanel)
        multiply(g.columns, g.outputs, row, g.outputs, 1, packed + o, wide, kLanes,
                 window_rows + o, wide, false);
      for (int64_t p = 0; p < g.taps; p++) {
        float* to = padded + (i * g.stride + p) * g.padded_row();
        const float* from = window_rows + p * g.window_row_vectors();
        for (int64_t begin = 0; begin < apart; begin++)
          for (int64_t j = begin; j < g.columns; j += apart)
            for (int64_t q = 0; q < g.window_row_vectors(); q += kLanes) {
              float* at = to + j * g.stride * g.channels + q;
              store(at, load(at) + load(from + j * wide + q));
            }
      }
    }
    for (int64_t y = 0; y < g.height; y++)
      std::memcpy(image + (n * g.height + y) * g.width * g.channels,
                  padded + (y + g.top) * g.padded_row() + g.left * g.channels,
                  4 * g.width * g.channels);
  });
  return true;
}

static bool windows_kernel_gradient(ffi::ThreadPool& pool, const Windows& g, const float* image,
                                    const float* features, float* kernel) {
  // As many partial sums with any number of threads, because their order decides the rounding.
  constexpr int64_t kParts = 16;
  const int64_t wide = g.padded_outputs(), size = g.window_size() * wide;
  const int64_t per_worker = g.covered(kStrip) * g.padded_row() + g.columns * wide;
  Scratch scratch(kParts * size + workers(pool) * per_worker);
  float* parts = scratch.take(kParts * size);
  if (!parts) return false;
  const int64_t strips = (g.rows + kStrip - 1) / kStrip, items = g.images * strips;
  parallel(pool, kParts, [&](int64_t part, int64_t worker) {
    float* padded = parts + kParts * size + worker * per_worker;
    float* wide_row = padded + g.covered(kStrip) * g.padded_row();
    float* sum = parts + part * size;
    std::memset(sum, 0, 4 * size);
    for (int64_t item = part * items / kParts; item < (part + 1) * items / kParts; item++) {
      const int64_t n = item / strips, first = item % strips * kStrip;
      const int64_t strip = std::min(kStrip, g.rows - first);
      pad(g, image + n * g.height * g.width * g.channels, first, strip, padded);
      for (int64_t i = 0; i < strip; i++) {
        const float* row = pad_rows(features + (n * g.rows + first + i) * g.columns * g.outputs,
                                    g.columns, g.outputs, wide, wide_row);
        for (int64_t o = 0; o < wide; o += kPanel)
          for (int64_t p = 0; p < g.taps; p++)
            multiply(g.window_row(), g.columns, padded + (i * g.stride + p) * g.padded_row(), 1,
                     g.stride * g.channels, row + o, wide, kLanes,
                     sum + p * g.window_row() * wide + o, wide, true);
      }
    }
  });
  for (int64_t part = 1; part < kParts; part++)
    for (int64_t i = 0; i < size; i++) parts[i] += parts[part * size + i];
  for (int64_t k = 0; k < g.window_size(); k++)
    std::memcpy(kernel + k * g.outputs, parts + k * wide, 4 * g.outputs);
  return true;
}
