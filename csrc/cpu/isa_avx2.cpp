#define STAMINA_NAMESPACE avx2
#include "lanes_avx2.h"
#include "table.h"

namespace stamina::avx2 {
extern const Kernels float32 = table<float, false>();
extern const Kernels bfloat16 = table<Bf16, false>();
extern const Kernels float16 = table<Half, false>();
}  // namespace stamina::avx2
