// The report's convolutions on a CPU, float32: three maps, each in two forms.
//
// "winograd": 5x5 kernels of stride 2. Such a convolution is one of stride 1 by 3x3 kernels on the
// image's four pixel phases, which lie beside each other as channels; of the 3x3 taps of an even
// phase the first ones are zero. Winograd's F(4x4, 3x3) (Lavin and Gray, 2016, section 4) makes of
// tiles of 6x6 inputs and 4x4 outputs 36 matrix products, with a quarter of the multiplications:
//
//     V = B' d B    of the inputs    [36, tile, channel in]
//     U = G g G'    of the kernel    [36, channel in, channel out]
//     M = V U                        [36, tile, channel out]
//     Y = A' M A    the outputs
//
// "patches": few channels on the image's side. The patches that a kernel meets, one below the
// other, times the kernel.
//
// Work is dealt out in pieces whose results do not depend on who does them: the same bits on any
// number of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kRows = 12, kTurnedRows = 8;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kRows = 6, kTurnedRows = 4;
#else
constexpr int64_t kLanes = 4, kRows = 8, kTurnedRows = 4;
#endif
constexpr int64_t kPanel = 2 * kLanes;  // columns that a matrix product holds in registers
constexpr int64_t kBlock = 64, kTurnedBlock = 256;  // tiles at a time: they stay in a cache
constexpr int64_t kTile = 4, kWindow = 6, kPoints = kWindow * kWindow;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
static inline Vector load(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Vector value = {};
  std::memcpy(&value, from, 4 * count);
  return value;
}
static inline void store(float* to, Vector value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  std::memcpy(to, &value, 4 * count);
}
// Strides of many pages would put what is used together into the same few sets of a cache.
static inline int64_t spread(int64_t n) { return n + 3 * kLanes; }
static inline int64_t ceil_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static int64_t workers(ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// body(item, worker) for every item, with fewer workers than `workers`. The caller works too and waits
// only for items that somebody is at: XLA's threads may all be callers at once.
static void parallel(ffi::ThreadPool& pool, int64_t items,
                     const std::function<void(int64_t, int64_t)>& body) {
  struct Job {
    std::atomic<int64_t> next{0}, done{0}, workers{0};
  };
  auto job = std::make_shared<Job>();
  auto work = [job, items, &body]() {
    int64_t item = job->next++;
    if (item >= items) return;  // too late: `body` may be gone
    int64_t worker = job->workers++;
    for (; item < items; item = job->next++) {
      body(item, worker);
      job->done++;
    }
  };
  for (int64_t i = 1; i < std::min(items, workers(pool)); i++)
    pool.Schedule(std::function<void()>(work));
  work();
  while (job->done < items) std::this_thread::yield();
}

// Ask for large pages where memory is fresh, as XLA's is in every run of a program: it is about to be
// written from end to end, and a fault for each small page would take a tenth of the time.
static void large_pages(void* data, size_t size) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory to work in, kept from call to call: faults for fresh pages would take as long as the work.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const size_t wanted = ceil_to(4 * floats, kPage);
    {
      std::lock_guard<std::mutex> lock(mutex());
      auto& free = kept();
      auto fits = [wanted](const Memory& memory) { return memory.size >= wanted; };
      const auto found = std::find_if(free.begin(), free.end(), fits);
      if (found != free.end()) {
        memory_ = *found;
        free.erase(found);
        return;
      }
      if (!free.empty()) {  // one grows, and there are no more of them
        std::free(free.back().data);
        free.pop_back();
      }
    }
    memory_ = {static_cast<float*>(std::aligned_alloc(kPage, wanted)), wanted};
    if (memory_.data) large_pages(memory_.data, wanted);
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(mutex());
    if (memory_.data) kept().push_back(memory_);
  }
  Scratch(const Scratch&) = delete;
  float* take(int64_t floats) {  // null where there was no memory
    float* data = memory_.data ? memory_.data + taken_ : nullptr;
    taken_ += floats;
    return data;
  }

 private:
  struct Memory {
    float* data;
    size_t size;
  };
  static constexpr int64_t kPage = 2 << 20;
  static std::mutex& mutex() { static auto* one = new std::mutex; return *one; }
  static std::vector<Memory>& kept() { static auto* all = new std::vector<Memory>; return *all; }
  Memory memory_ = {nullptr, 0};
  int64_t taken_ = 0;
};

// Matrix products ---------------------------------------------------------------------------------

// c [rows, kPanel] (+)= a [rows, depth] b [depth, kPanel]; of `a` the strides are given, so that it
// may be a transposed one.
template <int kHeight>
static inline void product(int64_t depth, const float* a, int64_t row, int64_t column,
                           const float* b, int64_t ldb, int64_t right, float* c,
                           int64_t ldc, bool add) {
  Vector sum[kHeight][2];
  for (int i = 0; i < kHeight; i++) {
    sum[i][0] = add ? load(c + i * ldc) : Vector{};
    sum[i][1] = add ? load(c + i * ldc + kLanes) : Vector{};
  }
  for (int64_t k = 0; k < depth; k++, a += column, b += ldb) {
    const Vector near = load(b), far = load(b + right);
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; i++) {
      const float factor = a[i * row];
      sum[i][0] += factor * near;
      sum[i][1] += factor * far;
    }
  }
  for (int i = 0; i < kHeight; i++) {
    store(c + i * ldc, sum[i][0]);
    store(c + i * ldc + kLanes, sum[i][1]);
  }
}

