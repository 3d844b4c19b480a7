// csrc/core against known answers, which the test that runs this writes: `headers FOLDER`, one binary file an array.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "../../../csrc/core/fold.h"
#include "../../../csrc/core/gate.h"
#include "../../../csrc/core/philox.h"
#include "../../../csrc/core/rounding.h"

using namespace stamina::core;

namespace {

int failures = 0;
std::string folder;

void check(bool right, const char* what, int64_t at) {
  if (right) return;
  if (++failures < 20) std::printf("%s: wrong at %lld\n", what, static_cast<long long>(at));
}

template <class T>
std::vector<T> read(const char* name) {
  std::ifstream file(folder + "/" + name, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  if (bytes.empty()) {
    std::printf("%s is missing\n", name);
    std::exit(2);
  }
  std::vector<T> values(bytes.size() / sizeof(T));
  memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

bool same_bits(float a, float b) { return bits(a) == bits(b); }

// place: seed, step, rows, columns; draws: h of each element; both ways of making the words
void stream(const std::string& name) {
  const auto place = read<int64_t>(("place" + name).c_str());
  const auto draws = read<int32_t>(("draws" + name).c_str());
  const auto uniforms = read<double>(("uniforms" + name).c_str());
  const Key key = key_of(place[0]);
  const int64_t step = place[1], rows = place[2], columns = place[3];
  for (int64_t at = 0; at < rows * columns; ++at) {
    const int64_t row = at / columns, column = at % columns;
    const uint32_t group = noise_group(column), at_row = static_cast<uint32_t>(row);
    const auto words = philox(group, at_row, step, key);
    const auto shared = philox(philox_group(group, step, key), philox_row(at_row, step, key), key);
    for (int i = 0; i < 4; ++i) check(words.word[i] == shared.word[i], "words of a grid", at);
    uint32_t all[8] = {half_word<0>(words), half_word<1>(words), half_word<2>(words), half_word<3>(words),
                       half_word<4>(words), half_word<5>(words), half_word<6>(words), half_word<7>(words)};
    const uint32_t half = all[noise_half(column)];
    check(half == static_cast<uint32_t>(draws[at]), "draw", at);
    check(uniform(half, 0.0) == uniforms[at], "uniform", at);
    check(static_cast<double>(uniform(half, 0.0f)) == uniforms[at], "uniform in float", at);
  }
}

// known answers of the Random123 distribution: key [2], counter [4], words [4]; the counter is (group, row, step)
void known_words() {
  const auto known = read<uint32_t>("known");
  for (size_t at = 0; at < known.size() / 10; ++at) {
    const uint32_t* k = known.data() + 10 * at;
    const int64_t step = static_cast<int64_t>(k[4] | static_cast<uint64_t>(k[5]) << 32);
    const auto words = philox(k[2], k[3], step, Key{k[0], k[1]});
    for (int i = 0; i < 4; ++i) check(words.word[i] == k[6 + i], "known words", static_cast<int64_t>(at));
  }
}

// every bit pattern widened; floats (all sixteenth-bit patterns, and the neighbours of every tie) narrowed
template <class Store>
void conversions(const char* widened, const char* narrowed) {
  const auto wide = read<float>(widened);
  for (uint32_t at = 0; at < 0x10000; ++at) {
    const float got = widen(Store{static_cast<uint16_t>(at)});
    check(got != got ? wide[at] != wide[at] : same_bits(got, wide[at]), widened, at);
  }
  const auto floats = read<float>("floats");
  const auto wanted = read<uint16_t>(narrowed);
  for (size_t at = 0; at < floats.size(); ++at) {
    const uint16_t got = narrow<Store>(floats[at]).bits;
    const bool none = floats[at] != floats[at];
    const float back = widen(Store{got});
    check(none ? back != back : got == wanted[at], narrowed, static_cast<int64_t>(at));
  }
}

// logits, draws, tau in double; open (0, 1, or 2 where either will do), slope, soft gate and its slope
void gates() {
  const auto logits = read<double>("logits"), u = read<double>("u"), taus = read<double>("taus");
  const auto slopes = read<double>("slopes"), soft = read<double>("soft");
  const auto open = read<int32_t>("open");
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    const float l = static_cast<float>(logits[i]), draw = static_cast<float>(u[i]);
    // the logit as a product and as a bias: a gate sees their sum
    for (const auto& [product, bias] : {std::pair{l, 0.0f}, std::pair{0.0f, l}, std::pair{l / 2, l / 2}}) {
      const float against = odds_against(product, bias, draw);
      if (open[i] != 2) check((draw > against) == (open[i] == 1), "gate", at);
      check(gate_open(product, bias) == (l > 0), "gate without noise", at);
      const auto near = [](double got, double want) { return std::fabs(got - want) <= 3e-4 * want + 1e-30; };
      const float tau = static_cast<float>(taus[i]);
      check(near(tempered_slope(product, bias, draw, 1 / tau), slopes[i]), "slope", at);
      if (taus[i] == 1) check(near(unit_slope(draw, against), slopes[i]), "slope where tau is 1", at);
      const float e = exp_minus(product, bias);
      check(std::fabs(soft_gate(e) - soft[i]) <= 1e-6, "sigmoid", at);
      check(std::fabs(soft_slope(e) - soft[i] * (1 - soft[i])) <= 1e-6, "slope of sigmoid", at);
    }
  }
  const float none = NAN;
  const bool opens = 0.5f > odds_against(none, 0.0f, 0.5f) || gate_open(none, 0.0f) || gate_open(0.0f, none);
  check(!opens, "a gate that is no number", 0);
}

// 2^x and log2 x against the C library's in double: near a float's own precision, everywhere
void powers_and_logarithms() {
  for (int64_t at = -126 * 509; at <= 127 * 509; ++at) {
    const float x = static_cast<float>(at) / 509, power = power_of_two(x);
    const double want = std::exp2(static_cast<double>(x));
    check(std::fabs(power - want) <= 2.5e-7 * want, "power of two", at);
    const double log = std::log2(static_cast<double>(power));
    check(std::fabs(log_two(power) - log) <= 1.5e-7 * (1 + std::fabs(log)), "log2", at);
  }
}

void folds() {
  for (const float total : {0.0f, -0.0f, 1.0f, -3.5f}) {
    check(same_bits(fold_element(total, 0.0f, true), total), "fold of zero", 0);
    check(same_bits(fold_element(total, -0.0f), total), "fold of zero without a mask", 0);
    check(same_bits(fold_element(total, 2.0f, false), total), "fold outside the mask", 0);
    check(same_bits(fold_element(total, 2.0f, true), total + 2.0f), "fold", 0);
    check(same_bits(fold_element(total, -2.0f), total - 2.0f), "fold without a mask", 0);
  }
}

}  // namespace

int main(int, char** arguments) {
  folder = arguments[1];
  known_words();
  for (const auto name : {"0", "1", "2"}) stream(name);
  conversions<Bf16>("bf16_widened", "bf16_narrowed");
  conversions<Half>("half_widened", "half_narrowed");
  gates();
  powers_and_logarithms();
  folds();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
