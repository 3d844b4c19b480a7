// Lets a test choose in which order the emulated threads of a block take their turns.
#include "emulated.h"

extern "C" __attribute__((visibility("default"))) void stamina_emulated_backward(int backward) {
  using namespace stamina::cuda::emulated;
  order = backward ? Order::backward : Order::forward;
}
