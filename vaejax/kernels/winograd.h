// Convolutions by 3x3 kernels with stride 1, and by 5x5 kernels with stride 2.
//
// With stride 2, split the image into four phases, by whether the row and the column of a pixel are
// even or odd, and put them side by side as channels: the convolution becomes one of 3x3 taps with
// stride 1. In a direction where the phase is even, the first of the three taps is zero.
//
// Winograd's F(4x4, 3x3) (Lavin and Gray, 2016, section 4) computes it in tiles of 6x6 inputs and
// 4x4 outputs, by 36 matrix products with a quarter of the multiplications. ' is the transpose:
//
//     V = B' d B    of the inputs d    [36, tile, input channel]
//     U = G g G'    of the kernel g    [36, input channel, output channel]
//     M = V U                          [36, tile, output channel]
//     Y = A' M A    the outputs        [16, tile, output channel]
//
// In names, `points` are the 36 transformed values of a tile or of a kernel.
#pragma once

#include "common.h"

// Tiles at a time, few enough for a cache. The gradient of the kernel takes more where that many
// floats suffice for their points: all threads wait for each other between two of its blocks.
constexpr int64_t kBlock = 64, kAdjointBlock = 128, kAdjointFloats = 2 << 20;
constexpr int64_t kTile = 4, kWindow = 6, kPoints = kWindow * kWindow;

// The transforms of one direction, the rows or the columns of a window ----------------------------

static inline void transform_inputs(const Vector d[6], Vector v[6]) {  // B' d
  v[0] = 4 * d[0] - 5 * d[2] + d[4];
  v[1] = d[4] + d[3] - 4 * (d[1] + d[2]);
  v[2] = d[4] - d[3] + 4 * (d[1] - d[2]);
  v[3] = d[4] - d[2] + 2 * (d[3] - d[1]);
  v[4] = d[4] - d[2] - 2 * (d[3] - d[1]);
  v[5] = 4 * d[1] - 5 * d[3] + d[5];
}
static inline void transform_kernel(const Vector g[3], Vector u[6]) {  // G g
  const Vector even12 = (g[0] + g[2]) * (-1 / 6.f), odd12 = g[1] * (-1 / 6.f);
  const Vector even34 = g[0] * (1 / 24.f) + g[2] * (1 / 6.f), odd34 = g[1] * (1 / 12.f);
  u[0] = g[0] * 0.25f;
  u[1] = even12 + odd12;
  u[2] = even12 - odd12;
  u[3] = even34 + odd34;
  u[4] = even34 - odd34;
  u[5] = g[2];
}
static inline void transform_kernel_adjoint(const Vector u[6], Vector g[3]) {  // G' u
  const Vector sum12 = u[1] + u[2], sum34 = u[3] + u[4];
  g[0] = u[0] * 0.25f - sum12 * (1 / 6.f) + sum34 * (1 / 24.f);
  g[1] = (u[2] - u[1]) * (1 / 6.f) + (u[3] - u[4]) * (1 / 12.f);
  g[2] = (sum34 - sum12) * (1 / 6.f) + u[5];
}
static inline void transform_outputs(const Vector m[6], Vector y[4]) {  // A' m
  const Vector sum12 = m[1] + m[2], difference12 = m[1] - m[2];
  const Vector sum34 = m[3] + m[4], difference34 = m[3] - m[4];
  y[0] = m[0] + sum12 + sum34;
  y[1] = difference12 + 2 * difference34;
  y[2] = sum12 + 4 * sum34;
  y[3] = difference12 + 8 * difference34 + m[5];
}
static inline void transform_outputs_adjoint(const Vector y[4], Vector m[6]) {  // A y
  const Vector even12 = y[0] + y[2], odd12 = y[1] + y[3];
  const Vector even34 = y[0] + 4 * y[2], odd34 = 2 * y[1] + 8 * y[3];
  m[0] = y[0];
  m[1] = even12 + odd12;
  m[2] = even12 - odd12;
  m[3] = even34 + odd34;
  m[4] = even34 - odd34;
  m[5] = y[3];
}

// Both directions ---------------------------------------------------------------------------------

