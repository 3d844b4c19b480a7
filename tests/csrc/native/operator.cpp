// The whole CPU operator on odd shapes, for sanitizers: `operator NAME` runs one instruction set; every result is compared with
// specification.h, and bit for bit between one thread, several one after the other, and several at once.
#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>

#include "../../../csrc/cpu/operator.h"
#include "specification.h"

namespace stamina::test {
namespace {

int failures = 0;

void fail(const std::string& where, const char* what, double got, double want) {
  if (++failures < 20) std::printf("%s %s: %.9g, not %.9g\n", where.c_str(), what, got, want);
}

using Run = std::function<void(const std::function<void()>&)>;

// each stands for so many threads
const std::vector<std::pair<int64_t, Run>> RUNS = {
    {1, [](const auto& body) { body(); }},
    {3, [](const auto& body) { body(), body(), body(); }},
    {3, [](const auto& body) {
       std::thread others[] = {std::thread(body), std::thread(body)};
       body();
       for (std::thread& other : others) other.join();
     }},
};

// relative rounding error of a dtype, and of its sums in wide
template <class Store>
constexpr double UNIT = std::is_same_v<Store, Bf16> ? 0x1p-8 : std::is_same_v<Store, Half> ? 0x1p-11 : 0;
template <class Store>
constexpr double SUM = std::is_same_v<Store, double> ? 1e-14 : 2e-6;

template <class Store>
class Test {
 public:
  using T = WideOf<Store>;

  Test(const Case& test, std::string instructions)
      : c_(test), instructions_(std::move(instructions)), in_(test), spec_(test, in_) {
    const char* dtype = std::is_same_v<Store, float> ? "float" : std::is_same_v<Store, double> ? "double"
                        : std::is_same_v<Store, Bf16> ? "bf16" : "half";
    where_ = instructions_ + " " + dtype + " T=" + std::to_string(c_.tokens) + " k=" + std::to_string(c_.k) +
             " N=" + std::to_string(c_.rows()) + " r=" + std::to_string(c_.r) + " s=" + std::to_string(c_.s);
    // nearer to 0, float and double may call a gate differently
    if (spec_.nearest < 1e-5) fail(where_, "the nearest logit", spec_.nearest, 1e-5);
  }

  void run() {
    forward();
    backward(true, true);
    backward(true, false);
    backward(false, true);
    for (const int tasks : {0, 1, 3})
      for (const bool master : {false, true}) fold(tasks, master);
    for (auto* grid : {&in_.x, &in_.weight, &in_.grad})
      if (!grid->intact()) fail(where_, "written between the elements of an argument", 1, 0);
  }

 private:
  Problem problem(const std::pair<int64_t, Run>& run) const {
    constexpr auto dtype = std::is_same_v<Store, float> ? Dtype::float32 : std::is_same_v<Store, double> ? Dtype::float64
                           : std::is_same_v<Store, Bf16> ? Dtype::bfloat16 : Dtype::float16;
    return {instructions_, dtype, c_.sizes, c_.k, {run.first, run.second, exact_memory}};
  }

  Factors factors(bool noisy) const {
    const auto if_gate = [&](const auto& array) -> const void* { return c_.gate ? array.data() : nullptr; };
    return {in_.a.data(), in_.b.data(), if_gate(in_.p), if_gate(in_.q), c_.bias ? if_gate(in_.bias) : nullptr, c_.r,
            c_.gate ? c_.s : 0, c_.gate && noisy, SEED, STEP};
  }

  void check(const char* what, double got, double want, double size, double unit) const {
    // not a number is far from everything
    if (!(std::fabs(got - want) <= unit * std::fabs(want) + SUM<Store> * size + 1e-30)) fail(where_, what, got, want);
  }

  template <class U>
  void check(const char* what, const Array<U>& got, const Totals& want) const {
    for (int64_t i = 0; i < got.size(); ++i) check(what, static_cast<double>(got[i]), want.value[i], want.size[i], 0);
  }

