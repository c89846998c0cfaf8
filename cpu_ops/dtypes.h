// The element types of queries, outputs and the KV pool, and their plain conversions.
//
// Functions are static: translation units with different instruction sets must not share their
// code. 16-bit floats are held as their bits, so that no translation unit needs a compiler's own
// half type. Conversions to 16 bits round to nearest even, as XLA's do.

#ifndef APEX_JAX_CPU_OPS_DTYPES_H_
#define APEX_JAX_CPU_OPS_DTYPES_H_

#include <cstdint>
#include <cstring>

namespace apex {

enum class DType { kFloat32, kFloat16, kBFloat16 };

struct Half {
  uint16_t bits;
};

struct BFloat {
  uint16_t bits;
};

static inline int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Calls body with a value of the C++ type that stands for dtype: Dispatch(d, [&](auto like) {...}).
template <class Body>
auto Dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(Half{});
    case DType::kBFloat16:
      return body(BFloat{});
    case DType::kFloat32:
      break;
  }
  return body(float{});
}

static inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float ToFloat(float value) { return value; }

static inline float ToFloat(BFloat value) { return FloatOf(uint32_t{value.bits} << 16); }

static inline float ToFloat(Half value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and normalises subnormals on the way.
  uint32_t bits = BitsOf(FloatOf(magnitude) * FloatOf((127u + 112u) << 23));
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // infinity and NaN
  return FloatOf(bits | (value.bits & 0x8000u) << 16);
}

static inline void FromFloat(float value, float* out) { *out = value; }

static inline void FromFloat(float value, BFloat* out) {
  const uint32_t bits = BitsOf(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // Rounding may carry a NaN into infinity; a NaN keeps its sign and becomes quiet.
  out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16 | 0x40u)
                                           : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline void FromFloat(float value, Half* out) {
  const uint32_t sign = BitsOf(value) >> 16 & 0x8000u;
  const uint32_t magnitude = BitsOf(value) & 0x7fffffffu;
  uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    bits = 0x7c00u;  // rounds to 2^16 or more: infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    bits = BitsOf(FloatOf(magnitude) + 0.5f) - BitsOf(0.5f);
  } else {
    bits = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | bits);
}

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_DTYPES_H_
