// What all kernels share: vectors, threads, memory, matrix products.
//
// Work is dealt out in pieces whose results do not depend on who does them: the same bits on any
// number of threads.
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

// body(item, worker) for every item; workers count from 0. The caller is one of them, and waits
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
#if defined(__linux__)
    if (memory_.data) madvise(memory_.data, wanted, MADV_HUGEPAGE);
#endif
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
  static std::mutex& mutex() {
    static auto* one = new std::mutex;
    return *one;
  }
  static std::vector<Memory>& kept() {
    static auto* all = new std::vector<Memory>;
    return *all;
  }
  Memory memory_ = {nullptr, 0};
  int64_t taken_ = 0;
};

// Matrix products ---------------------------------------------------------------------------------

// c [rows, kPanel] (+)= a [rows, depth] b [depth, kPanel]; of `a` the strides are given, so that it
// may be a transposed one.
template <int kHeight>
static inline void product(int64_t depth, const float* a, int64_t row, int64_t column,
                           const float* b, int64_t ldb, int64_t right, float* c, int64_t ldc,
                           bool add) {
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
                     const float* b, int64_t ldb, int64_t right, float* c, int64_t ldc, bool add) {
  for (; rows >= kHeight; rows -= kHeight, a += kHeight * row, c += kHeight * ldc)
    product<kHeight>(depth, a, row, column, b, ldb, right, c, ldc, add);
  if constexpr (kHeight > 1)
    if (rows) products<kHeight - 1>(rows, depth, a, row, column, b, ldb, right, c, ldc, add);
}
