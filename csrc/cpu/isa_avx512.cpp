#define STAMINA_NAMESPACE avx512
#include "lanes_avx512.h"
#include "table.h"

namespace stamina::avx512 {
extern const Kernels float32 = table<float, false>();
extern const Kernels bfloat16 = table<Bf16, false>();
extern const Kernels float16 = table<Half, false>();
}  // namespace stamina::avx512