  // of `values` and what the first run made
  template <class U>
  void check_same(const char* what, const Array<U>& values, const Array<U>& first) const {
    if (std::memcmp(values.data(), first.data(), values.bytes())) fail(where_, what, 1, 0);
  }

  void forward() {
    std::vector<Array<Store>> made;
    for (const auto& run : RUNS) {
      for (const bool penalised : {true, false}) {
        Grid<Store> y(c_.tokens, c_.rows(), c_.layout);
        Array<double> sums(2);
        stamina::forward(problem(run), factors(c_.noisy), y.matrix(), in_.x.matrix(), c_.tokens, in_.weight.matrix(),
                         penalised ? in_.past.data() : nullptr, penalised ? sums.data() : nullptr);
        if (!y.intact()) fail(where_, "written between the elements of y", 1, 0);
        made.push_back(values_of(y));
        if (penalised) check("penalties", sums, spec_.sums);
      }
    }
    for (int64_t i = 0; i < made[0].size(); ++i)
      check("y", core::widen(made[0][i]), spec_.y.value[i], spec_.y.size[i], UNIT<Store>);
    for (const auto& other : made) check_same("y of other threads", other, made[0]);
  }

  template <class U>
  static Array<U> values_of(const Grid<U>& grid) {
    Array<U> values(grid.height() * grid.width());
    for (int64_t i = 0; i < values.size(); ++i) values[i] = grid(i / grid.width(), i % grid.width());
    return values;
  }

  void backward(bool need_x, bool need_factors) {
    std::vector<std::vector<Array<T>>> made;
    for (const auto& run : RUNS) {
      const int64_t factor = need_factors, gate = need_factors && c_.gate, x = need_x;
      std::vector<Array<T>> to;
      for (const int64_t count : {x * c_.tokens * c_.k, factor * in_.a.size(), factor * in_.b.size(), gate * in_.p.size(),
                                  gate * in_.q.size(), gate * c_.bias * in_.bias.size()})
        to.emplace_back(count);
      const auto at = [&](int i, bool needed) -> void* { return needed ? to[i].data() : nullptr; };
      stamina::backward(problem(run), factors(c_.noisy),
                        {at(0, x), at(1, factor), at(2, factor), at(3, gate), at(4, gate), at(5, gate && c_.bias)},
                        in_.grad.matrix(), in_.x.matrix(), c_.tokens, in_.weight.matrix(), c_.tau, in_.past.data(), D_SPARSITY,
                        D_FORGETTING);
      made.push_back(std::move(to));
    }
    const Totals* wanted[] = {&spec_.dx, &spec_.da, &spec_.db, &spec_.dp, &spec_.dq, &spec_.dc};
    const char* names[] = {"dx", "da", "db", "dp", "dq", "dc"};
    for (int i = 0; i < 6; ++i) {
      check(names[i], made[0][i], *wanted[i]);
      for (const auto& other : made) check_same("a gradient of other threads", other[i], made[0][i]);
    }
  }

  // `tasks` times the same residual: into the weight it started from, or, through a master, into another
  void fold(int64_t tasks, bool with_master) {
    const std::vector<Factors> all(tasks, factors(false));
    std::vector<Array<Store>> weights;
    std::vector<Array<T>> masters;
    for (const auto& run : RUNS) {
      Grid<Store> weight(c_.rows(), c_.k, c_.layout);
      Grid<T> master(c_.rows(), c_.k, c_.layout);
      for (int64_t n = 0; n < c_.rows(); ++n)
        for (int64_t j = 0; j < c_.k; ++j) {
          weight(n, j) = in_.weight(n, j);
          master(n, j) = before(n, j, with_master);
        }
      if (with_master) {
        stamina::fold(problem(run), all, weight.matrix(), master.matrix(), !std::is_same_v<Store, T>, master.matrix());
        // from the untouched weight into another
        Grid<Store> rebuilt(c_.rows(), c_.k, c_.layout);
        stamina::fold(problem(run), all, rebuilt.matrix(), in_.weight.matrix(), false, {nullptr, 0, 0});
        check_folded("rebuilt", values_of(rebuilt), tasks, false);
      } else {
        stamina::fold(problem(run), all, weight.matrix(), weight.matrix(), false, {nullptr, 0, 0});
      }
      if (!weight.intact() || !master.intact()) fail(where_, "written between the elements of a weight", 1, 0);
      weights.push_back(values_of(weight));
      masters.push_back(values_of(master));
    }
    check_folded("folded", weights[0], tasks, with_master);
    if (with_master) check_folded("master", masters[0], tasks, true);
    for (const auto& other : weights) check_same("a weight of other threads", other, weights[0]);
    for (const auto& other : masters) check_same("a master of other threads", other, masters[0]);
  }

