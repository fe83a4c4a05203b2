// Group norm (Wu and He, 2018, equations 1 and 7), its modulation and SiLU:
//
//     x' = (x - mean) / sqrt(variance + epsilon)    mean and variance over a group of an image
//     h = (scale x' + bias) (1 + a) + b             scale and bias of a channel; a and b also of an
//     y = h sigmoid(h)                              image
//
// `x` and `y` are [images, pixels, channels], `scale` and `bias` are [channels], `modulation` is
// [images, 2, channels], a and then b, and `statistics` is [images, 2, groups], the mean and
// 1 / sqrt(variance + epsilon). A thread takes an image, which stays in its cache while it is read
// once for the mean, once for the variance and once for the result.
#pragma once

#include <cmath>
#include <numeric>

#include "common.h"

typedef uint32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// 1 / (1 + exp(-x)), with an error of less than 3 units in the last place where it is no denormal
// number. exp is 2^n p(r) for -x = n log 2 + r and Cephes' polynomial p.
static inline Vector sigmoid(Vector x) {
  const Vector least = Vector{} - 87, most = Vector{} + 89;  // 2^n is infinite at the latter
  x = -x;
  x = x < least ? least : x;  // NaN stays
  x = x > most ? most : x;
  constexpr float kRound = 3 << 22;  // adding it leaves an integer in the last bits
  const Vector shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1;
  const Integers power = ((Integers)shifted + 127) << 23;
  return 1 / (1 + p * (Vector)power);
}

// The sizes of a norm. An image is read as rows of `width` floats, whole pixels and whole vectors,
// so that a column of vectors always has the same channels. The last row may be shorter.
struct Norm {
  int64_t images, pixels, channels, groups;

  int64_t floats() const { return pixels * channels; }  // of an image
  int64_t width() const { return std::lcm(channels, kLanes); }
  int64_t group(int64_t channel) const { return channel / (channels / groups); }
  double group_size() const { return floats() / groups; }
};

// Call body(i, lanes) for the vectors of an image from float i on that lie in a column.
template <typename Body>
static inline void down(const Norm& g, int64_t column, Body body) {
  const int64_t floats = g.floats(), width = g.width();
  int64_t i = column;
  for (; i + kLanes <= floats; i += width) body(i, first_lanes(kLanes));
  if (i < floats) body(i, first_lanes(floats - i));
}

// Add term(i, lanes, column) over all vectors of an image, and return the sum of each group.
template <typename Term>
static std::vector<double> group_sums(const Norm& g, Term term) {
  std::vector<double> sums(g.groups);
  const int64_t floats = g.floats(), width = g.width();
  for (int64_t column = 0; column < width; column += kLanes) {
    Vector sum[4] = {};  // four sums, so that an addition does not wait for the one before
    int64_t i = column;
    for (; i + 3 * width + kLanes <= floats; i += 4 * width)
      for (int k = 0; k < 4; k++) sum[k] += term(i + k * width, first_lanes(kLanes), column);
    for (; i < floats; i += width) sum[0] += term(i, first_lanes(floats - i), column);
    const Vector total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int64_t k = 0; k < kLanes; k++) sums[g.group((column + k) % g.channels)] += total[k];
  }
  return sums;
}

// Repeat value(channel) over a row.
template <typename Value>
static std::vector<float> row(const Norm& g, Value value) {
  std::vector<float> values(g.width());
  for (int64_t c = 0; c < g.channels; c++) values[c] = value(c);
  for (int64_t i = g.channels; i < g.width(); i++) values[i] = values[i - g.channels];
  return values;
}

// h as factor(c) x' + offset(c) for one image.
struct Affine {
  const float *scale, *bias, *a, *b;

  Affine(const Norm& g, int64_t image, const float* scale, const float* bias,
         const float* modulation)
      : scale(scale), bias(bias), a(modulation + 2 * image * g.channels), b(a + g.channels) {}
  float factor(int64_t c) const { return scale[c] * (1 + a[c]); }
  float offset(int64_t c) const { return bias[c] * (1 + a[c]) + b[c]; }
};

static void norm_silu(ffi::ThreadPool& pool, const Norm& g, double epsilon, const float* x,
                      const float* scale, const float* bias, const float* modulation, float* y,
                      float* statistics) {
  parallel(pool, g.images, [&](int64_t image, int64_t) {
    const Affine affine(g, image, scale, bias, modulation);
    const float* from = x + image * g.floats();
    float* to = y + image * g.floats();
    float *means = statistics + 2 * image * g.groups, *inverses = means + g.groups;
    const auto sums =
        group_sums(g, [=](int64_t i, Lanes lanes, int64_t) { return load(from + i, lanes); });
    for (int64_t k = 0; k < g.groups; k++) means[k] = sums[k] / g.group_size();
    const auto mean = row(g, [&](int64_t c) { return means[g.group(c)]; });
    const auto squares = group_sums(g, [&](int64_t i, Lanes lanes, int64_t column) {
      const Vector centered = load(from + i, lanes) - load(&mean[column], lanes);
      return centered * centered;
    });
    for (int64_t k = 0; k < g.groups; k++)
      inverses[k] = 1 / std::sqrt(squares[k] / g.group_size() + epsilon);
    const auto factor =
        row(g, [&](int64_t c) { return inverses[g.group(c)] * affine.factor(c); });
    const auto offset = row(g, [&](int64_t c) { return affine.offset(c); });
    for (int64_t column = 0; column < g.width(); column += kLanes) {
      const Vector m = load(&mean[column]), f = load(&factor[column]), o = load(&offset[column]);
      down(g, column, [=](int64_t i, Lanes lanes) {
        const Vector h = (load(from + i, lanes) - m) * f + o;
        store(to + i, h * sigmoid(h), lanes);
      });
    }
  });
}

