// Convolutions of few channels on the image's side, any square kernel and stride: a row of a window
// lies in one piece there, and is a row of a matrix as it stands.
#pragma once

#include "common.h"

// A strip of code rows, and the rows of the image that its windows cover, with zeros round it.
struct Windows {
  int64_t images, height, width, channels;  // of the image
  int64_t rows, columns, outputs;           // of the code
  int64_t taps, stride, top, left;          // of the kernel, and zeros in front of the image

  int64_t across() const { return taps * channels; }  // of a window's row, which lies in one piece
  int64_t group() const { return ceil_to(across(), kLanes); }
  int64_t lead() const {  // of a padded row; a group may look over its end
    return std::max(left + width, (columns - 1) * stride + taps) * channels + group();
  }
  int64_t depth() const { return taps * across(); }
  int64_t covered(int64_t strip) const { return (strip - 1) * stride + taps; }
  int64_t padded() const { return ceil_to(outputs, kPanel); }
};
constexpr int64_t kStrip = 8;

static void pad(const Windows& g, const float* image, int64_t first, int64_t strip, float* out) {
  std::memset(out, 0, 4 * g.covered(strip) * g.lead());
  for (int64_t r = 0; r < g.covered(strip); r++) {
    const int64_t y = first * g.stride + r - g.top;
    if (0 <= y && y < g.height)
      std::memcpy(out + r * g.lead() + g.left * g.channels, image + y * g.width * g.channels,
                  4 * g.width * g.channels);
  }
}

// rows of `width` numbers as rows of `padded`, zeros behind; or where they lie, if that is so
static const float* widened(const float* from, int64_t rows, int64_t width, int64_t padded,
                            float* to) {
  if (width == padded) return from;
  for (int64_t i = 0; i < rows; i++) {
    std::memcpy(to + i * padded, from + i * width, 4 * width);
    std::memset(to + i * padded + width, 0, 4 * (padded - width));
  }
  return to;
}

static bool windows_forward(ffi::ThreadPool& pool, const Windows& g, const float* image,
                            const float* kernel, float* code) {
  const int64_t strips = (g.rows + kStrip - 1) / kStrip, wide = g.padded();
  const int64_t own = g.covered(kStrip) * g.lead() + g.columns * wide;
  Scratch scratch(g.depth() * wide + workers(pool) * own);
  float* packed = scratch.take(g.depth() * wide);
  if (!packed) return false;
  kernel = widened(kernel, g.depth(), g.outputs, wide, packed);
  parallel(pool, g.images * strips, [&](int64_t item, int64_t worker) {
    float* around = packed + g.depth() * wide + worker * own;
    float* apart = around + g.covered(kStrip) * g.lead();
    const int64_t n = item / strips, first = item % strips * kStrip;
    const int64_t strip = std::min(kStrip, g.rows - first);
    pad(g, image + n * g.height * g.width * g.channels, first, strip, around);
    for (int64_t i = 0; i < strip; i++) {
      float* row = code + (n * g.rows + first + i) * g.columns * g.outputs;
      float* to = wide == g.outputs ? row : apart;
      for (int64_t o = 0; o < wide; o += kPanel)
        for (int64_t p = 0; p < g.taps; p++)
          products(g.columns, g.across(), around + (i * g.stride + p) * g.lead(),
                   g.stride * g.channels, 1, kernel + p * g.across() * wide + o, wide, kLanes,
                   to + o, wide, p > 0);
      if (to != row)
        for (int64_t j = 0; j < g.columns; j++)
          std::memcpy(row + j * g.outputs, apart + j * wide, 4 * g.outputs);
    }
  });
  return true;
}

