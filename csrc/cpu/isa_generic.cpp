#define STAMINA_NAMESPACE generic
#define STAMINA_FLOAT64 1
#include "lanes_generic.h"
#include "table.h"

namespace stamina::generic {
extern const Kernels float32 = table<float, false>();
extern const Kernels float64 = table<double, false>();
extern const Kernels bfloat16 = table<Bf16, false>();
extern const Kernels float16 = table<Half, false>();
}  // namespace stamina::generic
