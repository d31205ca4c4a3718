/* Weights in blocks of eight outputs, and their products with one token's activations or many. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum kind { HALF, BRAIN, INT8 };

/* `data`: blocks of eight outputs, in order, the missing ones 0. 16-bit kinds: input by input, eight outputs side by
   side. INT8: four inputs by four, of each of eight outputs; missing inputs are 0. `absmax` of INT8, and `bias` or NULL:
   a float for every output, whole blocks. `paired`: the matrix has two halves of outputs whose blocks alternate, and
   what it gives is SiLU(first) * second. */
typedef struct {
    const void *data;
    const float *absmax, *bias;
    int32_t rows, width, kind, paired;
} matrix;

/* Activations of one token for LLM.int8(): codes, the largest magnitude that has one, and the outliers. */
typedef struct {
    int8_t *codes;
    float absmax;
    int32_t count, *index;
    float *value;
} split;

/* Activations of many tokens. `x`: (rows, stride) floats. For LLM.int8() also `codes` (rows, code_stride), `absmax`
   (rows), `count` outlier columns `index`, and their values `outliers` (rows, stride). `codes` is NULL elsewhere. */
typedef struct {
    const float *x;
    const int8_t *codes;
    const float *absmax, *outliers;
    const int32_t *index;
    int32_t rows, stride, code_stride, count;
} batch;

int matrix_blocks(const matrix *);    /* of eight outputs; pairs of blocks where `paired` */
size_t matrix_block_bytes(const matrix *);
size_t panel_floats(const matrix *); /* room that `multiply_rows` needs */

/* Row-major `source`, of int8_t or uint16_t, into `target`, laid out for `shape` (whose data is not read). */
void pack(const void *source, const matrix *shape, void *target);

/* out[i] = result (+ bias) (+ out[i] with `add`), for blocks first..last-1. One of `x` and `s` is NULL. */
void multiply(const matrix *, const float *x, const split *s, int first, int last, int add, float *out);
/* The same for many rows; `out` (rows, out_stride); `panel` is the caller's room. */
void multiply_rows(const matrix *, const batch *, int first, int last, int add, float *out, int out_stride, float *panel);

/* Halves (rows, width) to codes and the largest magnitude of each row, as bitsandbytes makes them. */
void quantize(const uint16_t *source, int rows, int width, int8_t *codes, float *absmax);

/* Row `row` as floats, whole eights of them. */
void matrix_row(const matrix *, int row, float *out);

/* The decomposition of x (n): |x| >= threshold stays as it is, rounded to half; 0 turns that off. */
void decompose(const float *x, int n, float threshold, split *s);
/* A row of many: `x` is rounded to half in place, outlier columns are marked; returns the largest magnitude below. */
float survey(float *x, int n, float threshold, _Atomic uint8_t *marks);
/* Its codes, 0 in marked columns where |x| is `limit` or more. `padded` of them are written. */
void encode(const float *x, int n, int padded, float absmax, float limit, const _Atomic uint8_t *marks, int8_t *codes);
/* The limit that halves are compared with. */
float half_limit(float threshold);
static inline int below(float x, float limit) { return (x < 0 ? -x : x) < limit; }
