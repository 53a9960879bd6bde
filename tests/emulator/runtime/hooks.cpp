// Every load and store of a kernel. GCC's -fsanitize=thread calls these functions before each access to memory that
// may be shared; libtsan, which usually defines them, is not linked.
#include "machine.h"
#include "memory.h"

namespace emu {

static inline __attribute__((always_inline)) void access(const void* pointer, size_t bytes, bool aligned, bool write,
                                                          Site site) {
  if (!running) return;  // constructors of the program
  if (in_shared_windows(pointer)) {
    check_shared_pointer(pointer, static_cast<uint32_t>(bytes), aligned, write, site);
  } else if (in_global_arena(pointer)) {
    check_global(access_by(*current(), write, site), pointer, bytes, aligned);
  }  // anything else is the thread's stack or a constant
}

}  // namespace emu

#define EMU_HOOK(name, bytes, aligned, write)                                                    \
  extern "C" EMU_ENTRY void name(void* pointer) {                                                \
    emu::access(pointer, bytes, aligned, write, __builtin_return_address(0));                    \
  }
#define EMU_HOOKS(bytes)                                        \
  EMU_HOOK(__tsan_read##bytes, bytes, true, false)              \
  EMU_HOOK(__tsan_write##bytes, bytes, true, true)              \
  EMU_HOOK(__tsan_unaligned_read##bytes, bytes, false, false)   \
  EMU_HOOK(__tsan_unaligned_write##bytes, bytes, false, true)   \
  EMU_HOOK(__tsan_volatile_read##bytes, bytes, true, false)     \
  EMU_HOOK(__tsan_volatile_write##bytes, bytes, true, true)

EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)

extern "C" {
EMU_ENTRY void __tsan_read_range(void* pointer, size_t bytes) {
  emu::access(pointer, bytes, false, false, __builtin_return_address(0));
}
EMU_ENTRY void __tsan_write_range(void* pointer, size_t bytes) {
  emu::access(pointer, bytes, false, true, __builtin_return_address(0));
}
EMU_ENTRY void __tsan_init() {}
EMU_ENTRY void __tsan_func_entry(void*) {}
EMU_ENTRY void __tsan_func_exit() {}
EMU_ENTRY void __tsan_vptr_update(void**, void*) {}
}
