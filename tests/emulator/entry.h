// How Python calls: a function of C that returns the error's words, or an empty string.
#pragma once

#include <exception>
#include <string>

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

}  // namespace lcore::emulator
