// One element of a fold: W + M ⊙ AB. Outside the mask, or if the residual is zero, it keeps its bits, even those of -0.
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
