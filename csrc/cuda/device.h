// A GPU, or a plain compiler's emulation of one: the kernels are the same text for both.
#pragma once

#ifdef STAMINA_EMULATED
#include STAMINA_EMULATED
#else
#include "ptx.h"
#endif
