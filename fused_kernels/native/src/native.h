// What all operations share: element types, how many threads, and an exponential that the compiler
// can work on in whole vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace native {

// Answers of every operation.
constexpr int OK = 0;
constexpr int INDEX_OUT_OF_RANGE = 1;

struct bfloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Elements are computed with in fp32, or in fp64 where they are that.
template <typename T>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(bfloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

inline void store(float& to, float value) { to = value; }
inline void store(double& to, double value) { to = value; }
inline void store(bfloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  // To the nearest, halves to even; what is not a number stays so, whatever its bits.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// exp(x) to about one unit in the last place: x = n log 2 + r, a polynomial in r (Cephes, expf), and
// n added to the exponent. Below -87.3 it is the value there, above 88.37 infinity.
inline float exponential(float x) {
  const float low = -87.3f, high = 88.37f;
  const float within = x < low ? low : (x > high ? high : x);
  const float n = std::nearbyint(within * 1.44269504088896341f);
  // log 2 in two parts: n times the first is exact.
  const float r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float value = p * r * r + r + 1.0f;
  const float power = bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x > high ? INFINITY : value * power;
}
inline double exponential(double x) { return std::exp(x); }

// Threads worth waking for so many elements read or written.
inline int threads_for(int64_t elements, int64_t threads) {
  constexpr int64_t worth_a_thread = 1 << 14;
  return static_cast<int>(std::clamp<int64_t>(elements / worth_a_thread, 1, threads));
}

}  // namespace native

// One operation for each element type, under names that need no C++ to be found:
// NATIVE_FOR_TYPES(f, (parameters of T), (arguments)) calls f<T>.
#define NATIVE_FOR_TYPE(name, suffix, T_, parameters, arguments) \
  extern "C" int name##_##suffix parameters(T_) { return name<T_> arguments; }
#define NATIVE_FOR_TYPES(name, parameters, arguments)                  \
  NATIVE_FOR_TYPE(name, f32, float, parameters, arguments)             \
  NATIVE_FOR_TYPE(name, f64, double, parameters, arguments)            \
  NATIVE_FOR_TYPE(name, bf16, native::bfloat16, parameters, arguments)
