// 5x5 kernels of stride 2. Such a convolution is one of stride 1 by 3x3 kernels on the
// image's four pixel phases, which lie beside each other as channels; of the 3x3 taps of an even
// phase the first ones are zero. Winograd's F(4x4, 3x3) (Lavin and Gray, 2016, section 4) makes of
// tiles of 6x6 inputs and 4x4 outputs 36 matrix products, with a quarter of the multiplications:
//
//     V = B' d B    of the inputs    [36, tile, channel in]
//     U = G g G'    of the kernel    [36, channel in, channel out]
//     M = V U                        [36, tile, channel out]
//     Y = A' M A    the outputs
#pragma once

#include "common.h"

constexpr int64_t kBlock = 64, kTurnedBlock = 256;  // tiles at a time: they stay in a cache
constexpr int64_t kTile = 4, kWindow = 6, kPoints = kWindow * kWindow;

// The transforms in one direction: of the rows of a window, or of its columns

static inline void inputs(const Vector d[6], Vector v[6]) {  // B' d
  v[0] = 4 * d[0] - 5 * d[2] + d[4];
  v[1] = d[4] + d[3] - 4 * (d[1] + d[2]);
  v[2] = d[4] - d[3] + 4 * (d[1] - d[2]);
  v[3] = d[4] - d[2] + 2 * (d[3] - d[1]);
  v[4] = d[4] - d[2] - 2 * (d[3] - d[1]);
  v[5] = 4 * d[1] - 5 * d[3] + d[5];
}
static inline void kernels(const Vector g[3], Vector u[6]) {  // G g
  const Vector sum = (g[0] + g[2]) * (-1 / 6.f), mid = g[1] * (-1 / 6.f);
  const Vector far = g[0] * (1 / 24.f) + g[2] * (1 / 6.f), odd = g[1] * (1 / 12.f);
  u[0] = g[0] * 0.25f;
  u[1] = sum + mid;
  u[2] = sum - mid;
  u[3] = far + odd;
  u[4] = far - odd;
  u[5] = g[2];
}
static inline void kernels_adjoint(const Vector u[6], Vector g[3]) {  // G' u
  const Vector near = u[1] + u[2], far = u[3] + u[4];
  g[0] = u[0] * 0.25f - near * (1 / 6.f) + far * (1 / 24.f);
  g[1] = (u[2] - u[1]) * (1 / 6.f) + (u[3] - u[4]) * (1 / 12.f);
  g[2] = (far - near) * (1 / 6.f) + u[5];
}
static inline void outputs(const Vector m[6], Vector y[4]) {  // A' m
  const Vector near = m[1] + m[2], odd = m[1] - m[2], far = m[3] + m[4], odder = m[3] - m[4];
  y[0] = m[0] + near + far;
  y[1] = odd + 2 * odder;
  y[2] = near + 4 * far;
  y[3] = odd + 8 * odder + m[5];
}
static inline void outputs_adjoint(const Vector y[4], Vector m[6]) {  // A y
  const Vector even = y[0] + y[2], odd = y[1] + y[3];
  const Vector evener = y[0] + 4 * y[2], odder = 2 * y[1] + 8 * y[3];
  m[0] = y[0];
  m[1] = even + odd;
  m[2] = even - odd;
  m[3] = evener + odder;
  m[4] = evener - odder;
  m[5] = y[3];
}

// Apply a transform to the rows and to the columns of [kIn, kIn] vectors.
template <int kIn, int kOut, void (*transform)(const Vector*, Vector*)>
static inline void both(const Vector in[kIn][kIn], Vector out[kOut][kOut]) {
  Vector turned[kOut][kIn], column[kIn], done[kOut];
  for (int j = 0; j < kIn; j++) {
    for (int i = 0; i < kIn; i++) column[i] = in[i][j];
    transform(column, done);
    for (int i = 0; i < kOut; i++) turned[i][j] = done[i];
  }
  for (int i = 0; i < kOut; i++) transform(turned[i], out[i]);
}

// An image as the 3x3 convolution sees it: pixels of a grid, with the channels of all phases.
struct Grid {
  float* data;
  int64_t images, height, width, channels, phases;  // height and width of the grid; phases 1 or 4

