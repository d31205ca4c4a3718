/* Eight numbers at a time: what differs between processors stands here, everything else is plain C.

   Vectors are the compilers' own (GCC and Clang), so arithmetic needs no names; a processor adds how it converts 16-bit
   floats, how it rounds, and how it multiplies four signed bytes by four and sums them. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#include <immintrin.h>
#define WITH_AVX2 1
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define WITH_NEON 1
#endif

enum { LANES = 8, QUAD = 4 };
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint32_t uints __attribute__((vector_size(32)));
typedef uint16_t shorts __attribute__((vector_size(16)));
typedef int8_t bytes __attribute__((vector_size(8)));

static inline floats load(const float *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float *p, floats v) { memcpy(p, &v, sizeof v); }
static inline floats all(float x) { return x - (floats){0}; }
static inline ints load_codes(const int8_t *p) {
    ints v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline floats floats_of(ints v) { return __builtin_convertvector(v, floats); }
static inline floats either(ints which, floats yes, floats no) { return (floats)((which & (ints)yes) | (~which & (ints)no)); }
static inline floats larger(floats a, floats b) { return either(a > b, a, b); }
static inline floats magnitude(floats v) { return (floats)((uints)v & 0x7fffffffu); }

static inline float sum(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
static inline float highest(floats v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

/* IEEE half precision, rounded to nearest even. */
#if WITH_AVX2
static inline uint16_t half_of(float x) { return _cvtss_sh(x, 0); }
static inline floats load_half(const uint16_t *p) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void store_half(uint16_t *p, floats v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
static inline floats rounded(floats v) { return (floats)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif WITH_NEON
static inline uint16_t half_of(float x) {
    __fp16 h = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}
static inline floats load_half(const uint16_t *p) {
    float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
    floats v;
    float32x4_t low = vcvt_f32_f16(vget_low_f16(h)), high = vcvt_f32_f16(vget_high_f16(h));
    memcpy(&v, &low, 16);
    memcpy((char *)&v + 16, &high, 16);
    return v;
}
static inline void store_half(uint16_t *p, floats v) {
    for (int i = 0; i < LANES; i++) p[i] = half_of(v[i]);
}
static inline floats rounded(floats v) {
    float32x4_t low, high;
    memcpy(&low, &v, 16);
    memcpy(&high, (char *)&v + 16, 16);
    low = vrndnq_f32(low);
    high = vrndnq_f32(high);
    memcpy(&v, &low, 16);
    memcpy((char *)&v + 16, &high, 16);
    return v;
}
#else
static inline uint16_t half_of(float x) {
    _Float16 h = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}
static inline floats load_half(const uint16_t *p) {
    floats v;
    for (int i = 0; i < LANES; i++) {
        _Float16 h;
        memcpy(&h, p + i, 2);
        v[i] = (float)h;
    }
    return v;
}
static inline void store_half(uint16_t *p, floats v) {
    for (int i = 0; i < LANES; i++) p[i] = half_of(v[i]);
}
static inline floats rounded(floats v) {
    for (int i = 0; i < LANES; i++) v[i] = rintf(v[i]);
    return v;
}
#endif

/* bfloat16: the upper half of a float. */
static inline floats load_brain(const uint16_t *p) {
    shorts v;
    memcpy(&v, p, sizeof v);
    return (floats)(__builtin_convertvector(v, uints) << 16);
}
static inline void store_brain(uint16_t *p, floats v) {
    uints bits = (uints)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    shorts upper = __builtin_convertvector(bits, shorts);
    memcpy(p, &upper, sizeof upper);
}

/* sums[i] + the product of the i-th four codes of `w` with the i-th four of `x`. No step saturates, because codes lie
   in [-127, 127]: 2 * 127 * 127 < 2^15. */
static inline ints dot(ints sums, ints w, ints x) {
#if WITH_AVX2
    __m256i size = _mm256_abs_epi8((__m256i)w), signedx = _mm256_sign_epi8((__m256i)x, (__m256i)w);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (ints)_mm256_dpbusd_epi32((__m256i)sums, size, signedx);
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sums, size, signedx);
#else
    __m256i pairs = _mm256_maddubs_epi16(size, signedx);
    return sums + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#elif WITH_NEON && defined(__ARM_FEATURE_DOTPROD)
    int32x4_t low, high;
    int8x16_t wl, wh, xl, xh;
    memcpy(&low, &sums, 16), memcpy(&high, (char *)&sums + 16, 16);
    memcpy(&wl, &w, 16), memcpy(&wh, (char *)&w + 16, 16);
    memcpy(&xl, &x, 16), memcpy(&xh, (char *)&x + 16, 16);
    low = vdotq_s32(low, wl, xl), high = vdotq_s32(high, wh, xh);
    memcpy(&sums, &low, 16), memcpy((char *)&sums + 16, &high, 16);
    return sums;
#else
    for (int j = 0; j < QUAD; j++) sums += ((ints)((uints)w << (24 - 8 * j)) >> 24) * ((ints)((uints)x << (24 - 8 * j)) >> 24);
    return sums;
#endif
}

/* Four codes, for all lanes. */
static inline ints four(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v - (ints){0};
}

/* The j-th code of each lane's four. */
static inline floats code(ints w, int j) { return floats_of((ints)((uints)w << (24 - 8 * j)) >> 24); }

/* e^x to 2 units in the last place; 0 below -87, infinite above 88.7. */
static inline floats exponential(floats x) {
    const floats low = all(-87.0f), high = all(88.8f);
    floats inside = either(x < low, low, x);
    inside = either(inside > high, high, inside);
    floats n = rounded(inside * 1.44269504f);
    floats r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
    floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    ints whole = __builtin_convertvector(n, ints);
    ints half = whole >> 1; /* in two steps: 2^128 is no float */
    y = y * (floats)((half + 127) << 23) * (floats)((whole - half + 127) << 23);
    y = either(x < low, all(0.0f), y);
    return either(x == x, y, x);
}