// Apply a transform to the columns and then to the rows of kIn x kIn vectors: get(i, j) returns
// those, and put(i, j, vector) takes the kOut x kOut results.
template <int kIn, int kOut, void (*transform)(const Vector*, Vector*), typename Get, typename Put>
static inline void transform_window(Get get, Put put) {
  Vector half[kOut][kIn];
#pragma GCC unroll 6
  for (int j = 0; j < kIn; j++) {
    Vector column[kIn], transformed[kOut];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; i++) column[i] = get(i, j);
    transform(column, transformed);
#pragma GCC unroll 6
    for (int i = 0; i < kOut; i++) half[i][j] = transformed[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kOut; i++) {
    Vector transformed[kOut];
    transform(half[i], transformed);
#pragma GCC unroll 6
    for (int j = 0; j < kOut; j++) put(i, j, transformed[j]);
  }
}

// A square of pixels of one phase; `rows` and `columns` have no lanes where it is out of the image.
template <int kSide>
struct Square {
  float* first;
  int64_t row_stride, column_stride;
  Lanes rows[kSide], columns[kSide];

  float* at(int i, int j) const { return first + i * row_stride + j * column_stride; }
};

// An array as the 3x3 convolution sees it: `data` is [images, stride * height, stride * width,
// channels]. The stride is the convolution's for its image, and 1 for its output.
struct Grid {
  float* data;
  int64_t images, height, width, channels, stride;  // height, width and channels of a phase

  int64_t phases() const { return stride * stride; }
  int64_t depth() const { return phases() * channels; }
  // the same with every phase in whole vectors
  int64_t padded_channels() const { return ceil_to(channels, kLanes); }
  int64_t padded_depth() const { return phases() * padded_channels(); }
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
  int64_t tile_rows() const { return (height + kTile - 1) / kTile; }
  int64_t tile_columns() const { return (width + kTile - 1) / kTile; }
  // Return the square that begins `before` pixels above and left of a tile.
  template <int kSide>
  Square<kSide> square(int64_t tile, int64_t before, int64_t phase) const {
    const int64_t x = tile % tile_columns() * kTile - before, tile_row = tile / tile_columns();
    const int64_t y = tile_row % tile_rows() * kTile - before, image = tile_row / tile_rows();
    const int64_t row = (image * height + y) * stride + phase / stride;
    const int64_t column = x * stride + phase % stride;
    Square<kSide> square = {data + (row * stride * width + column) * channels,
                            stride * stride * width * channels, stride * channels};
    for (int i = 0; i < kSide; i++) {
      square.rows[i] = 0 <= y + i && y + i < height ? kAllLanes : 0;
      square.columns[i] = 0 <= x + i && x + i < width ? kAllLanes : 0;
    }
    return square;
  }
};

// Where a tile's points are stored: the strides, in floats, of the vectors of channels, of the
// phases and of the 36 points.
struct Strides {
  int64_t vector, phase, point;
};

// Transform the kSide x kSide pixels that begin `before` pixels above and left of a tile, for all
// its channels. The last vector of a phase is stored with zeros behind its channels.
template <int kSide, int64_t before, void (*transform)(const Vector*, Vector*)>
static void gather(const Grid& grid, int64_t tile, float* out, const Strides& strides) {
  for (int64_t phase = 0; phase < grid.phases(); phase++) {
    const auto square = grid.square<kSide>(tile, before, phase);
    float* to = out + phase * strides.phase;
    for (int64_t c = 0; c < grid.channels; c += kLanes, to += strides.vector) {
      const Lanes lanes = first_lanes(grid.channels - c);
      transform_window<kSide, kWindow, transform>(
          [&](int i, int j) {
            return load(square.at(i, j) + c, lanes & square.rows[i] & square.columns[j]);
          },
          [&](int i, int j, Vector value) { store(to + (i * kWindow + j) * strides.point, value); });
    }
  }
}

// Compute the outputs of a tile from its points in M.
static void scatter(const Grid& grid, int64_t tile, const float* m, const Strides& strides) {
  for (int64_t phase = 0; phase < grid.phases(); phase++) {
    const auto square = grid.square<kTile>(tile, 0, phase);
    const float* from = m + phase * strides.phase;
    for (int64_t c = 0; c < grid.channels; c += kLanes, from += strides.vector) {
      const Lanes lanes = first_lanes(grid.channels - c);
      transform_window<kWindow, kTile, transform_outputs>(
          [&](int i, int j) { return load(from + (i * kWindow + j) * strides.point); },
          [&](int i, int j, Vector value) {
            store(square.at(i, j) + c, value, lanes & square.rows[i] & square.columns[j]);
          });
    }
  }
}