  int64_t padded() const { return ceil_to(channels, kLanes); }  // channels of a phase
  int64_t depth() const { return phases * padded(); }
  int64_t tiles() const { return images * down() * across(); }
  int64_t down() const { return (height + kTile - 1) / kTile; }
  int64_t across() const { return (width + kTile - 1) / kTile; }
  bool has(int64_t y, int64_t x) const { return 0 <= y && y < height && 0 <= x && x < width; }
  float* at(int64_t image, int64_t y, int64_t x, int64_t phase) const {
    const int64_t step = phases == 4 ? 2 : 1;
    const int64_t row = image * step * height + step * y + phase / 2;
    return data + (row * step * width + step * x + phase % 2) * channels;
  }
};

// The windows of kSide by kSide pixels of a tile, `before` pixels in front of it, transformed:
// to `out` [36, tiles, stride] at one of the tiles.
template <int kSide, int64_t before, void (*transform)(const Vector*, Vector*)>
static void gather(const Grid& grid, int64_t tile, float* out, int64_t unit, int64_t plane) {
  const int64_t across = grid.across(), down = grid.down();
  const int64_t x = tile % across * kTile - before;
  const int64_t y = tile / across % down * kTile - before, image = tile / across / down;
  for (int64_t phase = 0; phase < grid.phases; phase++) {
    const float* from[kSide][kSide];
    for (int i = 0; i < kSide; i++)
      for (int j = 0; j < kSide; j++)
        from[i][j] = grid.has(y + i, x + j) ? grid.at(image, y + i, x + j, phase) : nullptr;
    for (int64_t c = 0; c < grid.padded(); c += kLanes) {
      Vector window[kSide][kSide], done[kWindow][kWindow];
      for (int i = 0; i < kSide; i++)
        for (int j = 0; j < kSide; j++)
          window[i][j] = from[i][j] ? load(from[i][j] + c, grid.channels - c) : Vector{};
      both<kSide, kWindow, transform>(window, done);
      float* to = out + (phase * grid.padded() + c) / kLanes * unit;
      for (int i = 0; i < kPoints; i++) store(to + i * plane, done[i / kWindow][i % kWindow]);
    }
  }
}

// The outputs of a tile from M [36, tiles, depth].
static void scatter(const Grid& grid, int64_t tile, const float* m, int64_t plane) {
  const int64_t across = grid.across(), down = grid.down();
  const int64_t x = tile % across * kTile, y = tile / across % down * kTile;
  const int64_t image = tile / across / down;
  for (int64_t phase = 0; phase < grid.phases; phase++)
    for (int64_t c = 0; c < grid.channels; c += kLanes) {
      const float* from = m + phase * grid.padded() + c;
      Vector window[kWindow][kWindow], done[kTile][kTile];
      for (int i = 0; i < kPoints; i++) window[i / kWindow][i % kWindow] = load(from + i * plane);
      both<kWindow, kTile, outputs>(window, done);
      for (int i = 0; i < kTile; i++)
        for (int j = 0; j < kTile; j++)
          if (grid.has(y + i, x + j))
            store(grid.at(image, y + i, x + j, phase) + c, done[i][j], grid.channels - c);
    }
}

// Which of the five taps is the t-th of three that meet a phase; -1 for none.
static inline int64_t tap(int64_t phase, int64_t t) { return 2 * t - 1 + phase; }

// U from the kernel [5, 5, in, out], in panels of columns. The phases belong to the inputs of a
// convolution; with `turned`, to the outputs of its adjoint, whose taps stand the other way round.
static void kernel_points(ffi::ThreadPool& pool, const float* kernel, const Grid& in,
                          const Grid& out, bool turned, float* u) {
  const int64_t depth = in.depth(), width = ceil_to(out.depth(), kPanel);
  const int64_t plane = spread(depth * width);
  constexpr int64_t kSome = 64;
  const int64_t pieces = (depth + kSome - 1) / kSome;
  parallel(pool, width / kLanes * pieces, [&](int64_t item, int64_t) {
    const int64_t n = item / pieces * kLanes, o = n % out.padded();
    const int64_t first = item % pieces * kSome, last = std::min(depth, first + kSome);
    for (int64_t k = first; k < last; k++) {
      const int64_t c = k % in.padded();
      const int64_t phase = turned ? n / out.padded() : k / in.padded();
      const int64_t left = n < out.depth() && c < in.channels ? out.channels - o : 0;
      Vector taps[3][3], points[kWindow][kWindow];
      for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) {
          const int64_t p = tap(phase / 2, turned ? 2 - i : i);
          const int64_t q = tap(phase % 2, turned ? 2 - j : j);
          const float* from = kernel + ((p * 5 + q) * in.channels + c) * out.channels + o;
          taps[i][j] = p < 0 || q < 0 || left <= 0 ? Vector{} : load(from, left);
        }
      both<3, kWindow, kernels>(taps, points);
      float* to = u + n / kPanel * depth * kPanel + k * kPanel + n % kPanel;
      for (int i = 0; i < kPoints; i++) store(to + i * plane, points[i / kWindow][i % kWindow]);
    }
  });
}

