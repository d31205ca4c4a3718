#include "matrix.h"

#include <stdatomic.h>

#include "simd.h"

enum { TILE = 6, CODE_TILE = 4, AHEAD = 1024 };

static int whole(int n, int unit) { return (n + unit - 1) / unit * unit; }
static int half_rows(const matrix *m) { return m->paired ? m->rows / 2 : m->rows; }

int matrix_blocks(const matrix *m) { return (half_rows(m) + LANES - 1) / LANES; }

static size_t one_block_bytes(const matrix *m) {
    return m->kind == INT8 ? (size_t)LANES * whole(m->width, QUAD) : (size_t)LANES * m->width * 2;
}
size_t matrix_block_bytes(const matrix *m) { return one_block_bytes(m) * (m->paired ? 2 : 1); }
size_t panel_floats(const matrix *m) { return (size_t)2 * LANES * m->width; }

/* The block and lane of an output. */
static size_t block_of(const matrix *m, int row, int *lane) {
    int half = half_rows(m), second = m->paired && row >= half, r = second ? row - half : row;
    *lane = r % LANES;
    return m->paired ? (size_t)2 * (r / LANES) + second : (size_t)(r / LANES);
}

void pack(const void *source, const matrix *m, void *target) {
    const size_t row_bytes = (size_t)m->width * (m->kind == INT8 ? 1 : 2), block_bytes = one_block_bytes(m);
    const int half = half_rows(m), sides = m->paired ? 2 : 1;
    memset(target, 0, block_bytes * (size_t)matrix_blocks(m) * (size_t)sides);
    for (int first = 0; first < half; first += LANES)
        for (int side = 0; side < sides; side++) {
            const int rows = half - first < LANES ? half - first : LANES;
            const char *from = (const char *)source + row_bytes * (size_t)(first + side * half);
            char *block = (char *)target + block_bytes * ((size_t)first / LANES * (size_t)sides + (size_t)side);
            if (m->kind == INT8) {
                for (int k = 0; k < m->width; k += QUAD)
                    for (int lane = 0; lane < rows; lane++)
                        memcpy(block + (size_t)k * LANES + lane * QUAD, from + row_bytes * (size_t)lane + k,
                               (size_t)(m->width - k < QUAD ? m->width - k : QUAD));
            } else
                for (int k = 0; k < m->width; k++)
                    for (int lane = 0; lane < rows; lane++)
                        memcpy(block + ((size_t)k * LANES + (size_t)lane) * 2, from + row_bytes * (size_t)lane + (size_t)k * 2, 2);
        }
}

static inline floats load_16(const uint16_t *p, int kind) { return kind == HALF ? load_half(p) : load_brain(p); }

void matrix_row(const matrix *m, int row, float *out) {
    int lane;
    const char *block = (const char *)m->data + block_of(m, row, &lane) * one_block_bytes(m);
    for (int k = 0; k < m->width; k++) {
        if (m->kind == INT8)
            out[k] = (float)((const int8_t *)block)[(size_t)k / QUAD * 32 + lane * QUAD + k % QUAD] * (m->absmax[row] / 127);
        else
            out[k] = load_16((const uint16_t *)block + (size_t)k * LANES, m->kind)[lane];
    }
    for (int k = m->width; k < whole(m->width, LANES); k++) out[k] = 0;
}

/* ---- one token ---- */

static inline floats dense_block(const uint16_t *w, int width, int kind, const float *x) {
    floats a = {0}, b = {0}, c = {0}, d = {0};
    int k = 0;
    for (; k + 4 <= width; k += 4, w += 4 * LANES) {
        __builtin_prefetch((const char *)w + AHEAD);
        a += load_16(w, kind) * x[k];
        b += load_16(w + LANES, kind) * x[k + 1];
        c += load_16(w + 2 * LANES, kind) * x[k + 2];
        d += load_16(w + 3 * LANES, kind) * x[k + 3];
    }
    for (; k < width; k++, w += LANES) a += load_16(w, kind) * x[k];
    return (a + b) + (c + d);
}

