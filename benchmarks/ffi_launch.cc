// An XLA FFI handler that launches any CUDA kernel: what benchmarks/jax_call.py compares buffer_callback with.
// The kernel takes the addresses of all inputs and outputs, in order, then one struct by value.

#include <dlfcn.h>

#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// cuLaunchKernel as <cuda.h>, which JAX does not bring along, declares it.
using LaunchKernel = int(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream,
                         void** arguments, void** extra);

ffi::Error Launch(void* stream, ffi::RemainingArgs inputs, ffi::RemainingRets outputs, int64_t function,
                  int64_t grid, int64_t block, int64_t shared_bytes, ffi::Span<const int32_t> params) {
  static auto* launch =
      reinterpret_cast<LaunchKernel*>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuLaunchKernel"));
  if (launch == nullptr) return ffi::Error::Internal("libcuda.so.1 has no cuLaunchKernel");

  std::vector<void*> addresses;
  for (size_t i = 0; i < inputs.size(); ++i) addresses.push_back(inputs.get<ffi::AnyBuffer>(i)->untyped_data());
  for (size_t i = 0; i < outputs.size(); ++i)
    addresses.push_back((*outputs.get<ffi::AnyBuffer>(i))->untyped_data());
  std::vector<void*> arguments;
  for (void*& address : addresses) arguments.push_back(&address);
  arguments.push_back(const_cast<int32_t*>(params.begin()));

  const int status = launch(reinterpret_cast<void*>(function), grid, 1, 1, block, 1, 1, shared_bytes, stream,
                            arguments.data(), nullptr);
  if (status != 0) return ffi::Error::Internal("cuLaunchKernel returned " + std::to_string(status));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaunchHandler, Launch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("function")
                                  .Attr<int64_t>("grid")
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("shared_bytes")
                                  .Attr<ffi::Span<const int32_t>>("params"),
                              {ffi::Traits::kCmdBufferCompatible});
