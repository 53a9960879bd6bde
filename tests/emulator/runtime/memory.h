// Addresses: every access lies inside one allocation and is aligned to its size.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "shadow.h"

namespace emu {

// ---- dynamic shared memory: each resident block has a window of its own

constexpr size_t kMostShared = 227 << 10;  // bytes a block may have, sm_90
unsigned char* shared_window(int slot);
bool in_shared_windows(const void* pointer);

// Where [address, address + bytes) of the block lies: bounds and alignment.
unsigned char* require_shared(const Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, bool write,
                              Site site);
// The same, and notes the access.
unsigned char* shared_at(const Access& access, uint32_t address, uint32_t bytes, uint32_t alignment);
// The same for a pointer of the running thread.
void check_shared_pointer(const void* pointer, uint32_t bytes, bool aligned, bool write, Site site);

// The zones around a block's shared memory are filled when it starts and looked at when it ends: uninstrumented
// code (memcpy of the C library) can write there unseen.
void prepare_shared(unsigned char* shared, size_t bytes);
void check_shared_guards(const Block& block);

// ---- global memory

void* allocate_global(size_t bytes);  // filled with 0xff: NaN in every float format
void free_global(void* pointer);
bool in_global_arena(const void* pointer);
void require_global(const void* pointer, size_t bytes, bool aligned, bool write, Site site);
// The same, and notes the access.
void check_global(const Access& access, const void* pointer, size_t bytes, bool aligned);
void check_global_guards();

}  // namespace emu