static inline floats weight_only_block(const int8_t *w, int width, const float *x) {
    floats a = {0}, b = {0}, c = {0}, d = {0};
    int k = 0;
    for (; k + QUAD <= width; k += QUAD, w += 32) {
        __builtin_prefetch(w + AHEAD);
        ints q = load_codes(w);
        a += code(q, 0) * x[k];
        b += code(q, 1) * x[k + 1];
        c += code(q, 2) * x[k + 2];
        d += code(q, 3) * x[k + 3];
    }
    for (int j = 0; k < width; k++, j++) a += code(load_codes(w), j) * x[k];
    return (a + b) + (c + d);
}

static inline floats split_block(const int8_t *w, int width, const split *s) {
    ints a = {0}, b = {0};
    const int8_t *p = w;
    int k = 0;
    for (; k + 2 * QUAD <= width; k += 2 * QUAD, p += 64) {
        __builtin_prefetch(p + AHEAD);
        a = dot(a, load_codes(p), four(s->codes + k));
        b = dot(b, load_codes(p + 32), four(s->codes + k + QUAD));
    }
    for (; k < width; k += QUAD, p += 32) a = dot(a, load_codes(p), four(s->codes + k));
    floats y = floats_of(a + b) * (s->absmax / 127);
    floats outliers = {0};
    for (int i = 0; i < s->count; i++) {
        int column = s->index[i];
        outliers += code(load_codes(w + (size_t)column / QUAD * 32), column % QUAD) * s->value[i];
    }
    return y + outliers;
}

static inline floats block_product(const matrix *m, size_t block, const float *x, const split *s) {
    const char *data = (const char *)m->data + block * one_block_bytes(m);
    floats y;
    if (m->kind != INT8)
        y = m->kind == HALF ? dense_block((const uint16_t *)data, m->width, HALF, x)
                            : dense_block((const uint16_t *)data, m->width, BRAIN, x);
    else {
        y = s ? split_block((const int8_t *)data, m->width, s) : weight_only_block((const int8_t *)data, m->width, x);
        y *= load(m->absmax + block * LANES) / 127.0f;
    }
    return m->bias ? y + load(m->bias + block * LANES) : y;
}

static inline floats gated(floats gate, floats up) { return gate / (1.0f + exponential(-gate)) * up; }

void multiply(const matrix *m, const float *x, const split *s, int first, int last, int add, float *out) {
    for (int i = first; i < last; i++) {
        floats y = block_product(m, m->paired ? 2 * (size_t)i : (size_t)i, x, s);
        if (m->paired) y = gated(y, block_product(m, 2 * (size_t)i + 1, x, s)); /* in the order they lie in memory */
        float *place = out + (size_t)i * LANES;
        store(place, add ? y + load(place) : y);
    }
}

/* ---- many tokens ---- */

/* Two blocks, eight outputs each, against TILE rows. `panel`: (width, 16) floats. */
static inline void dense_tile(const float *panel, int width, const float *const *x, floats y[TILE][2]) {
    floats acc[TILE][2] = {{{0}}};
    for (int k = 0; k < width; k++, panel += 2 * LANES) {
        floats p = load(panel), q = load(panel + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) {
            floats one = all(x[r][k]);
            acc[r][0] += p * one;
            acc[r][1] += q * one;
        }
    }
    memcpy(y, acc, sizeof acc);
}

static inline void code_tile(const int8_t *w, const int8_t *v, int width, const int8_t *const *x, ints y[CODE_TILE][2]) {
    ints acc[CODE_TILE][2] = {{{0}}};
    for (int k = 0; k < width; k += QUAD, w += 32, v += 32) {
        ints p = load_codes(w), q = load_codes(v);
#pragma GCC unroll 4
        for (int r = 0; r < CODE_TILE; r++) {
            ints one = four(x[r] + k);
            acc[r][0] = dot(acc[r][0], p, one);
            acc[r][1] = dot(acc[r][1], q, one);
        }
    }
    memcpy(y, acc, sizeof acc);
}

