// One element of a fold: W + M ⊙ AB. Outside the mask, and where the residual is zero, an element keeps its bits, -0 too.
#pragma once

#include "lanes.h"

namespace stamina::STAMINA_NAMESPACE {

template <class F, class M>
STAMINA_INLINE F fold_element(F total, F residual, M open) {
  return choose(both(open, differ(residual, F(0.0f))), total + residual, total);
}

template <class F>
STAMINA_INLINE F fold_element(F total, F residual) {
  return choose(differ(residual, F(0.0f)), total + residual, total);
}

}  // namespace stamina::STAMINA_NAMESPACE