  // a master holds digits that the weight has not
  T before(int64_t n, int64_t j, bool master) const {
    const auto exact = static_cast<T>(core::widen(in_.weight(n, j)));
    return master && !std::is_same_v<Store, double> ? static_cast<T>(exact + 1e-4f) : exact;
  }

  template <class U>
  void check_folded(const char* what, const Array<U>& got, int64_t tasks, bool master) const {
    for (int64_t i = 0; i < got.size(); ++i) {
      const T start = before(i / c_.k, i % c_.k, master);
      const double add = spec_.plain_open[i] != 0 ? static_cast<double>(tasks) * spec_.product[i] : 0;
      const double size = std::fabs(start) + static_cast<double>(tasks) * spec_.product_size[i];
      check(what, core::widen(got[i]), start + add, add == 0 ? 0 : size, UNIT<U>);
      const U kept = narrowed<U>(start);
      if (add == 0 && std::memcmp(&got[i], &kept, sizeof(U))) fail(where_, "bits outside the mask", core::widen(got[i]), start);
    }
  }

  const Case& c_;
  std::string instructions_, where_;
  Inputs<Store> in_;
  Specification<Store> spec_;
};

const std::vector<Case> CASES = {
    // tokens, k, sizes, r, s, gate, noisy, bias, tau, layout
    {1, 1, {1}, 1, 1, true, true, true, 0.7, Layout::plain},
    {5, 40, {7, 0, 66}, 3, 5, true, true, true, 0.7, Layout::row_gaps},
    {5, 40, {7, 0, 66}, 3, 4, true, false, true, 1, Layout::transposed},
    {81, 15, {41, 1}, 5, 2, true, true, false, 1, Layout::offset},
    {3, 257, {17, 4}, 1, 3, true, true, true, 2, Layout::gaps},
    {2, 272, {13}, 17, 1, false, false, false, 1, Layout::plain},
    {1, 32, {5, 3}, 67, 130, true, false, true, 0.3, Layout::row_gaps},
    {2, 3, {270, 2}, 1, 1, true, true, true, 1, Layout::plain},
    {178, 16, {20, 7}, 4, 4, true, true, true, 0.7, Layout::plain},
    // nothing of one kind
    {0, 17, {3, 2}, 2, 1, true, true, true, 0.7, Layout::plain},
    {7, 33, {2, 3}, 0, 2, true, true, true, 0.7, Layout::gaps},
    {7, 33, {2, 3}, 2, 0, true, true, true, 0.7, Layout::plain},
    {3, 0, {4}, 2, 2, true, true, true, 0.7, Layout::plain},
    {3, 8, {0, 0}, 2, 2, true, true, true, 0.7, Layout::plain},
    {3, 8, {}, 2, 2, true, true, true, 0.7, Layout::plain},
};

}  // namespace

int run(const std::string& name) {
  const auto names = instruction_sets();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    std::printf("this machine lacks %s\n", name.c_str());
    return 77;
  }
  for (const Case& c : CASES) {
    Test<float>(c, name).run();
    Test<Bf16>(c, name).run();
    Test<Half>(c, name).run();
    if (name == "generic") Test<double>(c, name).run();
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace stamina::test

int main(int, char** arguments) { return stamina::test::run(arguments[1]); }