/* Two blocks as floats side by side, (columns, 16): all inputs, or those in `index`. */
static void unpack(const matrix *m, const char *w, const char *v, const int32_t *index, int columns, float *panel) {
    for (int i = 0; i < columns; i++, panel += 2 * LANES) {
        size_t k = index ? (size_t)index[i] : (size_t)i;
        if (m->kind == INT8) {
            store(panel, code(load_codes((const int8_t *)w + k / QUAD * 32), k % QUAD));
            store(panel + LANES, code(load_codes((const int8_t *)v + k / QUAD * 32), k % QUAD));
        } else {
            store(panel, load_16((const uint16_t *)w + k * LANES, m->kind));
            store(panel + LANES, load_16((const uint16_t *)v + k * LANES, m->kind));
        }
    }
}

static inline void finish(const matrix *m, size_t block, floats y, int add, float *place) {
    if (m->bias) y += load(m->bias + block * LANES);
    store(place, add ? y + load(place) : y);
}

/* Blocks w and v of `m`, for all rows; w == v where there is only one. */
static void two_blocks(const matrix *m, const batch *b, size_t w, size_t v, int add, float *out, int stride, float *panel) {
    size_t bytes = one_block_bytes(m);
    const char *wp = (const char *)m->data + w * bytes, *vp = (const char *)m->data + v * bytes;
    floats scale[2] = {all(1.0f), all(1.0f)};
    if (m->kind == INT8) scale[0] = load(m->absmax + w * LANES) / 127.0f, scale[1] = load(m->absmax + v * LANES) / 127.0f;
    const int listed = b->codes ? b->count : m->width;
    unpack(m, wp, vp, b->codes ? b->index : NULL, listed, panel);
    const float *values = b->codes ? b->outliers : b->x;
    for (int row = 0; row < b->rows; row += b->codes ? CODE_TILE : TILE) {
        const float *x[TILE];
        const int8_t *codes[CODE_TILE];
        floats y[TILE][2];
        int count = b->rows - row < TILE ? b->rows - row : TILE;
        for (int r = 0; r < TILE; r++) x[r] = values + (size_t)(row + (r < count ? r : 0)) * b->stride;
        if (b->codes) {
            if (count > CODE_TILE) count = CODE_TILE;
            ints exact[CODE_TILE][2];
            for (int r = 0; r < CODE_TILE; r++) codes[r] = b->codes + (size_t)(row + (r < count ? r : 0)) * b->code_stride;
            code_tile((const int8_t *)wp, (const int8_t *)vp, m->width, codes, exact);
            if (listed)
                dense_tile(panel, listed, x, y);
            else
                memset(y, 0, sizeof y);
            for (int r = 0; r < count; r++)
                for (int side = 0; side < 2; side++) y[r][side] += floats_of(exact[r][side]) * (b->absmax[row + r] / 127);
        } else
            dense_tile(panel, listed, x, y);
        for (int r = 0; r < count; r++) {
            float *place = out + (size_t)(row + r) * stride;
            floats first = y[r][0] * scale[0], second = y[r][1] * scale[1];
            if (m->paired) {
                if (m->bias) first += load(m->bias + w * LANES), second += load(m->bias + v * LANES);
                store(place + w / 2 * LANES, gated(first, second));
                continue;
            }
            finish(m, w, first, add, place + w * LANES);
            if (v != w) finish(m, v, second, add, place + v * LANES);
        }
    }
}

void multiply_rows(const matrix *m, const batch *b, int first, int last, int add, float *out, int out_stride, float *panel) {
    for (int i = first; i < last; i += m->paired ? 1 : 2) {
        size_t w = m->paired ? 2 * (size_t)i : (size_t)i;
        size_t v = m->paired || i + 1 < last ? w + 1 : w;
        two_blocks(m, b, w, v, add, out, out_stride, panel);
    }
}

/* ---- LLM.int8()'s decomposition ---- */

static inline floats half_precision(floats v) {
    uint16_t bits[LANES];
    store_half(bits, v);
    return load_half(bits);
}

/* Halves are compared with a threshold that is one, as torch does and with it bitsandbytes. */
static inline floats limit_of(float threshold) { return threshold > 0 ? half_precision(all(threshold)) : all(INFINITY); }

float half_limit(float threshold) { return limit_of(threshold)[0]; }

/* Eight values of x from i on, 0 beyond n. */
static inline floats some(const float *x, int i, int n) {
    if (i + LANES <= n) return load(x + i);
    floats v = {0};
    memcpy(&v, x + i, sizeof(float) * (size_t)(n - i));
    return v;
}

