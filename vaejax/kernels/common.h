// What all kernels share: SIMD vectors, threads, scratch memory and matrix products.
//
// Work is divided into items of a fixed size, whose results do not depend on the thread that
// computes them: the result has the same bits with any number of threads.
#pragma once

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
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// kLanes: floats in a SIMD register. kRows and kTransposedRows: rows that a matrix product holds in
// registers, for a left factor in memory order and for a transposed one.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kRows = 12, kTransposedRows = 8;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kRows = 6, kTransposedRows = 4;
#else
constexpr int64_t kLanes = 4, kRows = 8, kTransposedRows = 4;
#endif
constexpr int64_t kPanel = 2 * kLanes;  // columns that a matrix product holds in registers

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// Which lanes of a vector to load or to store: the first `count`, all of them if there are fewer.
// kAllLanes & lanes are those lanes.
#if defined(__AVX512F__)
typedef __mmask16 Lanes;
constexpr Lanes kAllLanes = 0xffff;
static inline Lanes first_lanes(int64_t count) {
  return count >= kLanes ? kAllLanes : (1 << count) - 1;
}
// The other lanes are zero, and their memory is not read.
static inline Vector load(const float* from, Lanes lanes) {
  return (Vector)_mm512_maskz_loadu_ps(lanes, from);
}
static inline void store(float* to, Vector value, Lanes lanes) {
  _mm512_mask_storeu_ps(to, lanes, (__m512)value);
}
#else
typedef int64_t Lanes;  // their number
constexpr Lanes kAllLanes = -1;
static inline Lanes first_lanes(int64_t count) { return std::min(count, kLanes); }
static inline Vector load(const float* from, Lanes lanes) {
  if (lanes == kLanes) return load(from);
  Vector value = {};
  if (lanes) std::memcpy(&value, from, 4 * lanes);
  return value;
}
static inline void store(float* to, Vector value, Lanes lanes) {
  if (lanes == kLanes) return store(to, value);
  if (lanes) std::memcpy(to, &value, 4 * lanes);
}
#endif
static inline int64_t ceil_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
// A stride for rows of n floats: an odd number of vectors, with up to one of them unused. Strides of
// a multiple of the page size would map all rows to the same few sets of the cache.
static inline int64_t padded_stride(int64_t n) { return ceil_to(n, 2 * kLanes) + kLanes; }

// The threads that a kernel uses: those of XLA's pool, of which there may be more than cores.
static int64_t workers(ffi::ThreadPool& pool) {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(pool.num_threads(), 1, cores);
}

// Call body(item, worker) for every item; workers are numbered from 0. The calling thread is one of
// them, and waits only for items that another thread has begun: all threads of XLA's pool may call
// this at once, and then none is free to help.
static void parallel(ffi::ThreadPool& pool, int64_t items,
                     const std::function<void(int64_t, int64_t)>& body) {
  struct Job {
    std::atomic<int64_t> next{0}, done{0}, workers{0};
  };
  auto job = std::make_shared<Job>();
  auto work = [job, items, &body]() {
    int64_t item = job->next++;
    if (item >= items) return;  // the caller may have returned, and `body` with it
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

// Scratch memory, kept from call to call: page faults of new memory would take as long as the work.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const size_t bytes = ceil_to(4 * floats, kPage);
    {
      std::lock_guard<std::mutex> lock(mutex());
      auto& free = unused();
      auto fits = [bytes](const Memory& memory) { return memory.size >= bytes; };
      const auto first = std::find_if(free.begin(), free.end(), fits);
      if (first != free.end()) {
        memory_ = *first;
        free.erase(first);
        return;
      }
      if (!free.empty()) {  // replace one by a larger one, so that their number does not grow
        std::free(free.back().data);
        free.pop_back();
      }
    }
    memory_ = {static_cast<float*>(std::aligned_alloc(kPage, bytes)), bytes};
#if defined(__linux__)
    if (memory_.data) madvise(memory_.data, bytes, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(mutex());
    if (memory_.data) unused().push_back(memory_);
  }
  Scratch(const Scratch&) = delete;
  float* take(int64_t floats) {  // null if no memory could be allocated
    float* data = memory_.data ? memory_.data + taken_ : nullptr;
    taken_ += floats;
    return data;
  }

 private:
  struct Memory {
    float* data;
    size_t size;
  };
  static constexpr int64_t kPage = 2 << 20;  // bytes of a huge page
  // never destroyed: threads may still use them while the process ends
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<Memory>& unused() {
    static auto* memories = new std::vector<Memory>;
    return *memories;
  }
  Memory memory_ = {nullptr, 0};
  int64_t taken_ = 0;
};

// Matrix products ---------------------------------------------------------------------------------

// c = a b, or c += a b if `add`, for a [kHeight, depth] and b [depth, kVectors * kLanes], one row of
// registers for each row of c. `row` and `column` are the strides of a, which may be a transposed
// matrix; ldb and ldc are those of the rows of b and c. The second vector of a row of b lies `right`
// floats behind the first.
template <int kHeight, int kVectors>
static inline void multiply_block(int64_t depth, const float* a, int64_t row, int64_t column,
                                  const float* b, int64_t ldb, int64_t right, float* c,
                                  int64_t ldc, bool add) {
  Vector sum[kHeight][kVectors];
  for (int i = 0; i < kHeight; i++)
    for (int j = 0; j < kVectors; j++) sum[i][j] = add ? load(c + i * ldc + j * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; k++, a += column, b += ldb) {
    Vector factors[kVectors];
    for (int j = 0; j < kVectors; j++) factors[j] = load(b + j * right);
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; i++)
      for (int j = 0; j < kVectors; j++) sum[i][j] += a[i * row] * factors[j];
  }
  for (int i = 0; i < kHeight; i++)
    for (int j = 0; j < kVectors; j++) store(c + i * ldc + j * kLanes, sum[i][j]);
}

// The same for any number of rows: blocks of kHeight rows, then one lower block.
template <int kHeight = kRows, int kVectors = 2>
static void multiply(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t column,
                     const float* b, int64_t ldb, int64_t right, float* c, int64_t ldc, bool add) {
  for (; rows >= kHeight; rows -= kHeight, a += kHeight * row, c += kHeight * ldc)
    multiply_block<kHeight, kVectors>(depth, a, row, column, b, ldb, right, c, ldc, add);
  if constexpr (kHeight > 1)
    if (rows)
      multiply<kHeight - 1, kVectors>(rows, depth, a, row, column, b, ldb, right, c, ldc, add);
}
