#define STAMINA_NAMESPACE generic
#define STAMINA_FLOAT64 1
#include "lanes_generic.h"
#include "strips.h"

namespace stamina::generic {
extern const Kernels float32 = Operator<float, false>::table();
extern const Kernels float64 = Operator<double, false>::table();
extern const Kernels bfloat16 = Operator<Bf16, false>::table();
extern const Kernels float16 = Operator<Half, false>::table();
}  // namespace stamina::generic
