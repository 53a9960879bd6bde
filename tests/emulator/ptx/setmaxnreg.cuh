// Host twin of kernels_cu/ptx/setmaxnreg.cuh.
#pragma once
#include "cuda_on_cpu.h"

template <int kRegisters>
EMU_INLINE void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes multiples of 8");
  emu::set_max_registers(kRegisters);
}
template <int kRegisters>
EMU_INLINE void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes multiples of 8");
  emu::set_max_registers(kRegisters);
}