// Kernels -----------------------------------------------------------------------------------------

// Which of the 2 * stride + 1 taps of a direction is the t-th of the three of a phase; -1 for none.
static inline int64_t tap(int64_t stride, int64_t phase, int64_t t) {
  return stride * (t - 1) + 1 + phase;
}

// Compute U, in panels of kPanel columns and a last one of kLanes if there is one more vector, from
// the kernel as [taps, taps, in.channels, out.channels]. The phases are those of the input; with
// `adjoint` those of the output, and the taps are reversed.
static void transform_kernels(ffi::ThreadPool& pool, const float* kernel, const Grid& in,
                              const Grid& out, bool adjoint, float* u) {
  const int64_t depth = in.depth(), width = out.padded_depth();
  const int64_t stride = std::max(in.stride, out.stride), taps = 2 * stride + 1;
  const int64_t plane = padded_stride(depth * width);
  constexpr int64_t kRowsPerItem = 64;
  const int64_t pieces = (depth + kRowsPerItem - 1) / kRowsPerItem;
  parallel(pool, width / kLanes * pieces, [&](int64_t item, int64_t) {
    const int64_t n = item / pieces * kLanes, o = n % out.padded_channels();
    const int64_t first = item % pieces * kRowsPerItem;
    const int64_t last = std::min(depth, first + kRowsPerItem);
    const int64_t panel = n / kPanel * kPanel;
    const Lanes lanes = first_lanes(out.channels - o);
    for (int64_t k = first; k < last; k++) {
      const int64_t c = k % in.channels;
      const int64_t phase = adjoint ? n / out.padded_channels() : k / in.channels;
      float* to = u + panel * depth + k * std::min(kPanel, width - panel) + n % kPanel;
      transform_window<3, kWindow, transform_kernel>(
          [&](int i, int j) {
            const int64_t p = tap(stride, phase / stride, adjoint ? 2 - i : i);
            const int64_t q = tap(stride, phase % stride, adjoint ? 2 - j : j);
            const float* from = kernel + ((p * taps + q) * in.channels + c) * out.channels + o;
            return p < 0 || q < 0 ? Vector{} : load(from, lanes);
          },
          [&](int i, int j, Vector value) { store(to + (i * kWindow + j) * plane, value); });
    }
  });
}

// Convolutions ------------------------------------------------------------------------------------

// Both functions return false if there is no memory for them.

// Convolve `in` with the kernel, to `out`; with `adjoint`, `in` is the convolution's output and
// `out` its image.
static bool correlate(ffi::ThreadPool& pool, const Grid& in, const float* kernel, const Grid& out,
                      bool adjoint) {
  const int64_t depth = in.depth(), width = out.padded_depth(), tiles = in.tiles();
  // as many blocks for every thread, and all of one size
  const int64_t blocks = ceil_to(ceil_to(tiles, kBlock) / kBlock, workers(pool));
  const int64_t block = (tiles + blocks - 1) / blocks;
  const int64_t row = padded_stride(depth), u_plane = padded_stride(depth * width);
  const int64_t v_plane = padded_stride(block * row), m_plane = padded_stride(block * width);
  const int64_t items = (tiles + block - 1) / block;
  Scratch scratch(kPoints * (u_plane + workers(pool) * (v_plane + m_plane)));
  float* u = scratch.take(kPoints * u_plane);
  if (!u) return false;
  transform_kernels(pool, kernel, in, out, adjoint, u);
  const Strides v_strides = {kLanes, in.channels, v_plane};
  const Strides m_strides = {kLanes, out.padded_channels(), m_plane};
  parallel(pool, items, [&](int64_t item, int64_t worker) {
    float* v = u + kPoints * (u_plane + worker * (v_plane + m_plane));
    float* m = v + kPoints * v_plane;
    const int64_t first = item * block, count = std::min(block, tiles - first);
    for (int64_t t = 0; t < count; t++)
      gather<kWindow, 1, transform_inputs>(in, first + t, v + t * row, v_strides);
    for (int64_t point = 0; point < kPoints; point++) {
      const float *a = v + point * v_plane, *b = u + point * u_plane;
      float* c = m + point * m_plane;
      int64_t n = 0;
      for (; n + kPanel <= width; n += kPanel)
        multiply(count, depth, a, row, 1, b + n * depth, kPanel, kLanes, c + n, width, false);
      if (n < width)
        multiply<kRows, 1>(count, depth, a, row, 1, b + n * depth, kLanes, 0, c + n, width, false);
    }
    for (int64_t t = 0; t < count; t++) scatter(out, first + t, m + t * width, m_strides);
  });
  return true;
}

