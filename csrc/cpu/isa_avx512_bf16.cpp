#define STAMINA_NAMESPACE avx512_bf16
#include "lanes_avx512.h"
#include "strips.h"

namespace stamina::avx512_bf16 {
extern const Kernels float32 = Operator<float, false>::table();
extern const Kernels bfloat16 = Operator<Bf16, true>::table();
extern const Kernels float16 = Operator<Half, false>::table();
}  // namespace stamina::avx512_bf16
