#define STAMINA_NAMESPACE avx512_bf16
#include "lanes_avx512.h"
#include "table.h"

namespace stamina::avx512_bf16 {
extern const Kernels float32 = table<float, false>();
extern const Kernels bfloat16 = table<Bf16, true>();
extern const Kernels float16 = table<Half, false>();
}  // namespace stamina::avx512_bf16
