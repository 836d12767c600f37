// A wrong kernel must not get a time: before a case is timed, a few of its rows are computed again as the formula says,
// in double, and compared. Each check throws std::runtime_error that names the row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/attention.h"
#include "tensor.h"

namespace lcore::bench {

// Sequences of seq_q queries and seq_k keys, contiguous; query i stands at key position i + seq_k - seq_q.
struct Problem {
  DType type;
  int64_t batch;
  int64_t seq_q;
  int64_t seq_k;
  int64_t heads;
  int64_t kv_heads;
  int head_dim;
  int64_t window_left;
  int64_t window_right;

  int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }
  double scale() const { return 1 / std::sqrt(static_cast<double>(head_dim)); }
  int64_t first_key(int64_t query) const { return std::clamp<int64_t>(query + seq_k - seq_q - window_left, 0, seq_k); }
  int64_t last_key(int64_t query) const {  // one past
    return std::clamp<int64_t>(query + seq_k - seq_q + window_right + 1, 0, seq_k);
  }
  // (query, key) pairs that the mask allows, of one head of one sequence.
  int64_t allowed_pairs() const {
    int64_t pairs = 0;
    for (int64_t i = 0; i < seq_q; ++i) pairs += std::max<int64_t>(last_key(i) - first_key(i), 0);
    return pairs;
  }
};

struct Forward {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& out;
};

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

inline void add(double factor, const std::vector<double>& x, std::vector<double>* sum) {
  for (size_t c = 0; c < x.size(); ++c) (*sum)[c] += factor * x[c];
}

inline void compare(const std::string& what, const std::vector<double>& got, const std::vector<double>& want,
                    double bound) {
  double error = 0, norm = 0;
  for (size_t c = 0; c < want.size(); ++c) {
    error += (got[c] - want[c]) * (got[c] - want[c]);
    norm += want[c] * want[c];
  }
  if (std::sqrt(error) <= bound * std::sqrt(norm)) return;  // false for a NaN
  throw std::runtime_error(what + " is wrong: relative error " + std::to_string(std::sqrt(error / norm)));
}

inline std::set<int64_t> some_of(int64_t count) { return {0, count / 2, count - 1}; }

// The formula's quantities for one query row.
struct QueryRow {
  std::vector<double> p;  // [keys seen], from first_key on
  double lse;
  std::vector<double> out;
};

inline QueryRow query_row(const Problem& problem, const Forward& f, int64_t batch, int64_t i, int64_t head) {
  const int64_t first = problem.first_key(i), last = problem.last_key(i);
  const std::vector<double> q = f.q.row(batch, i, head);
  QueryRow row{{}, 0, std::vector<double>(problem.head_dim)};
  double most = -std::numeric_limits<double>::infinity(), total = 0;
  for (int64_t j = first; j < last; ++j) {
    row.p.push_back(problem.scale() * dot(q, f.k.row(batch, j, problem.kv_head(head))));
    most = std::max(most, row.p.back());
  }
  for (double& p : row.p) {
    p = std::exp(p - most);
    total += p;
  }
  row.lse = most + std::log(total);
  for (int64_t j = first; j < last; ++j) {
    row.p[j - first] /= total;
    add(row.p[j - first], f.v.row(batch, j, problem.kv_head(head)), &row.out);
  }
  return row;
}

inline void check_forward(const Problem& problem, const Forward& f) {
  const int64_t batch = problem.batch - 1;
  for (const int64_t head : {int64_t{0}, problem.heads - 1}) {
    for (const int64_t i : some_of(problem.seq_q)) {
      const std::string name = "out of head " + std::to_string(head) + ", row " + std::to_string(i);
      compare(name, f.out.row(batch, i, head), query_row(problem, f, batch, i, head).out, tolerance(problem.type));
    }
  }
}

struct Backward {
  const float* lse;  // (batch, heads, seq_q) by these strides, as the forward left it
  int64_t lse_batch;
  int64_t lse_head;
  const Tensor& dout;
  const Tensor& dq;
  const Tensor& dk;
  const Tensor& dv;
};

// After check_forward: `out` and `lse` of the kernel may be used for rows that are not computed again.
inline void check_backward(const Problem& problem, const Forward& f, const Backward& b) {
  const int64_t batch = problem.batch - 1, head = problem.heads - 1, kv_head = problem.kv_heads - 1;
  const double bound = 2 * tolerance(problem.type);
  const auto zeros = [&] { return std::vector<double>(problem.head_dim); };

  for (const int64_t i : some_of(problem.seq_q)) {
    if (problem.last_key(i) - problem.first_key(i) < 2) continue;  // of one key alone dq is 0
    const QueryRow row = query_row(problem, f, batch, i, head);
    const std::vector<double> dout = b.dout.row(batch, i, head);
    const double delta = dot(dout, row.out);
    std::vector<double> dq = zeros();
    for (int64_t j = problem.first_key(i); j < problem.last_key(i); ++j) {
      const double p = row.p[j - problem.first_key(i)];
      const double ds = p * (dot(dout, f.v.row(batch, j, kv_head)) - delta);
      add(ds * problem.scale(), f.k.row(batch, j, kv_head), &dq);
    }
    compare("dq of row " + std::to_string(i), b.dq.row(batch, i, head), dq, bound);
  }

  for (const int64_t j : some_of(problem.seq_k)) {
    const std::vector<double> k = f.k.row(batch, j, kv_head), v = f.v.row(batch, j, kv_head);
    std::vector<double> dk = zeros(), dv = zeros();
    for (int64_t h = head + 1 - problem.heads / problem.kv_heads; h <= head; ++h) {
      for (int64_t i = 0; i < problem.seq_q; ++i) {
        if (j < problem.first_key(i) || j >= problem.last_key(i)) continue;
        const std::vector<double> q = f.q.row(batch, i, h), dout = b.dout.row(batch, i, h);
        const double lse = b.lse[batch * b.lse_batch + h * b.lse_head + i];
        const double p = std::exp(problem.scale() * dot(q, k) - lse);
        const double delta = dot(dout, f.out.row(batch, i, h));
        add(p, dout, &dv);
        add(p * (dot(dout, v) - delta) * problem.scale(), q, &dk);
      }
    }
    compare("dk of key " + std::to_string(j), b.dk.row(batch, j, kv_head), dk, bound);
    compare("dv of key " + std::to_string(j), b.dv.row(batch, j, kv_head), dv, bound);
  }
}

}  // namespace lcore::bench
