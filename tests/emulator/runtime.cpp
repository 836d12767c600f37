// The CUDA runtime as the host code of csrc/cuda calls it: one device, whose architecture the tests choose.
#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

namespace lcore::emulator {
CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill);
}

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

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *found = known ? reinterpret_cast<void*>(lcore::emulator::encode_tiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
