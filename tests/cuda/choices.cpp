// Lets a test choose which kernels run, and in which order the emulated threads of a block take their turns.
#include "emulated.h"

#define STAMINA_CHOICE extern "C" __attribute__((visibility("default"))) void

STAMINA_CHOICE stamina_emulated_backward(int backward) {
  using namespace stamina::cuda::emulated;
  order = backward ? Order::backward : Order::forward;
}

STAMINA_CHOICE stamina_emulated_hopper(int of_hopper) { stamina::cuda::emulated::hopper = of_hopper; }
