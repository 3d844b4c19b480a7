// Lets a test choose which kernels run, the order in which emulated threads take their turns, and when copies happen.
#include "emulated.h"

#define STAMINA_CHOICE extern "C" __attribute__((visibility("default"))) void

STAMINA_CHOICE stamina_emulated_order(int of_turns) {
  using namespace stamina::cuda::emulated;
  order = static_cast<Order>(of_turns);
}

STAMINA_CHOICE stamina_emulated_early(int of_copies) { stamina::cuda::emulated::early = of_copies; }

STAMINA_CHOICE stamina_emulated_hopper(int of_hopper) { stamina::cuda::emulated::hopper = of_hopper; }
