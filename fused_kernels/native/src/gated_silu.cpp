// The gate of a feed-forward layer and its gradient, each in one pass over memory.
// A row of z is [gate | up] or [linear | gate | up], each `width` long; all arrays are contiguous.
#include "native.h"

namespace {

using namespace native;

template <typename T, bool LINEAR>
void forward_row(const T* __restrict z, T* __restrict h, int64_t width) {
  const T *linear = z, *gate = z + (LINEAR ? width : 0), *up = gate + width;
#pragma omp simd
  for (int64_t i = 0; i < width; i++) {
    const auto g = load(gate[i]);
    auto value = g * (1 / (1 + exponential(-g)));
    if (LINEAR) value *= load(linear[i]);
    store(h[i], value * load(up[i]));
  }
}

// Without WITH_H nothing is written to h.
template <typename T, bool LINEAR, bool WITH_H>
void backward_row(const T* __restrict dh, const T* __restrict z, T* __restrict dz, T* __restrict h,
                  int64_t width) {
  const int64_t skip = LINEAR ? width : 0;
  const T *linear = z, *gate = z + skip, *up = gate + width;
  T *d_linear = dz, *d_gate = dz + skip, *d_up = d_gate + width;
#pragma omp simd
  for (int64_t i = 0; i < width; i++) {
    const auto g = load(gate[i]), u = load(up[i]), d = load(dh[i]);
    const auto sigmoid = 1 / (1 + exponential(-g));
    const auto slope = sigmoid * (1 + g * (1 - sigmoid));
    const auto silu = g * sigmoid;  // As in the forward pass, to the last bit.
    if (LINEAR) {
      const auto a = load(linear[i]);
      store(d_linear[i], d * silu * u);
      store(d_gate[i], d * a * u * slope);
      store(d_up[i], d * a * silu);
      if (WITH_H) store(h[i], silu * a * u);
    } else {
      store(d_gate[i], d * u * slope);
      store(d_up[i], d * silu);
      if (WITH_H) store(h[i], silu * u);
    }
  }
}

template <typename T>
int gated_silu_forward(const T* z, T* h, int64_t rows, int64_t width, int64_t blocks, int64_t threads) {
  const auto row = blocks == 3 ? forward_row<T, true> : forward_row<T, false>;
  const int team = threads_for(rows * width * (blocks + 1), threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t r = 0; r < rows; r++) row(z + r * blocks * width, h + r * width, width);
  return OK;
}

template <typename T>
int gated_silu_backward(const T* dh, const T* z, T* dz, T* h, int64_t rows, int64_t width,
                        int64_t blocks, int64_t threads) {
  const auto row = blocks == 3 ? backward_row<T, true, true> : backward_row<T, false, true>;
  const int team = threads_for(rows * width * (2 * blocks + 2), threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = r * width, z_at = at * blocks;
    row(dh + at, z + z_at, dz + z_at, h + at, width);
  }
  return OK;
}

template <typename T>
int gated_silu_gradient(const T* dh, const T* z, T* dz, int64_t rows, int64_t width, int64_t blocks,
                        int64_t threads) {
  const auto row = blocks == 3 ? backward_row<T, true, false> : backward_row<T, false, false>;
  const int team = threads_for(rows * width * (2 * blocks + 1), threads);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = r * width, z_at = at * blocks;
    row(dh + at, z + z_at, dz + z_at, nullptr, width);
  }
  return OK;
}

}  // namespace

#define FORWARD(T) (const T* z, T* h, int64_t rows, int64_t width, int64_t blocks, int64_t threads)
NATIVE_FOR_TYPES(gated_silu_forward, FORWARD, (z, h, rows, width, blocks, threads))

#define BACKWARD(T)                                                                     \
  (const T* dh, const T* z, T* dz, T* h, int64_t rows, int64_t width, int64_t blocks, \
   int64_t threads)
NATIVE_FOR_TYPES(gated_silu_backward, BACKWARD, (dh, z, dz, h, rows, width, blocks, threads))

#define GRADIENT(T) \
  (const T* dh, const T* z, T* dz, int64_t rows, int64_t width, int64_t blocks, int64_t threads)
NATIVE_FOR_TYPES(gated_silu_gradient, GRADIENT, (dh, z, dz, rows, width, blocks, threads))
