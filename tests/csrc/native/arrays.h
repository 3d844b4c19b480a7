// Arrays whose neighbourhood no one may touch: exactly their size on the heap; gaps between rows are poisoned under
// AddressSanitizer and compared with what they held.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <type_traits>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "../../../csrc/core/rounding.h"
#include "../../../csrc/cpu/kernels.h"

namespace stamina::test {

using core::Bf16;
using core::Half;

template <class Store>
using WideOf = std::conditional_t<std::is_same_v<Store, double>, double, float>;

template <class Store>
Store narrowed(double value) {
  if constexpr (std::is_same_v<Store, double>) return value;
  else return core::narrow<Store>(static_cast<float>(value));
}

// bytes at a multiple of 64, and not one more; all bits are set, which is not a number in any of the types
inline std::shared_ptr<void> exact_memory(int64_t bytes) {
  constexpr std::align_val_t LINE{64};
  void* at = ::operator new(static_cast<size_t>(bytes), LINE);
  std::memset(at, 0xff, static_cast<size_t>(bytes));
  return {at, [](void* made) { ::operator delete(made, LINE); }};
}

template <class T>
class Array {
 public:
  explicit Array(int64_t count) : count_(count), memory_(exact_memory(count * static_cast<int64_t>(sizeof(T)))) {}
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  int64_t count_;
  std::shared_ptr<void> memory_;
};

enum class Layout { plain, transposed, row_gaps, gaps, offset };

// [height, width] behind some strides
template <class T>
class Grid {
 public:
  static constexpr int64_t GAP = 24;

  Grid(int64_t height, int64_t width, Layout layout)
      : height_(height), width_(width), layout_(layout), first_(layout == Layout::offset),
        values_(height && width ? first_ + (height - 1) * row_stride() + (width - 1) * column_stride() + 1 : 0) {
    poison(true);
  }
  ~Grid() { poison(false); }
  Grid(const Grid&) = delete;

  T& operator()(int64_t row, int64_t column) const { return values_[first_ + row * row_stride() + column * column_stride()]; }
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }
  Matrix matrix() const { return {values_.data() + (values_.size() ? first_ : 0), row_stride(), column_stride()}; }

  // whether what lies between the elements holds what it held
  bool intact() {
    poison(false);
    Array<unsigned char> seen(static_cast<int64_t>(values_.bytes()));
    std::memcpy(seen.data(), values_.data(), seen.bytes());
    for (int64_t i = 0; i < height_; ++i)
      for (int64_t j = 0; j < width_; ++j)
        std::memset(seen.data() + (first_ + i * row_stride() + j * column_stride()) * sizeof(T), 0xff, sizeof(T));
    poison(true);
    for (int64_t i = 0; i < seen.size(); ++i)
      if (seen[i] != 0xff) return false;
    return true;
  }

 private:
  int64_t row_stride() const {
    switch (layout_) {
      case Layout::transposed: return 1;
      case Layout::row_gaps: return width_ + GAP;
      case Layout::gaps: return 2 * width_ + 1;
      default: return width_;
    }
  }
  int64_t column_stride() const { return layout_ == Layout::transposed ? height_ : layout_ == Layout::gaps ? 2 : 1; }

  void poison([[maybe_unused]] bool on) {
#ifdef __SANITIZE_ADDRESS__
    if (layout_ != Layout::row_gaps || !values_.size()) return;
    for (int64_t i = 0; i + 1 < height_; ++i) {
      const T* gap = values_.data() + i * row_stride() + width_;
      on ? __asan_poison_memory_region(gap, GAP * sizeof(T)) : __asan_unpoison_memory_region(gap, GAP * sizeof(T));
    }
#endif
  }

  int64_t height_, width_;
  Layout layout_;
  int64_t first_;
  Array<T> values_;
};

// values in [-2, 2], the same from every C++ library
class Draws {
 public:
  template <class T>
  void fill(const Array<T>& array) {
    for (int64_t i = 0; i < array.size(); ++i) array[i] = narrowed<T>(value());
  }
  template <class T>
  void fill(const Grid<T>& grid) {
    for (int64_t i = 0; i < grid.height(); ++i)
      for (int64_t j = 0; j < grid.width(); ++j) grid(i, j) = narrowed<T>(value());
  }

 private:
  double value() { return (static_cast<double>(engine_()) / 4294967295.0 - 0.5) * 4; }
  std::mt19937 engine_{7};
};

}  // namespace stamina::test
