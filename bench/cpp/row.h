// A row of results: names and values in JSON, in the order in which they were set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace lcore::bench {

class Row {
 public:
  Row& set(const char* key, const std::string& value) { return put(key, quoted(value)); }
  Row& set(const char* key, const char* value) { return put(key, quoted(value)); }
  Row& set(const char* key, bool value) { return put(key, value ? "true" : "false"); }
  Row& set(const char* key, int value) { return put(key, std::to_string(value)); }
  Row& set(const char* key, int64_t value) { return put(key, std::to_string(value)); }
  Row& set(const char* key, double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return put(key, text);
  }
  Row& set(const char* key, const Row& value) { return put(key, value.json()); }
  // What only the Python benchmarks measure.
  Row& set(const char* key, std::nullptr_t) { return put(key, "null"); }

  std::string json() const {
    std::string text = "{";
    for (const auto& [key, value] : values_) {
      if (text.size() > 1) text += ", ";
      text += quoted(key) + ": " + value;
    }
    return text + "}";
  }

 private:
  static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') out += '\\';
      if (static_cast<unsigned char>(c) >= 0x20) out += c;
    }
    return out + "\"";
  }

  Row& put(const char* key, const std::string& json) {
    values_.emplace_back(key, json);
    return *this;
  }

  std::vector<std::pair<std::string, std::string>> values_;
};

}  // namespace lcore::bench
