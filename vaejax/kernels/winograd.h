// Convolutions by 5x5 kernels with stride 2.
//
// Split the image into four phases, by whether the row and the column of a pixel are even or odd,
// and put them side by side as channels: the convolution becomes one of 3x3 taps with stride 1. In
// a direction where the phase is even, the first of the three taps is zero.
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

constexpr int64_t kBlock = 64, kAdjointBlock = 256;  // tiles at a time, few enough for a cache
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

// Apply a transform to the columns and then to the rows of [kIn, kIn] vectors.
template <int kIn, int kOut, void (*transform)(const Vector*, Vector*)>
static inline void transform_window(const Vector in[kIn][kIn], Vector out[kOut][kOut]) {
  Vector half[kOut][kIn], column[kIn], transformed[kOut];
  for (int j = 0; j < kIn; j++) {
    for (int i = 0; i < kIn; i++) column[i] = in[i][j];
    transform(column, transformed);
    for (int i = 0; i < kOut; i++) half[i][j] = transformed[i];
  }
  for (int i = 0; i < kOut; i++) transform(half[i], out[i]);
}

// An array [images, height, width, channels] as the 3x3 convolution sees it. With four phases,
// `data` is the image, of twice the height and width; with one, it is the convolution's output.
struct Grid {
  float* data;
  int64_t images, height, width, channels, phases;  // channels of a phase; phases is 1 or 4

  int64_t padded_channels() const { return ceil_to(channels, kLanes); }
  int64_t depth() const { return phases * padded_channels(); }  // channels of all phases
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
  int64_t tile_rows() const { return (height + kTile - 1) / kTile; }
  int64_t tile_columns() const { return (width + kTile - 1) / kTile; }
  bool has(int64_t y, int64_t x) const { return 0 <= y && y < height && 0 <= x && x < width; }
  float* at(int64_t image, int64_t y, int64_t x, int64_t phase) const {
    const int64_t step = phases == 4 ? 2 : 1;
    const int64_t row = image * step * height + step * y + phase / 2;
    return data + (row * step * width + step * x + phase % 2) * channels;
  }
};

// Transform the window of kSide x kSide pixels that begins `before` pixels above and left of a
// tile, for all its channels. `plane` is the stride of the 36 points in `out`, and `unit` that of
// the vectors of channels.
template <int kSide, int64_t before, void (*transform)(const Vector*, Vector*)>
static void gather(const Grid& grid, int64_t tile, float* out, int64_t unit, int64_t plane) {
  const int64_t columns = grid.tile_columns(), rows = grid.tile_rows();
  const int64_t x = tile % columns * kTile - before;
  const int64_t y = tile / columns % rows * kTile - before, image = tile / columns / rows;
  for (int64_t phase = 0; phase < grid.phases; phase++) {
    const float* from[kSide][kSide];
    for (int i = 0; i < kSide; i++)
      for (int j = 0; j < kSide; j++)
        from[i][j] = grid.has(y + i, x + j) ? grid.at(image, y + i, x + j, phase) : nullptr;
    for (int64_t c = 0; c < grid.padded_channels(); c += kLanes) {
      Vector window[kSide][kSide], points[kWindow][kWindow];
      for (int i = 0; i < kSide; i++)
        for (int j = 0; j < kSide; j++)
          window[i][j] = from[i][j] ? load(from[i][j] + c, grid.channels - c) : Vector{};
      transform_window<kSide, kWindow, transform>(window, points);
      float* to = out + (phase * grid.padded_channels() + c) / kLanes * unit;
      for (int i = 0; i < kPoints; i++) store(to + i * plane, points[i / kWindow][i % kWindow]);
    }
  }
}

