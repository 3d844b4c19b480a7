// What the operator should make of its arguments: plain loops in double, element by element. Beside each sum stands the sum of
// its terms' absolute values, which bounds how far another order of adding, or another precision, may lie away.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../../../csrc/core/philox.h"
#include "arrays.h"

namespace stamina::test {

struct Case {
  int64_t tokens, k;
  std::vector<int64_t> sizes;
  int64_t r, s;
  bool gate, noisy, bias;
  double tau;
  Layout layout;

  int64_t groups() const { return static_cast<int64_t>(sizes.size()); }
  int64_t rows() const {
    int64_t all = 0;
    for (const int64_t size : sizes) all += size;
    return all;
  }
};

constexpr int64_t SEED = 123456789012345, STEP = (int64_t{5} << 32) + 42;
constexpr double D_SPARSITY = 3, D_FORGETTING = 0.05;

template <class Store>
struct Inputs {
  using T = WideOf<Store>;
  Grid<Store> x, weight, grad;
  Array<Store> a, b, p, q;
  Array<T> bias, past;

  explicit Inputs(const Case& c)
      : x(c.tokens, c.k, c.layout), weight(c.rows(), c.k, c.layout), grad(c.tokens, c.rows(), c.layout), a(c.rows() * c.r),
        b(c.groups() * c.r * c.k), p(c.rows() * c.s), q(c.groups() * c.s * c.k), bias(c.groups()), past(c.rows() * c.k) {
    Draws draws;
    for (const auto* grid : {&x, &weight, &grad}) draws.fill(*grid);
    for (const auto* array : {&a, &b, &p, &q}) draws.fill(*array);
    for (const auto* array : {&bias, &past}) draws.fill(*array);
  }
};

// sums with the size of their terms
struct Totals {
  std::vector<double> value, size;
  explicit Totals(int64_t count) : value(count), size(count) {}
  void add(int64_t at, double term, double bound) {
    value[at] += term;
    size[at] += bound;
  }
};

template <class Store>
struct Specification {
  const Case& c;
  const Inputs<Store>& in;
  int64_t rows, k;
  // [N, k]: A B and P Q + c with their terms' sizes, masks with noise and without, dM/dL, sigmoid(L) and its slope
  std::vector<double> product, product_size, logit_size, open, plain_open, slope, soft, soft_slope;
  double nearest = INFINITY;  // |z| of the logit that is hardest to call
  Totals y, sums{2}, dx, da, db, dp, dq, dc;

  Specification(const Case& test, const Inputs<Store>& inputs)
      : c(test), in(inputs), rows(c.rows()), k(c.k), y(c.tokens * rows), dx(c.tokens * k), da(rows * c.r),
        db(c.groups() * c.r * k), dp(rows * c.s), dq(c.groups() * c.s * k), dc(c.groups()) {
    for (auto* array : {&product, &product_size, &logit_size, &open, &plain_open, &slope, &soft, &soft_slope})
      array->resize(rows * k);
    int64_t n = 0;
    for (int64_t g = 0; g < c.groups(); ++g)
      for (const int64_t end = n + c.sizes[g]; n < end; ++n)
        for (int64_t j = 0; j < k; ++j) {
          gate(g, n, j);
          forward(n, j);
          backward(g, n, j);
        }
  }

  static double wide(Store value) { return core::widen(value); }
  double delta(int64_t at) const { return open[at] != 0 ? product[at] : 0; }
  // the residual as it meets x: rounded to the weight's dtype
  double rounded_delta(int64_t at) const { return wide(narrowed<Store>(delta(at))); }

  double draw(int64_t n, int64_t j) const {
    const auto words = core::philox(core::noise_group(j), static_cast<uint32_t>(n), STEP, core::key_of(SEED));
    const int half = core::noise_half(j);
    return (((words.word[half / 2] >> (half % 2 * 16)) & 0xffff) + 0.5) / 65536;
  }