static inline float settled(floats peak, ints wrong) {
    for (int i = 0; i < LANES; i++)
        if (wrong[i]) return INFINITY; /* infinite or not a number: so is every product, and at last the logits */
    return highest(peak);
}

/* 127 / absmax as torch, and with it bitsandbytes, computes it. */
static inline floats scale_of(float absmax) { return all(absmax > 0 ? 1.0f / absmax * 127.0f : 0.0f); }

static inline void store_codes(int8_t *codes, floats v) {
    bytes b = __builtin_convertvector(__builtin_convertvector(rounded(v), ints), bytes);
    memcpy(codes, &b, sizeof b);
}

void quantize(const uint16_t *source, int rows, int width, int8_t *codes, float *absmax) {
    for (int row = 0; row < rows; row++, source += width, codes += width) {
        floats peak = {0};
        ints wrong = {0};
        int i = 0, rest = width % LANES;
        uint16_t last[LANES] = {0};
        memcpy(last, source + width - rest, sizeof(uint16_t) * (size_t)rest);
        for (; i < width; i += LANES) {
            floats size = magnitude(load_half(i + LANES <= width ? source + i : last));
            wrong |= size != size;
            peak = larger(size, peak);
        }
        absmax[row] = highest(peak);
        for (int lane = 0; lane < LANES; lane++)
            if (wrong[lane]) absmax[row] = NAN; /* so are its products then */
        const floats scale = scale_of(absmax[row]);
        for (i = 0; i + LANES <= width; i += LANES) store_codes(codes + i, load_half(source + i) * scale);
        int8_t eight[LANES];
        store_codes(eight, load_half(last) * scale);
        memcpy(codes + i, eight, (size_t)rest);
    }
}

void decompose(const float *x, int n, float threshold, split *s) {
    floats peak = {0};
    const floats limit = limit_of(threshold), infinite = all(INFINITY);
    ints wrong = {0}, found = {0};
    for (int i = 0; i < n; i += LANES) {
        floats size = magnitude(half_precision(some(x, i, n)));
        wrong |= ~(size < infinite);
        found |= size >= limit;
        peak = larger(peak, either(size >= limit, (floats){0}, size));
    }
    s->absmax = settled(peak, wrong);
    s->count = 0;
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= found[i];
    const floats scale = scale_of(s->absmax == INFINITY ? 0 : s->absmax);
    for (int i = 0; i < n; i += LANES) {
        floats v = half_precision(some(x, i, n));
        ints outlier = magnitude(v) >= limit;
        if (any)
            for (int j = 0; j < LANES; j++)
                if (outlier[j]) {
                    s->index[s->count] = i + j;
                    s->value[s->count++] = v[j];
                }
        store_codes(s->codes + i, either(outlier, (floats){0}, v * scale));
    }
}

float survey(float *x, int n, float threshold, _Atomic uint8_t *marks) {
    floats peak = {0};
    const floats limit = limit_of(threshold), infinite = all(INFINITY);
    ints wrong = {0};
    for (int i = 0; i < n; i += LANES) {
        floats v = half_precision(some(x, i, n));
        memcpy(x + i, &v, sizeof(float) * (size_t)(n - i < LANES ? n - i : LANES));
        floats size = magnitude(v);
        ints outlier = size >= limit;
        wrong |= ~(size < infinite);
        peak = larger(peak, either(outlier, (floats){0}, size));
        for (int j = 0; j < LANES; j++)
            if (outlier[j]) atomic_store_explicit(marks + i + j, 1, memory_order_relaxed);
    }
    return settled(peak, wrong);
}

void encode(const float *x, int n, int padded, float absmax, float limit, const _Atomic uint8_t *marks, int8_t *codes) {
    const floats scale = scale_of(absmax == INFINITY ? 0 : absmax);
    for (int i = 0; i < n; i += LANES) {
        int8_t eight[LANES];
        store_codes(eight, some(x, i, n) * scale);
        for (int j = 0; j < LANES && i + j < n; j++)
            codes[i + j] = atomic_load_explicit(marks + i + j, memory_order_relaxed) && !below(x[i + j], limit) ? 0 : eight[j];
    }
    for (int i = n; i < padded; i++) codes[i] = 0;
}