// Compute the outputs of a tile from its points in M; `plane` is the stride of the 36 points.
static void scatter(const Grid& grid, int64_t tile, const float* m, int64_t plane) {
  const int64_t columns = grid.tile_columns(), rows = grid.tile_rows();
  const int64_t x = tile % columns * kTile, y = tile / columns % rows * kTile;
  const int64_t image = tile / columns / rows;
  for (int64_t phase = 0; phase < grid.phases; phase++)
    for (int64_t c = 0; c < grid.channels; c += kLanes) {
      const float* from = m + phase * grid.padded_channels() + c;
      Vector points[kWindow][kWindow], outputs[kTile][kTile];
      for (int i = 0; i < kPoints; i++) points[i / kWindow][i % kWindow] = load(from + i * plane);
      transform_window<kWindow, kTile, transform_outputs>(points, outputs);
      for (int i = 0; i < kTile; i++)
        for (int j = 0; j < kTile; j++)
          if (grid.has(y + i, x + j))
            store(grid.at(image, y + i, x + j, phase) + c, outputs[i][j], grid.channels - c);
    }
}

// Kernels -----------------------------------------------------------------------------------------

// Which of the five taps of a direction is the t-th of the three of a phase; -1 for none.
static inline int64_t tap(int64_t phase, int64_t t) { return 2 * t - 1 + phase; }

// Compute U, in panels of kPanel columns, from the kernel as [5, 5, in.channels, out.channels]. The
// phases are those of the input; with `adjoint` those of the output, and the taps are reversed.
static void transform_kernels(ffi::ThreadPool& pool, const float* kernel, const Grid& in,
                          const Grid& out, bool adjoint, float* u) {
  const int64_t depth = in.depth(), width = ceil_to(out.depth(), kPanel);
  const int64_t plane = padded_stride(depth * width);
  constexpr int64_t kRowsPerItem = 64;
  const int64_t pieces = (depth + kRowsPerItem - 1) / kRowsPerItem;
  parallel(pool, width / kLanes * pieces, [&](int64_t item, int64_t) {
    const int64_t n = item / pieces * kLanes, o = n % out.padded_channels();
    const int64_t first = item % pieces * kRowsPerItem;
    const int64_t last = std::min(depth, first + kRowsPerItem);
    for (int64_t k = first; k < last; k++) {
      const int64_t c = k % in.padded_channels();
      const int64_t phase = adjoint ? n / out.padded_channels() : k / in.padded_channels();
      const int64_t left = n < out.depth() && c < in.channels ? out.channels - o : 0;
      Vector taps[3][3], points[kWindow][kWindow];
      for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) {
          const int64_t p = tap(phase / 2, adjoint ? 2 - i : i);
          const int64_t q = tap(phase % 2, adjoint ? 2 - j : j);
          const float* from = kernel + ((p * 5 + q) * in.channels + c) * out.channels + o;
          taps[i][j] = p < 0 || q < 0 || left <= 0 ? Vector{} : load(from, left);
        }
      transform_window<3, kWindow, transform_kernel>(taps, points);
      float* to = u + n / kPanel * depth * kPanel + k * kPanel + n % kPanel;
      for (int i = 0; i < kPoints; i++) store(to + i * plane, points[i / kWindow][i % kWindow]);
    }
  });
}

// Convolutions ------------------------------------------------------------------------------------

// Both functions return false if there is no memory for them.

