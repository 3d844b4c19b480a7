#define STAMINA_NAMESPACE avx512
#include "lanes_avx512.h"
#include "strips.h"

namespace stamina::avx512 {
extern const Kernels float32 = Operator<float, false>::table();
extern const Kernels bfloat16 = Operator<Bf16, false>::table();
extern const Kernels float16 = Operator<Half, false>::table();
}  // namespace stamina::avx512
