// How Python calls: a function of C that returns the error's words, or an empty string.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

namespace lcore::emulator {

template <class F>
const char* guarded(F&& f) {
  static std::string error;
  error.clear();
  try {
    f();
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}

// For kernels that need no scratch memory.
inline cuda::Stream& no_stream() {
  struct NoStream final : cuda::Stream {
    NoStream() : Stream(nullptr) {}
    void* scratch(size_t) override { throw std::logic_error("this stream has no memory"); }
  };
  static NoStream stream;
  return stream;
}

}  // namespace lcore::emulator
