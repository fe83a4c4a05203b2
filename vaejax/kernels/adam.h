// What an optimizer does to every parameter: Adam's update, and the squared norm of a gradient.
#pragma once

#include <algorithm>
#include <cmath>

#include "common.h"

constexpr int64_t kPiece = 1 << 16;  // numbers that a thread takes at a time

// Adam's step for a learning rate of 1 and its new moments; each may overwrite one of the inputs.
// `norm` is that of the gradient of all parameters: where it is NaN or infinite, the step is zero
// and the moments stay as they were.
static void adam(ffi::ThreadPool& pool, int64_t size, double b1, double b2, double eps,
                 const float* corrections, float norm, const float* gradient, const float* mean,
                 const float* square, float* step, float* new_mean, float* new_square) {
  if (!std::isfinite(norm)) {
    std::fill_n(step, size, 0.0f);
    if (new_mean != mean) std::copy_n(mean, size, new_mean);
    if (new_square != square) std::copy_n(square, size, new_square);
    return;
  }
  // 1 - b is computed in double precision: 1.0f - 0.999f is wrong in the fifth digit
  const float decay = b1, weight = 1 - b1, square_decay = b2, square_weight = 1 - b2;
  const float epsilon = eps, correction = corrections[0], square_correction = corrections[1];
  parallel(pool, (size + kPiece - 1) / kPiece, [=](int64_t item, int64_t) {
    const int64_t last = std::min(size, (item + 1) * kPiece);
    // Safe to vectorize: an output either is the very array that an input is, read and written at
    // the same index, or does not overlap with any.
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int64_t i = item * kPiece; i < last; i++) {
      const float g = gradient[i];
      const float m = weight * g + decay * mean[i];
      const float v = square_weight * (g * g) + square_decay * square[i];
      new_mean[i] = m;
      new_square[i] = v;
      step[i] = (m / correction) / (std::sqrt(v / square_correction) + epsilon);
    }
  });
}

// The sum of squares of all numbers. The pieces are added in double precision and in their order,
// so that the result does not depend on the number of threads.
static float squared_norm(ffi::ThreadPool& pool, int64_t size, const float* x) {
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  std::vector<double> sums(pieces);
  parallel(pool, pieces, [&](int64_t item, int64_t) {
    const int64_t first = item * kPiece, last = std::min(size, first + kPiece);
    Vector sum[4] = {};  // four sums, so that an addition does not wait for the one before
    int64_t i = first;
    for (; i + 4 * kLanes <= last; i += 4 * kLanes)
      for (int j = 0; j < 4; j++) {
        const Vector values = load(x + i + j * kLanes);
        sum[j] += values * values;
      }
    double total = 0;
    for (int j = 0; j < 4; j++)
      for (int k = 0; k < kLanes; k++) total += sum[j][k];
    for (; i < last; i++) total += static_cast<double>(x[i]) * x[i];
    sums[item] = total;
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}