static bool correlate(ffi::ThreadPool& pool, const Grid& in, const float* kernel, const Grid& out,
                      bool turned) {
  const int64_t depth = in.depth(), width = ceil_to(out.depth(), kPanel), tiles = in.tiles();
  const int64_t share = (tiles + workers(pool) - 1) / workers(pool);
  const int64_t block = std::min(kBlock, ceil_to(share, kRows));
  const int64_t row = spread(depth), u_plane = spread(depth * width);
  const int64_t v_plane = spread(block * row), m_plane = spread(block * width);
  const int64_t items = (tiles + block - 1) / block;
  Scratch scratch(kPoints * (u_plane + workers(pool) * (v_plane + m_plane)));
  float* u = scratch.take(kPoints * u_plane);
  if (!u) return false;
  kernel_points(pool, kernel, in, out, turned, u);
  parallel(pool, items, [&](int64_t item, int64_t worker) {
    float* v = u + kPoints * (u_plane + worker * (v_plane + m_plane));
    float* m = v + kPoints * v_plane;
    const int64_t first = item * block, count = std::min(block, tiles - first);
    for (int64_t t = 0; t < count; t++)
      gather<kWindow, 1, inputs>(in, first + t, v + t * row, kLanes, v_plane);
    for (int64_t point = 0; point < kPoints; point++)
      for (int64_t n = 0; n < width; n += kPanel)
        products(count, depth, v + point * v_plane, row, 1, u + point * u_plane + n * depth, kPanel,
                 kLanes, m + point * m_plane + n, width, false);
    for (int64_t t = 0; t < count; t++) scatter(out, first + t, m + t * width, m_plane);
  });
  return true;
}

static bool correlate_adjoint(ffi::ThreadPool& pool, const Grid& in, const Grid& out,
                              float* kernel) {
  const int64_t depth = in.depth(), width = ceil_to(out.depth(), kPanel), tiles = in.tiles();
  const int64_t block = std::min(kTurnedBlock, tiles);
  const int64_t panel = spread(block * kLanes), plane = spread(depth * width);
  const int64_t v_plane = depth / kLanes * panel, m_plane = width / kLanes * panel;
  Scratch scratch(kPoints * (plane + v_plane + m_plane));
  float* u = scratch.take(kPoints * plane);
  float* v = scratch.take(kPoints * v_plane);
  float* m = scratch.take(kPoints * m_plane);
  if (!u) return false;
  constexpr int64_t kSome = 4;
  if (width != out.depth()) std::memset(m, 0, 4 * kPoints * m_plane);
  for (int64_t first = 0; first < tiles; first += block) {
    const int64_t count = std::min(block, tiles - first);
    parallel(pool, (count + kSome - 1) / kSome, [&](int64_t item, int64_t) {
      for (int64_t t = item * kSome; t < std::min(count, (item + 1) * kSome); t++) {
        gather<kWindow, 1, inputs>(in, first + t, v + t * kLanes, panel, v_plane);
        gather<kTile, 0, outputs_adjoint>(out, first + t, m + t * kLanes, panel, m_plane);
      }
    });
    const int64_t panels = width / kPanel;
    parallel(pool, kPoints * panels, [&](int64_t item, int64_t) {
      const int64_t point = item / panels, n = item % panels * kPanel;
      for (int64_t k = 0; k < depth; k += kLanes)
        products<kTurnedRows>(kLanes, count, v + point * v_plane + k / kLanes * panel, 1, kLanes,
                              m + point * m_plane + n / kLanes * panel, kLanes, panel,
                              u + point * plane + k * width + n, width, first > 0);
    });
  }
  parallel(pool, in.channels, [&](int64_t c, int64_t) {
    for (int64_t phase = 0; phase < in.phases; phase++)
      for (int64_t o = 0; o < out.channels; o += kLanes) {
        const float* from = u + (phase * in.padded() + c) * width + o;
        Vector points[kWindow][kWindow], taps[3][3];
        for (int i = 0; i < kPoints; i++) points[i / kWindow][i % kWindow] = load(from + i * plane);
        both<kWindow, 3, kernels_adjoint>(points, taps);
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
