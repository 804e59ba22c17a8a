// Tokens to buffer rows and back. Shapes: T tokens, H hidden, K choices of a token, R buffer rows;
// all arrays are contiguous. Every index is looked at before it is used.
#include <vector>

#include "native.h"

namespace {

using namespace native;

bool all_below(const int64_t* index, const uint8_t* counts, int64_t length, int64_t end) {
  for (int64_t i = 0; i < length; i++)
    if (counts[i] && (index[i] < 0 || index[i] >= end)) return false;
  return true;
}

// The token of a row that holds none.
constexpr int64_t NONE = -1;

// Columns summed at a time, in an array that stays in registers and the nearest cache.
constexpr int64_t PART = 512;

// y_t = sum over kept k of weights[t, k] * rows_RH[rows[t, k]]; without weights all are 1.
template <typename T>
int sum_of_rows(const T* out, const typename Computed<T>::type* weights, const int64_t* rows,
                const uint8_t* kept, T* y, int64_t tokens, int64_t topk, int64_t hidden,
                int64_t buffer_rows, int64_t threads) {
  using C = typename Computed<T>::type;
  if (!all_below(rows, kept, tokens * topk, buffer_rows)) return INDEX_OUT_OF_RANGE;
  const int team = threads_for(tokens * (topk + 1) * hidden, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t start = 0; start < hidden; start += PART) {
      const int64_t length = std::min(PART, hidden - start);
      C sum[PART] = {};
      for (int64_t a = t * topk; a < (t + 1) * topk; a++) {
        if (!kept[a]) continue;
        const T* row = out + rows[a] * hidden + start;
        const C weight = weights == nullptr ? C{1} : weights[a];
#pragma omp simd
        for (int64_t i = 0; i < length; i++) sum[i] += weight * load(row[i]);
      }
      T* to = y + t * hidden + start;
#pragma omp simd
      for (int64_t i = 0; i < length; i++) store(to[i], sum[i]);
    }
  }
  return OK;
}

template <typename T>
int combine_forward(const T* out, const typename Computed<T>::type* weights, const int64_t* rows,
                    const uint8_t* kept, T* y, int64_t tokens, int64_t topk, int64_t hidden,
                    int64_t buffer_rows, int64_t threads) {
  return sum_of_rows(out, weights, rows, kept, y, tokens, topk, hidden, buffer_rows, threads);
}

template <typename T>
int dispatch_backward(const T* grad, const int64_t* rows, const uint8_t* kept, T* dx,
                      int64_t tokens, int64_t topk, int64_t hidden, int64_t buffer_rows,
                      int64_t threads) {
  return sum_of_rows<T>(grad, nullptr, rows, kept, dx, tokens, topk, hidden, buffer_rows, threads);
}

template <typename T>
int dispatch_forward(const T* x, const int64_t* source, T* buffer, int64_t tokens, int64_t hidden,
                     int64_t buffer_rows, int64_t threads) {
  for (int64_t r = 0; r < buffer_rows; r++)
    if (source[r] < NONE || source[r] >= tokens) return INDEX_OUT_OF_RANGE;
  const int team = threads_for(2 * buffer_rows * hidden, threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t r = 0; r < buffer_rows; r++) {
    T* to = buffer + r * hidden;
    if (source[r] == NONE)
      std::fill_n(to, hidden, T{});
    else
      std::copy_n(x + source[r] * hidden, hidden, to);
  }
  return OK;
}

// Row r of choice (t, k) gets weights[t, k] * grad_t, and d_weights[t, k] = <grad_t, out_r>.
template <typename T>
int combine_backward(const T* grad, const T* out, const typename Computed<T>::type* weights,
                     const int64_t* rows, const uint8_t* kept, T* d_out,
                     typename Computed<T>::type* d_weights, int64_t tokens, int64_t topk,
                     int64_t hidden, int64_t buffer_rows, int64_t threads) {
  using C = typename Computed<T>::type;
  if (!all_below(rows, kept, tokens * topk, buffer_rows)) return INDEX_OUT_OF_RANGE;
  std::vector<uint8_t> filled(buffer_rows, 0);
  for (int64_t a = 0; a < tokens * topk; a++)
    if (kept[a]) filled[rows[a]] = 1;
  const int team = threads_for(tokens * (2 * topk + 1) * hidden, threads);
#pragma omp parallel num_threads(team)
  {
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < tokens; t++) {
      const T* g = grad + t * hidden;
      for (int64_t a = t * topk; a < (t + 1) * topk; a++) {
        d_weights[a] = 0;
        if (!kept[a]) continue;
        const T* row = out + rows[a] * hidden;
        T* to = d_out + rows[a] * hidden;
        const C weight = weights[a];
        C dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < hidden; i++) {
          dot += load(g[i]) * load(row[i]);
          store(to[i], weight * load(g[i]));
        }
        d_weights[a] = dot;
      }
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < buffer_rows; r++)
      if (!filled[r]) std::fill_n(d_out + r * hidden, hidden, T{});
  }
  return OK;
}

}  // namespace

#define COMBINE_FORWARD(T)                                                                        \
  (const T* out, const native::Computed<T>::type* weights, const int64_t* rows,                   \
   const uint8_t* kept, T* y, int64_t tokens, int64_t topk, int64_t hidden, int64_t buffer_rows, \
   int64_t threads)
NATIVE_FOR_TYPES(combine_forward, COMBINE_FORWARD,
                 (out, weights, rows, kept, y, tokens, topk, hidden, buffer_rows, threads))

#define COMBINE_BACKWARD(T)                                                                       \
  (const T* grad, const T* out, const native::Computed<T>::type* weights, const int64_t* rows,    \
   const uint8_t* kept, T* d_out, native::Computed<T>::type* d_weights, int64_t tokens,           \
   int64_t topk, int64_t hidden, int64_t buffer_rows, int64_t threads)
NATIVE_FOR_TYPES(combine_backward, COMBINE_BACKWARD,
                 (grad, out, weights, rows, kept, d_out, d_weights, tokens, topk, hidden,
                  buffer_rows, threads))

#define DISPATCH_FORWARD(T)                                                       \
  (const T* x, const int64_t* source, T* buffer, int64_t tokens, int64_t hidden, \
   int64_t buffer_rows, int64_t threads)
NATIVE_FOR_TYPES(dispatch_forward, DISPATCH_FORWARD,
                 (x, source, buffer, tokens, hidden, buffer_rows, threads))

#define DISPATCH_BACKWARD(T)                                                                     \
  (const T* grad, const int64_t* rows, const uint8_t* kept, T* dx, int64_t tokens, int64_t topk, \
   int64_t hidden, int64_t buffer_rows, int64_t threads)
NATIVE_FOR_TYPES(dispatch_backward, DISPATCH_BACKWARD,
                 (grad, rows, kept, dx, tokens, topk, hidden, buffer_rows, threads))
