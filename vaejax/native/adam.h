// What an optimizer does to every parameter.
#pragma once

#include <algorithm>
#include <cmath>

#include "common.h"

constexpr int64_t kPiece = 1 << 16;  // numbers at a time

// Adam's step and its moments, each in the memory of one of the arguments; no step, and the moments
// as they were, where the length of all gradients is no number.
static void adam(ffi::ThreadPool& pool, int64_t size, double b1, double b2, double eps,
                 const float* corrections, float length, const float* gradient, const float* mean,
                 const float* square, float* step, float* new_mean, float* new_square) {
  if (!std::isfinite(length)) {
    std::fill_n(step, size, 0.0f);
    if (new_mean != mean) std::copy_n(mean, size, new_mean);
    if (new_square != square) std::copy_n(square, size, new_square);
    return;
  }
  // in single precision 1 - 0.999 is wrong in the fifth digit
  const float keep = b1, blend = 1 - b1, square_keep = b2, square_blend = 1 - b2, small = eps;
  const float correction = corrections[0], square_correction = corrections[1];
  parallel(pool, (size + kPiece - 1) / kPiece, [=](int64_t item, int64_t) {
    const int64_t last = std::min(size, (item + 1) * kPiece);
    // what is written lies where the same index was read, or nowhere near
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int64_t i = item * kPiece; i < last; i++) {
      const float g = gradient[i];
      const float m = blend * g + keep * mean[i];
      const float v = square_blend * (g * g) + square_keep * square[i];
      new_mean[i] = m;
      new_square[i] = v;
      step[i] = (m / correction) / (std::sqrt(v / square_correction) + small);
    }
  });
}

static float squared_length(ffi::ThreadPool& pool, int64_t size, const float* x) {
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  std::vector<double> sums(pieces);
  parallel(pool, pieces, [&](int64_t item, int64_t) {
    const int64_t first = item * kPiece, last = std::min(size, first + kPiece);
    Vector sum[4] = {};
    int64_t i = first;
    for (; i + 4 * kLanes <= last; i += 4 * kLanes)
      for (int j = 0; j < 4; j++) {
        const Vector some = load(x + i + j * kLanes);
        sum[j] += some * some;
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
