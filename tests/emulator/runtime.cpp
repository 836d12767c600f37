// The CUDA runtime as the host code of csrc/cuda calls it: one device, whose architecture the tests choose.
#include <cuda_runtime.h>

namespace {
int architecture = 80;
}

extern "C" {

void lcore_emulator_set_architecture(int arch) { architecture = arch; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrComputeCapabilityMajor) return *value = architecture / 10, cudaSuccess;
  if (attribute == cudaDevAttrComputeCapabilityMinor) return *value = architecture % 10, cudaSuccess;
  return cudaErrorNotSupported;
}

}  // extern "C"
