// The entry points of one instruction set, for one dtype of the weight.
#pragma once

#include "backward.h"
#include "fold.h"
#include "forward.h"

namespace stamina::STAMINA_NAMESPACE {

template <class Store, bool PAIRS>
constexpr Kernels table() {
  using Forwards = ForwardOf<Store, PAIRS>;
  using Backwards = BackwardOf<Store, PAIRS>;
  using Folds = FoldOf<Store, PAIRS>;
  return {PAIRS, TOKEN_BLOCK, FORWARD_ROWS, FOLD_CALL, Forwards::scratch, Forwards::forward, Backwards::scratch,
          Backwards::backward, Folds::scratch, Folds::fold};
}

}  // namespace stamina::STAMINA_NAMESPACE
