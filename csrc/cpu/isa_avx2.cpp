#define STAMINA_NAMESPACE avx2
#include "lanes_avx2.h"
#include "strips.h"

namespace stamina::avx2 {
extern const Kernels float32 = Operator<float, false>::table();
extern const Kernels bfloat16 = Operator<Bf16, false>::table();
extern const Kernels float16 = Operator<Half, false>::table();
}  // namespace stamina::avx2