// Convolve `in` with the kernel, to `out`; with `adjoint`, `in` is the convolution's output and
// `out` its image.
static bool correlate(ffi::ThreadPool& pool, const Grid& in, const float* kernel, const Grid& out,
                      bool adjoint) {
  const int64_t depth = in.depth(), width = ceil_to(out.depth(), kPanel), tiles = in.tiles();
  const int64_t share = (tiles + workers(pool) - 1) / workers(pool);
  const int64_t block = std::min(kBlock, ceil_to(share, kRows));
  const int64_t row = padded_stride(depth), u_plane = padded_stride(depth * width);
  const int64_t v_plane = padded_stride(block * row), m_plane = padded_stride(block * width);
  const int64_t items = (tiles + block - 1) / block;
  Scratch scratch(kPoints * (u_plane + workers(pool) * (v_plane + m_plane)));
  float* u = scratch.take(kPoints * u_plane);
  if (!u) return false;
  transform_kernels(pool, kernel, in, out, adjoint, u);
  parallel(pool, items, [&](int64_t item, int64_t worker) {
    float* v = u + kPoints * (u_plane + worker * (v_plane + m_plane));
    float* m = v + kPoints * v_plane;
    const int64_t first = item * block, count = std::min(block, tiles - first);
    for (int64_t t = 0; t < count; t++)
      gather<kWindow, 1, transform_inputs>(in, first + t, v + t * row, kLanes, v_plane);
    for (int64_t point = 0; point < kPoints; point++)
      for (int64_t n = 0; n < width; n += kPanel)
        multiply(count, depth, v + point * v_plane, row, 1, u + point * u_plane + n * depth, kPanel,
                 kLanes, m + point * m_plane + n, width, false);
    for (int64_t t = 0; t < count; t++) scatter(out, first + t, m + t * width, m_plane);
  });
  return true;
}

// Compute the gradient of the kernel from the image `in` and the gradient `out` of the output.
static bool correlate_adjoint(ffi::ThreadPool& pool, const Grid& in, const Grid& out,
                              float* kernel) {
  const int64_t depth = in.depth(), width = ceil_to(out.depth(), kPanel), tiles = in.tiles();
  const int64_t block = std::min(kAdjointBlock, tiles);
  const int64_t panel = padded_stride(block * kLanes), plane = padded_stride(depth * width);
  const int64_t v_plane = depth / kLanes * panel, m_plane = width / kLanes * panel;
  Scratch scratch(kPoints * (plane + v_plane + m_plane));
  float* u = scratch.take(kPoints * plane);
  float* v = scratch.take(kPoints * v_plane);
  float* m = scratch.take(kPoints * m_plane);
  if (!u) return false;
  constexpr int64_t kTiles = 4;  // of an item
  if (width != out.depth()) std::memset(m, 0, 4 * kPoints * m_plane);
  for (int64_t first = 0; first < tiles; first += block) {
    const int64_t count = std::min(block, tiles - first);
    parallel(pool, (count + kTiles - 1) / kTiles, [&](int64_t item, int64_t) {
      for (int64_t t = item * kTiles; t < std::min(count, (item + 1) * kTiles); t++) {
        gather<kWindow, 1, transform_inputs>(in, first + t, v + t * kLanes, panel, v_plane);
        gather<kTile, 0, transform_outputs_adjoint>(out, first + t, m + t * kLanes, panel,
                                                    m_plane);
      }
    });
    const int64_t panels = width / kPanel;
    parallel(pool, kPoints * panels, [&](int64_t item, int64_t) {
      const int64_t point = item / panels, n = item % panels * kPanel;
      for (int64_t k = 0; k < depth; k += kLanes)
        multiply<kTransposedRows>(kLanes, count, v + point * v_plane + k / kLanes * panel, 1,
                                  kLanes, m + point * m_plane + n / kLanes * panel, kLanes, panel,
                                  u + point * plane + k * width + n, width, first > 0);
    });
  }
  parallel(pool, in.channels, [&](int64_t c, int64_t) {
    for (int64_t phase = 0; phase < in.phases; phase++)
      for (int64_t o = 0; o < out.channels; o += kLanes) {
        const float* from = u + (phase * in.padded_channels() + c) * width + o;
        Vector points[kWindow][kWindow], taps[3][3];
        for (int i = 0; i < kPoints; i++) points[i / kWindow][i % kWindow] = load(from + i * plane);
        transform_window<kWindow, 3, transform_kernel_adjoint>(points, taps);
        for (int i = 0; i < 3; i++)
          for (int j = 0; j < 3; j++) {
            const int64_t p = tap(phase / 2, i), q = tap(phase % 2, j);
            if (p >= 0 && q >= 0)
              store(kernel + ((p * 5 + q) * in.channels + c) * out.channels + o, taps[i][j],
                    out.channels - o);
          }
      }
  });
  return true;
}