  void gate(int64_t g, int64_t n, int64_t j) {
    const int64_t at = n * k + j;
    for (int64_t i = 0; i < c.r; ++i) {
      const double term = wide(in.a[n * c.r + i]) * wide(in.b[(g * c.r + i) * k + j]);
      product[at] += term;
      product_size[at] += std::fabs(term);
    }
    open[at] = plain_open[at] = 1;
    if (!c.gate) return;
    double logit = c.bias ? static_cast<double>(in.bias[g]) : 0;
    logit_size[at] = std::fabs(logit);
    for (int64_t i = 0; i < c.s; ++i) {
      const double term = wide(in.p[n * c.s + i]) * wide(in.q[(g * c.s + i) * k + j]);
      logit += term;
      logit_size[at] += std::fabs(term);
    }
    const double u = c.noisy ? draw(n, j) : 0.5, z = logit + std::log(u / (1 - u));
    // s (1 - s) without the digits that 1 - s loses near 1
    const auto slope_at = [](double at_logit) {
      const double e = std::exp(-std::fabs(at_logit));
      return e / ((1 + e) * (1 + e));
    };
    open[at] = z > 0;
    plain_open[at] = logit > 0;
    slope[at] = slope_at(z / c.tau) / c.tau;
    soft_slope[at] = slope_at(logit);
    soft[at] = 1 / (1 + std::exp(-logit));
    // a logit of no terms is exactly 0
    if (logit != 0) nearest = std::min({nearest, std::fabs(z), std::fabs(logit)});
  }

  void forward(int64_t n, int64_t j) {
    const int64_t at = n * k + j;
    const double met = in.past[at] * delta(at), weight = wide(in.weight(n, j)), residual = rounded_delta(at);
    sums.add(0, soft[at], soft[at]);
    sums.add(1, met * met, std::pow(in.past[at] * product_size[at], 2));
    for (int64_t t = 0; t < c.tokens; ++t) {
      const double x = wide(in.x(t, j));
      y.add(t * rows + n, x * (weight + residual), std::fabs(x) * (std::fabs(weight) + std::fabs(residual)));
    }
  }

  void backward(int64_t g, int64_t n, int64_t j) {
    const int64_t at = n * k + j;
    const double weight = wide(in.weight(n, j)), residual = rounded_delta(at), past = in.past[at];
    double d = 2 * D_FORGETTING * past * past * delta(at), size = 2 * D_FORGETTING * past * past * product_size[at];
    for (int64_t t = 0; t < c.tokens; ++t) {
      const double from_y = wide(in.grad(t, n)), term = from_y * wide(in.x(t, j));
      d += term;
      size += std::fabs(term);
      dx.add(t * k + j, from_y * (weight + residual), std::fabs(from_y) * (std::fabs(weight) + std::fabs(residual)));
    }
    const double share = D_SPARSITY / static_cast<double>(rows * k), pull = share * soft_slope[at];
    // what the logit may be off by is a share of its exponential
    const double shift = 1 + logit_size[at] / std::min(c.tau, 1.0);
    const double dl = d * product[at] * slope[at] + pull, dl_size = (size * product_size[at] * slope[at] + pull) * shift;
    for (int64_t i = 0; i < c.r; ++i) {
      const int64_t left = n * c.r + i, right = (g * c.r + i) * k + j;
      add_product(da, left, open[at] * d, open[at] * size, wide(in.b[right]));
      add_product(db, right, open[at] * d, open[at] * size, wide(in.a[left]));
    }
    if (!c.gate) return;
    for (int64_t i = 0; i < c.s; ++i) {
      const int64_t left = n * c.s + i, right = (g * c.s + i) * k + j;
      add_product(dp, left, dl, dl_size, wide(in.q[right]));
      add_product(dq, right, dl, dl_size, wide(in.p[left]));
    }
    dc.add(g, dl, dl_size);
  }

  static void add_product(Totals& to, int64_t at, double value, double size, double factor) {
    to.add(at, value * factor, size * std::fabs(factor));
  }
};

}  // namespace stamina::test