static bool windows_input_gradient(ffi::ThreadPool& pool, const Windows& g, const float* code,
                                   const float* kernel, float* image) {
  const int64_t wide = ceil_to(g.taps * g.group(), kPanel);
  const int64_t covered = std::max(g.covered(g.rows), g.top + g.height);
  const int64_t own = covered * g.lead() + g.columns * wide;
  Scratch scratch(g.outputs * wide + workers(pool) * own);
  float* packed = scratch.take(g.outputs * wide);  // [outputs, taps, group]
  if (!packed) return false;
  std::memset(packed, 0, 4 * g.outputs * wide);
  for (int64_t p = 0; p < g.taps; p++)
    for (int64_t q = 0; q < g.across(); q++)
      for (int64_t o = 0; o < g.outputs; o++)
        packed[o * wide + p * g.group() + q] = kernel[(p * g.across() + q) * g.outputs + o];
  // groups so far apart do not meet: none waits for what the one before has stored
  const int64_t apart = (g.group() + g.stride * g.channels - 1) / (g.stride * g.channels);
  parallel(pool, g.images, [&](int64_t n, int64_t worker) {
    float* around = packed + g.outputs * wide + worker * own;
    float* met = around + covered * g.lead();
    std::memset(around, 0, 4 * covered * g.lead());
    for (int64_t i = 0; i < g.rows; i++) {
      const float* row = code + (n * g.rows + i) * g.columns * g.outputs;
      for (int64_t o = 0; o < wide; o += kPanel)
        products(g.columns, g.outputs, row, g.outputs, 1, packed + o, wide, kLanes, met + o, wide,
                 false);
      for (int64_t p = 0; p < g.taps; p++) {
        float* to = around + (i * g.stride + p) * g.lead();
        const float* from = met + p * g.group();
        for (int64_t begin = 0; begin < apart; begin++)
          for (int64_t j = begin; j < g.columns; j += apart)
            for (int64_t q = 0; q < g.group(); q += kLanes) {
              float* at = to + j * g.stride * g.channels + q;
              store(at, load(at) + load(from + j * wide + q));
            }
      }
    }
    for (int64_t y = 0; y < g.height; y++)
      std::memcpy(image + (n * g.height + y) * g.width * g.channels,
                  around + (y + g.top) * g.lead() + g.left * g.channels, 4 * g.width * g.channels);
  });
  return true;
}

static bool windows_kernel_gradient(ffi::ThreadPool& pool, const Windows& g, const float* image,
                                    const float* code, float* kernel) {
  constexpr int64_t kParts = 16;  // a fixed number: their order decides the rounding
  const int64_t wide = g.padded(), size = g.depth() * wide;
  const int64_t own = g.covered(kStrip) * g.lead() + g.columns * wide;
  Scratch scratch(kParts * size + workers(pool) * own);
  float* parts = scratch.take(kParts * size);
  if (!parts) return false;
  const int64_t strips = (g.rows + kStrip - 1) / kStrip, all = g.images * strips;
  parallel(pool, kParts, [&](int64_t part, int64_t worker) {
    float* around = parts + kParts * size + worker * own;
    float* room = around + g.covered(kStrip) * g.lead();
    float* sum = parts + part * size;
    std::memset(sum, 0, 4 * size);
    for (int64_t item = part * all / kParts; item < (part + 1) * all / kParts; item++) {
      const int64_t n = item / strips, first = item % strips * kStrip;
      const int64_t strip = std::min(kStrip, g.rows - first);
      pad(g, image + n * g.height * g.width * g.channels, first, strip, around);
      for (int64_t i = 0; i < strip; i++) {
        const float* row = widened(code + (n * g.rows + first + i) * g.columns * g.outputs,
                                   g.columns, g.outputs, wide, room);
        for (int64_t o = 0; o < wide; o += kPanel)
          for (int64_t p = 0; p < g.taps; p++)
            products(g.across(), g.columns, around + (i * g.stride + p) * g.lead(), 1,
                     g.stride * g.channels, row + o, wide, kLanes, sum + p * g.across() * wide + o,
                     wide, true);
      }
    }
  });
  for (int64_t part = 1; part < kParts; part++)
    for (int64_t i = 0; i < size; i++) parts[i] += parts[part * size + i];
  for (int64_t k = 0; k < g.depth(); k++)
    std::memcpy(kernel + k * g.outputs, parts + k * wide, 4 * g.outputs);
  return true;
}