// Compute the gradient of the kernel from the image `in` and the gradient `out` of the output.
static bool correlate_adjoint(ffi::ThreadPool& pool, const Grid& in, const Grid& out,
                              float* kernel) {
  const int64_t depth = in.padded_depth(), width = out.padded_depth(), tiles = in.tiles();
  const int64_t most = std::max(kAdjointBlock, kAdjointFloats / (kPoints * (depth + width)));
  const int64_t blocks = (tiles + most - 1) / most, block = (tiles + blocks - 1) / blocks;
  const int64_t panel = padded_stride(block * kLanes), plane = padded_stride(depth * width);
  const int64_t v_plane = depth / kLanes * panel, m_plane = width / kLanes * panel;
  Scratch scratch(kPoints * (plane + v_plane + m_plane));
  float* u = scratch.take(kPoints * plane);
  float* v = scratch.take(kPoints * v_plane);
  float* m = scratch.take(kPoints * m_plane);
  if (!u) return false;
  const Strides v_strides = {panel, in.padded_channels() / kLanes * panel, v_plane};
  const Strides m_strides = {panel, 0, m_plane};
  constexpr int64_t kTiles = 4;  // of an item
  for (int64_t first = 0; first < tiles; first += block) {
    const int64_t count = std::min(block, tiles - first);
    parallel(pool, (count + kTiles - 1) / kTiles, [&](int64_t item, int64_t) {
      for (int64_t t = item * kTiles; t < std::min(count, (item + 1) * kTiles); t++) {
        gather<kWindow, 1, transform_inputs>(in, first + t, v + t * kLanes, v_strides);
        gather<kTile, 0, transform_outputs_adjoint>(out, first + t, m + t * kLanes, m_strides);
      }
    });
    const int64_t panels = ceil_to(width, kPanel) / kPanel;
    parallel(pool, kPoints * panels, [&](int64_t item, int64_t) {
      const int64_t point = item / panels, n = item % panels * kPanel;
      const float* b = m + point * m_plane + n / kLanes * panel;
      for (int64_t k = 0; k < depth; k += kLanes) {
        const float* a = v + point * v_plane + k / kLanes * panel;
        float* c = u + point * plane + k * width + n;
        const int64_t rows = std::min(kLanes, in.channels - k % in.padded_channels());
        if (n + kPanel <= width)
          multiply<kTransposedRows>(rows, count, a, 1, kLanes, b, kLanes, panel, c, width,
                                    first > 0);
        else
          multiply<kTransposedRows, 1>(rows, count, a, 1, kLanes, b, kLanes, 0, c, width,
                                       first > 0);
      }
    });
  }
  const int64_t stride = in.stride, taps = 2 * stride + 1;
  parallel(pool, in.channels, [&](int64_t c, int64_t) {
    for (int64_t phase = 0; phase < in.phases(); phase++)
      for (int64_t o = 0; o < out.channels; o += kLanes) {
        const float* from = u + (phase * in.padded_channels() + c) * width + o;
        const Lanes lanes = first_lanes(out.channels - o);
        transform_window<kWindow, 3, transform_kernel_adjoint>(
            [&](int i, int j) { return load(from + (i * kWindow + j) * plane); },
            [&](int i, int j, Vector value) {
              const int64_t p = tap(stride, phase / stride, i), q = tap(stride, phase % stride, j);
              float* to = kernel + ((p * taps + q) * in.channels + c) * out.channels + o;
              if (p >= 0 && q >= 0) store(to, value, lanes);
            });
      }
  });
  return true;
}