// The gradients for the gradient `dy` of y. With h' = dy silu'(h), x' as above, f = scale (1 + a),
// and means over a group,
//
//     dx = (f h' - mean of f h' - x' mean of f h' x') / sqrt(variance + epsilon)
//     df = sum of h' x'  and  do = sum of h'  over the pixels of a channel, where h = f x' + o
//     da = scale df + bias do,  db = do
//     dscale = sum of (1 + a) df,  dbias = sum of (1 + a) do  over the images, in their order
static void norm_silu_gradient(ffi::ThreadPool& pool, const Norm& g, const float* dy,
                               const float* x, const float* scale, const float* bias,
                               const float* modulation, const float* statistics, float* dx,
                               float* dscale, float* dbias, float* dmodulation) {
  std::vector<double> dfactors(g.images * g.channels), doffsets(g.images * g.channels);
  parallel(pool, g.images, [&](int64_t image, int64_t) {
    const Affine affine(g, image, scale, bias, modulation);
    const float *from = x + image * g.floats(), *dfrom = dy + image * g.floats();
    float* to = dx + image * g.floats();
    double *df = &dfactors[image * g.channels], *doffset = &doffsets[image * g.channels];
    const float *means = statistics + 2 * image * g.groups, *inverses = means + g.groups;
    const auto mean = row(g, [&](int64_t c) { return means[g.group(c)]; });
    const auto factor =
        row(g, [&](int64_t c) { return inverses[g.group(c)] * affine.factor(c); });
    const auto offset = row(g, [&](int64_t c) { return affine.offset(c); });
    for (int64_t column = 0; column < g.width(); column += kLanes) {
      const Vector m = load(&mean[column]), f = load(&factor[column]), o = load(&offset[column]);
      Vector sum = {}, product = {};  // of h', and of h' (x - mean)
      down(g, column, [&](int64_t i, Lanes lanes) {
        const Vector centered = load(from + i, lanes) - m, h = centered * f + o, s = sigmoid(h);
        const Vector dh = load(dfrom + i, lanes) * (s + h * s * (1 - s));
        store(to + i, dh, lanes);
        sum += dh;
        product += dh * centered;
      });
      for (int64_t k = 0; k < kLanes; k++) {
        const int64_t c = (column + k) % g.channels;
        doffset[c] += sum[k];
        df[c] += static_cast<double>(product[k]) * inverses[g.group(c)];
      }
    }
    std::vector<double> sums(g.groups), products(g.groups);  // of f h', and of f h' x'
    for (int64_t c = 0; c < g.channels; c++) {
      sums[g.group(c)] += affine.factor(c) * doffset[c];
      products[g.group(c)] += affine.factor(c) * df[c];
    }
    const auto constant = row(g, [&](int64_t c) {
      return sums[g.group(c)] / g.group_size() * inverses[g.group(c)];
    });
    const auto slope = row(g, [&](int64_t c) {
      const double inverse = inverses[g.group(c)];
      return products[g.group(c)] / g.group_size() * inverse * inverse;
    });
    for (int64_t column = 0; column < g.width(); column += kLanes) {
      const Vector m = load(&mean[column]), f = load(&factor[column]);
      const Vector p = load(&constant[column]), q = load(&slope[column]);
      down(g, column, [=](int64_t i, Lanes lanes) {
        store(to + i, load(to + i, lanes) * f - (load(from + i, lanes) - m) * q - p, lanes);
      });
    }
    float* da = dmodulation + 2 * image * g.channels;
    for (int64_t c = 0; c < g.channels; c++) {
      da[c] = scale[c] * df[c] + bias[c] * doffset[c];
      da[g.channels + c] = doffset[c];
    }
  });
  for (int64_t c = 0; c < g.channels; c++) {
    double scale_sum = 0, bias_sum = 0;
    for (int64_t image = 0; image < g.images; image++) {
      const double more = 1 + modulation[2 * image * g.channels + c];
      scale_sum += more * dfactors[image * g.channels + c];
      bias_sum += more * doffsets[image * g.channels + c];
    }
    dscale[c] = scale_sum;
    dbias[c] = bias_sum;
  }
}