template <int kHeight = kRows>
static void products(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t column,
                     const float* b, int64_t ldb, int64_t right, float* c,
                           int64_t ldc, bool add) {
  for (; rows >= kHeight; rows -= kHeight, a += kHeight * row, c += kHeight * ldc)
    product<kHeight>(depth, a, row, column, b, ldb, right, c, ldc, add);
  if constexpr (kHeight > 1)
    if (rows) products<kHeight - 1>(rows, depth, a, row, column, b, ldb, right, c, ldc, add);
}

// Winograd's transforms, in one direction: of the rows of a window, or of its columns ---------------

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
static void kernel_points(ffi::ThreadPool& pool, const float* kernel,
                          const Grid& in, const Grid& out, bool turned, float* u) {
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
        products(count, depth, v + point * v_plane, row, 1, u + point * u_plane + n * depth,
                 kPanel, kLanes, m + point * m_plane + n, width, false);
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
        for (int i = 0; i < kPoints; i++)
          points[i / kWindow][i % kWindow] = load(from + i * plane);
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

// Few channels on the image's side ----------------------------------------------------------------

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

static bool windows_forward(ffi::ThreadPool& pool, const Windows& g,
                            const float* image, const float* kernel, float* code) {
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

static bool windows_input_gradient(ffi::ThreadPool& pool, const Windows& g,
                                   const float* code, const float* kernel, float* image) {
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
                  around + (y + g.top) * g.lead() + g.left * g.channels,
                  4 * g.width * g.channels);
  });
  return true;
}

static bool windows_kernel_gradient(ffi::ThreadPool& pool, const Windows& g,
                                    const float* image, const float* code, float* kernel) {
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
                     g.stride * g.channels, row + o, wide, kLanes,
                     sum + p * g.across() * wide + o, wide, true);
      }
    }
  });
  for (int64_t part = 1; part < kParts; part++)
    for (int64_t i = 0; i < size; i++) parts[i] += parts[part * size + i];
  for (int64_t k = 0; k < g.depth(); k++)
    std::memcpy(kernel + k * g.outputs, parts + k * wide, 4 * g.outputs);
  return true;
}

// What XLA calls -----------------------------------------------------------------------------------

using In = ffi::Buffer<ffi::F32, 4>;
using Out = ffi::Result<In>;

static float* fresh(Out& result) {
  large_pages(result->typed_data(), result->size_bytes());
  return result->typed_data();
}

static ffi::Error done(bool enough) {
  if (enough) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a convolution to work in");
}

static Grid fine(In image) {
  const auto size = image.dimensions();
  return {image.typed_data(), size[0], size[1] / 2, size[2] / 2, size[3], 4};
}
static Grid coarse(const In& code) {
  const auto size = code.dimensions();
  return {code.typed_data(), size[0], size[1], size[2], size[3], 1};
}
static ffi::Error WinogradForward(ffi::ThreadPool pool, In image,
                                  In kernel, Out code) {
  return done(correlate(pool, fine(image), kernel.typed_data(), (fresh(code), coarse(*code)),
                        false));
}
// the kernel as [5, 5, out, in]
static ffi::Error WinogradInputGradient(ffi::ThreadPool pool,
                                        In code, In kernel, Out image) {
  return done(correlate(pool, coarse(code), kernel.typed_data(), (fresh(image), fine(*image)),
                        true));
}
static ffi::Error WinogradKernelGradient(ffi::ThreadPool pool,
                                         In image, In code, Out kernel) {
  return done(correlate_adjoint(pool, fine(image), coarse(code),
                                fresh(kernel)));
}

static Windows windows(const In& image, const In& kernel, const In& code, int64_t stride,
                       int64_t top, int64_t left) {
  const auto x = image.dimensions(), w = kernel.dimensions(), y = code.dimensions();
  return {x[0], x[1], x[2], x[3], y[1], y[2], y[3], w[0], stride, top, left};
}
static ffi::Error WindowsForward(ffi::ThreadPool pool, int64_t stride, int64_t top,
                                 int64_t left, In image, In kernel, Out code) {
  return done(windows_forward(pool, windows(image, kernel, *code, stride, top, left),
                              image.typed_data(), kernel.typed_data(), fresh(code)));
}
static ffi::Error WindowsInputGradient(ffi::ThreadPool pool, int64_t stride,
                                       int64_t top, int64_t left, In code, In kernel, Out image) {
  return done(windows_input_gradient(pool,
                                     windows(*image, kernel, code, stride, top, left),
                                     code.typed_data(), kernel.typed_data(), fresh(image)));
}
static ffi::Error WindowsKernelGradient(ffi::ThreadPool pool, int64_t stride,
                                        int64_t top, int64_t left, In image, In code, Out kernel) {
  return done(windows_kernel_gradient(pool,
                                      windows(image, *kernel, code, stride, top, left),
                                      image.typed_data(), code.typed_data(), fresh(kernel)));
}

#define WINOGRAD ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<In>().Arg<In>().Ret<In>()
#define WINDOWS ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() \
    .Attr<int64_t>("stride").Attr<int64_t>("top").Attr<int64_t>("left") \
    .Arg<In>().Arg<In>().Ret<In>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_winograd_forward, WinogradForward, WINOGRAD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_winograd_input_gradient, WinogradInputGradient, WINOGRAD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_winograd_kernel_gradient, WinogradKernelGradient, WINOGRAD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_windows_forward, WindowsForward, WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_windows_input_gradient, WindowsInputGradient, WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_windows_kernel_gradient, WindowsKernelGradient, WINDOWS);
