// The benchmarks' own flags, as in the Python ones: --name value[,value...], or --name alone. Those of Google Benchmark
// are taken out before.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace lcore::bench {

class Flags {
 public:
  Flags(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      std::string name = argv[i];
      if (name.rfind("--", 0) != 0) throw std::invalid_argument("flags begin with --, got " + name);
      name = name.substr(2);
      const size_t equals = name.find('=');
      if (equals != std::string::npos) {
        values_[name.substr(0, equals)] = name.substr(equals + 1);
      } else if (i + 1 < argc && std::string(argv[i + 1]).rfind("--", 0) != 0) {
        values_[name] = argv[++i];
      } else {
        values_[name] = "";
      }
    }
  }

  bool has(const std::string& name) {
    known_ += " --" + name;
    return asked_[name] = values_.count(name) > 0;
  }

  std::string text(const std::string& name, const std::string& otherwise) {
    return has(name) ? values_[name] : otherwise;
  }

  std::vector<std::string> texts(const std::string& name, const std::string& otherwise) {
    std::vector<std::string> parts;
    std::istringstream in(text(name, otherwise));
    for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
    if (parts.empty()) throw std::invalid_argument("--" + name + " needs a value");
    return parts;
  }

  std::vector<int64_t> numbers(const std::string& name, const std::string& otherwise) {
    std::vector<int64_t> parts;
    for (const std::string& part : texts(name, otherwise)) {
      char* end = nullptr;
      parts.push_back(std::strtoll(part.c_str(), &end, 10));
      if (part.empty() || *end != '\0' || parts.back() < 1) {
        throw std::invalid_argument("--" + name + " takes positive whole numbers, got " + part);
      }
    }
    return parts;
  }

  int64_t number(const std::string& name, const std::string& otherwise) { return numbers(name, otherwise)[0]; }

  // After all flags have been asked for.
  void refuse_unknown() const {
    for (const auto& [name, value] : values_) {
      if (asked_.count(name) == 0) throw std::invalid_argument("--" + name + " is none of" + known_);
    }
  }

 private:
  std::map<std::string, std::string> values_;
  std::map<std::string, bool> asked_;
  std::string known_;
};

}  // namespace lcore::bench
