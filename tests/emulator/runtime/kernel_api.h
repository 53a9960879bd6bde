// What an emulated kernel sees of the machine: who the running thread is, and the runtime's entry points, which the
// host twins of ptx/ and the built-ins of cuda_on_cpu.h call. An entry point finds the kernel's line by its return
// address, so each is a real call and everything between it and the kernel is inlined.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

namespace emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct BlockView {
  Dim3 block_index, block_dim, grid_dim;
  unsigned char* shared;  // dynamic shared memory
};

struct ThreadView {
  Dim3 thread_index;
  const BlockView* view;
};

extern ThreadView* running __attribute__((visibility("default")));

#define EMU_ENTRY __attribute__((visibility("default"), noinline))

enum class Shuffle { kIndex, kXor, kUp, kDown };
enum class Vote { kAny, kAll, kBallot, kMax, kMin, kAdd, kAnd, kOr };
enum class Atomic { kAddInt, kAddFloat, kIncrement, kMax, kOr, kExchange, kCompareAndSwap };

// Warps and blocks.
EMU_ENTRY uint32_t shuffle(uint32_t mask, uint32_t value, int argument, int width, Shuffle mode);
EMU_ENTRY uint32_t vote(uint32_t mask, uint32_t value, Vote mode);
EMU_ENTRY void sync_warp(uint32_t mask);
EMU_ENTRY uint32_t active_mask();
EMU_ENTRY void sync_threads();
EMU_ENTRY void barrier_sync(unsigned id, unsigned threads);
EMU_ENTRY void barrier_arrive(unsigned id, unsigned threads);

// Memory.
EMU_ENTRY uint32_t shared_address(const void* pointer);
EMU_ENTRY void* shared_access(uint32_t address, int bytes, bool write);
EMU_ENTRY uint32_t atomic(Atomic operation, void* pointer, uint32_t value, uint32_t compare);
EMU_ENTRY void thread_fence();
EMU_ENTRY uint32_t load_acquire(const void* pointer);  // of a polling loop: lets others run
EMU_ENTRY void add_release(void* pointer, uint32_t value);
EMU_ENTRY void add_floats(float* pointer, const float* values, int count);

// Copies behind the thread.
EMU_ENTRY void cp_async(uint32_t target, const void* source, int bytes, int source_bytes);
EMU_ENTRY void cp_async_commit();
EMU_ENTRY void cp_async_wait(int pending);

// Matrices of a warp. `matrices` of 8×8 16-bit elements; `a`, `b` hold 16-bit floats, bfloat16 if `bf16`.
EMU_ENTRY void load_matrices(uint32_t* registers, int matrices, bool transposed, uint32_t address);
EMU_ENTRY void store_matrices(const uint32_t* registers, int matrices, bool transposed, uint32_t address);
EMU_ENTRY void multiply_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bf16);

// Hopper: barriers in shared memory, TMA, wgmma.
EMU_ENTRY void mbarrier_init(uint32_t address, int arrivals);
EMU_ENTRY void mbarrier_arrive(uint32_t address, int expected_bytes);
EMU_ENTRY bool mbarrier_try_wait(uint32_t address, uint32_t parity);
EMU_ENTRY void mbarrier_wait(uint32_t address, uint32_t parity);
EMU_ENTRY void fence_mbarrier_init();
EMU_ENTRY void fence_proxy_async();
EMU_ENTRY void tma_load(uint32_t target, const void* map, uint32_t mbarrier, const int* coordinates, int rank);
EMU_ENTRY void bulk_load(uint32_t target, const void* source, int bytes, uint32_t mbarrier);
EMU_ENTRY void tma_store(const void* map, uint32_t source, const int* coordinates, int rank);
EMU_ENTRY void bulk_copy(uint32_t target, uint32_t source, int bytes, uint32_t mbarrier);  // target, mbarrier: mapped
EMU_ENTRY void bulk_commit();
EMU_ENTRY void bulk_wait(int pending, bool reads_only);
EMU_ENTRY void set_max_registers(int registers);

// Operand A is `a_registers` (four a lane) or, if that is null, descriptor `a`.
struct WgmmaOperands {
  float* d;
  int n;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool transposed_a, transposed_b, bf16, accumulate;
};
EMU_ENTRY void wgmma(const WgmmaOperands& operands);
EMU_ENTRY void wgmma_fence();
EMU_ENTRY void wgmma_commit();
EMU_ENTRY void wgmma_wait(int pending);

// Clusters.
EMU_ENTRY uint32_t cluster_rank();
EMU_ENTRY uint32_t map_shared(uint32_t address, uint32_t rank);
EMU_ENTRY void cluster_arrive_relaxed();
EMU_ENTRY void cluster_wait();
EMU_ENTRY void mbarrier_arrive_mapped(uint32_t address);

// Conversions with the hardware's rounding.
EMU_ENTRY uint16_t to_fp16(float x);
EMU_ENTRY float from_fp16(uint16_t bits);
EMU_ENTRY uint16_t to_bf16(float x);
EMU_ENTRY float exp2_approx_ftz(float x);
EMU_ENTRY float log2_approx_ftz(float x);

// Calls an entry of any signature from cuLaunchKernel's array of pointers to arguments. memcpy, as the driver does:
// the host's copy of an argument need not be aligned.
template <class T>
T argument(const void* bytes) {
  std::remove_const_t<T> value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

template <class... Parameters, size_t... kIndex>
void invoke(void (*entry)(Parameters...), void** arguments, std::index_sequence<kIndex...>) {
  entry(argument<Parameters>(arguments[kIndex])...);
}

template <class... Parameters>
void invoke(void (*entry)(Parameters...), void** arguments) {
  invoke(entry, arguments, std::index_sequence_for<Parameters...>{});
}

// Sizes of an entry's parameters in bytes, then 0: the host's arguments are held against them.
template <class... Parameters>
const size_t* parameter_sizes(void (*)(Parameters...)) {
  static const size_t sizes[] = {sizeof(Parameters)..., 0};
  return sizes;
}

}  // namespace emu

// Last line of every emulated program.
#define EMU_PROGRAM(entry)                                                            \
  extern "C" EMU_ENTRY void emu_invoke(void** arguments) { emu::invoke(entry, arguments); } \
  extern "C" EMU_ENTRY const size_t* emu_parameter_sizes() { return emu::parameter_sizes(entry); }
