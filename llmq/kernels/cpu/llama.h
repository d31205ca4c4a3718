/* A LLaMA on a CPU: what Python hands over, and the three things it can ask for. All memory is the caller's. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "matrix.h"
#include "pool.h"

typedef struct {
    const float *attention_norm, *mlp_norm;
    matrix qkv, output, gate_up, down;
} layer;

typedef struct {
    int32_t layers, hidden, inner, heads, groups, width, vocabulary, cache_kind;
    float eps;
    const layer *layer;
    matrix embedding, head;
    const float *norm;
} model;

/* Of `decompose`: no row's outliers are another's. */
enum { EACH_ROW = 2 };

/* One generation's room. `keys`, `values`: (layers, groups, capacity, width) of `cache_kind`, HALF or BRAIN. `rope`:
   (capacity, width), cosines then sines. `decompose`: whether INT8 matrices take int8 activations with outliers from
   `threshold` on, whose columns the rows of a prefill pool unless it is EACH_ROW. `marks`: NULL, or (4 * layers + 1,
   marks_stride) bytes that become 1 where a column is an outlier: of the inputs of qkv, output, gate_up and down of each
   layer, and of the head. */
typedef struct {
    const model *model;
    pool *pool;
    uint16_t *keys, *values;
    const float *rope;
    int32_t capacity, decompose;
    float threshold;
    int32_t marks_stride;
    uint8_t *marks;
    char *workspace; /* of `llmq_workspace_bytes`, on a 64-byte boundary */
} session;

enum { LLMQ_VERSION = 1 };
int llmq_version(void);

/* Regions a pool must allow for. */
int llmq_regions(const model *);

/* Bytes of `workspace` for a prefill of `rows` tokens, or for steps: 0. `splits` is the session's `decompose`. */
int64_t llmq_workspace_bytes(const model *, int threads, int capacity, int rows, int splits);

/* Bytes of a packed matrix. */
int64_t llmq_packed_bytes(const matrix *);

/* Feed `token` at `position`; `logits`: (whole eights of vocabulary,) floats. `chosen`: the likeliest token and the
   natural logarithm of its probability, not a number where a logit is. */
void llmq_step(const session *, int token, int position, float *logits, double *chosen);

/* Feed `rows` tokens from position 0. With `every`, logits of all of them, (rows, whole eights of vocabulary), else of
   the last. `stopped` is asked between layers and may be NULL; returns 1 when it said so, else 0. */
int llmq_prefill(const session *, const int32_t *tokens, int rows, int every, float *logits, double *chosen, int (*stopped)(void));
