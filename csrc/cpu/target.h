// SPDX-License-Identifier: Apache-2.0
// EIGENPRUNE_TARGET_BEGIN("avx2,fma") ... EIGENPRUNE_TARGET_END: functions between them may use these instructions.
// Nothing of the standard library may be instantiated between them: the linker could take that copy for the whole
// program, and an older processor would meet an instruction it does not know.
#pragma once

#define EIGENPRUNE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define EIGENPRUNE_TARGET_BEGIN(features) \
  EIGENPRUNE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define EIGENPRUNE_TARGET_END EIGENPRUNE_PRAGMA(clang attribute pop)
#else
#define EIGENPRUNE_TARGET_BEGIN(features) \
  EIGENPRUNE_PRAGMA(GCC push_options) EIGENPRUNE_PRAGMA(GCC target(features))
#define EIGENPRUNE_TARGET_END EIGENPRUNE_PRAGMA(GCC pop_options)
#endif
