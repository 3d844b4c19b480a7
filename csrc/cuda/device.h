// A GPU, or its emulation for a plain compiler: the source of the kernels is the same for both.
#pragma once

#ifdef STAMINA_EMULATED
#include STAMINA_EMULATED
#else
#include "ptx.h"
#endif
