#include "llama.h"

#include <math.h>
#include <stdatomic.h>

#include "simd.h"

enum { STEP_REGIONS = 5, PREFILL_REGIONS = 14, ROWS = 16, KEYS = 64, LINE = 64 };
enum { CHUNK_BYTES = 24 * 1024, PANEL_BLOCKS = 6, CHUNKS_EACH = 2, BEGINNING = 1024 };

static int whole(int n) { return (n + LANES - 1) / LANES * LANES; }
static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

/* ---- workspace ---- */

typedef struct {
    char *at;
    size_t bytes;
} arena;

static void *take(arena *a, size_t bytes) {
    char *found = a->at ? a->at + a->bytes : NULL;
    a->bytes += (bytes + LINE - 1) / LINE * LINE;
    return found;
}

/* What one thread writes and no other reads. */
typedef struct {
    float *x, *scores, *panel;
    split split;
    int prepared; /* the region whose input is in `x` or `split` */
} scratch;

typedef struct {
    float highest, total; /* of a chunk of logits: the largest, and the sum of exponentials of the differences to it */
    int place;
} peak;

enum { MOST_PEAKS = 1024 };

typedef struct {
    const session *s;
    const model *m;
    int rows, position, widest, every;
    float *hidden, *qkv, *attended, *inner, *logits;
    float *x, *absmax, *outliers;
    int8_t *codes;
    _Atomic uint8_t *marks; /* (4, widest): of a layer's four inputs */
    int32_t *index;
    int count;
    const int32_t *tokens;
    double *chosen;
    scratch *threads;
    peak *peaks;
    const layer *layer;
    int number; /* of the layer, in a prefill */
    const int *chunks;
} job;

static int widest_of(const model *m) { return most(most(whole(m->hidden), whole(m->inner)), whole(m->heads * m->width)); }

static size_t largest_panel(const model *m) {
    size_t floats = (size_t)2 * LANES * (size_t)widest_of(m);
    size_t tiles = (size_t)2 * KEYS * (size_t)(whole(m->width) + 4 * LANES);
    return floats > tiles ? floats : tiles;
}

/* Lay out the workspace of a job of `rows` tokens, 0 for a step; without `workspace` it only counts. `splits`: whether activations
   are decomposed. */
static size_t arrange(job *j, const model *m, char *workspace, int threads, int capacity, int rows, int splits) {
    arena a = {workspace, 0};
    size_t n = (size_t)most(rows, 1), widest = (size_t)widest_of(m);
    j->widest = (int)widest;
    j->hidden = take(&a, n * (size_t)whole(m->hidden) * 4);
    j->qkv = take(&a, n * (size_t)whole((m->heads + 2 * m->groups) * m->width) * 4);
    j->attended = take(&a, n * (size_t)whole(m->heads * m->width) * 4);
    j->inner = take(&a, n * (size_t)whole(m->inner) * 4);
    j->peaks = take(&a, sizeof(peak) * MOST_PEAKS);
    j->threads = take(&a, sizeof(scratch) * (size_t)threads);
    if (rows) {
        j->x = take(&a, n * widest * 4);
        j->marks = take(&a, 4 * widest);
    }
    if (rows && splits) {
        j->absmax = take(&a, n * 4);
        j->outliers = take(&a, n * widest * 4);
        j->codes = take(&a, n * widest);
        j->index = take(&a, widest * 4);
    }
    for (int t = 0; t < threads; t++) {
        scratch own = {0};
        own.x = take(&a, widest * 4);
        own.scores = take(&a, (size_t)whole(capacity) * 4);
        own.panel = take(&a, largest_panel(m) * 4);
        own.split.codes = take(&a, widest);
        own.split.index = take(&a, widest * 4);
        own.split.value = take(&a, widest * 4);
        own.prepared = -1;
        if (workspace) j->threads[t] = own;
    }
    return a.bytes;
}

int llmq_version(void) { return LLMQ_VERSION; }
int llmq_regions(const model *m) { return most(STEP_REGIONS * m->layers + 3, PREFILL_REGIONS); }
int64_t llmq_workspace_bytes(const model *m, int threads, int capacity, int rows, int splits) {
    job j = {0};
    return (int64_t)arrange(&j, m, NULL, threads, capacity, rows, splits);
}
int64_t llmq_packed_bytes(const matrix *m) { return (int64_t)(matrix_block_bytes(m) * (size_t)matrix_blocks(m)); }

/* ---- chunks ---- */

static int chunks_of(const matrix *m, int threads) {
    int blocks = matrix_blocks(m);
    size_t bytes = matrix_block_bytes(m) * (size_t)blocks;
    return most(1, least(least(blocks, CHUNKS_EACH * threads), (int)(bytes / CHUNK_BYTES)));
}
static int panel_chunks(const matrix *m) {
    int blocks = m->paired ? PANEL_BLOCKS / 2 : PANEL_BLOCKS;
    return (matrix_blocks(m) + blocks - 1) / blocks;
}
static int row_chunks(int rows) { return (rows + ROWS - 1) / ROWS; }

/* The first of `all` things that belongs to chunk `i` of `chunks`. */
static int edge(int all, int chunks, int i) { return (int)((int64_t)all * i / chunks); }

/* ---- pieces ---- */

static void normalise(const float *x, const float *gain, int n, float eps, float *out) {
    floats squares = {0};
    for (int i = 0; i < n; i += LANES) squares += load(x + i) * load(x + i);
    floats scale = all(1.0f / sqrtf(sum(squares) / (float)n + eps));
    for (int i = 0; i < n; i += LANES) store(out + i, load(x + i) * scale * load(gain + i));
}

static void rotate(float *x, const float *rope, int width) {
    int half = width / 2;
    for (int i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = first * rope[i] - second * rope[half + i];
        x[half + i] = second * rope[i] + first * rope[half + i];
    }
}

static inline floats load_cached(const uint16_t *p, int kind) { return kind == HALF ? load_half(p) : load_brain(p); }

static void cache_store(uint16_t *to, const float *from, int n, int kind) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) kind == HALF ? store_half(to + i, load(from + i)) : store_brain(to + i, load(from + i));
    for (; i < n; i++) {
        uint16_t eight[LANES];
        kind == HALF ? store_half(eight, all(from[i])) : store_brain(eight, all(from[i]));
        to[i] = eight[0];
    }
}

/* A row of the cache as floats, 0 up to a whole eight. */
static void cache_load(float *to, const uint16_t *from, int n, int kind) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load_cached(from + i, kind));
    if (i < n) {
        uint16_t eight[LANES] = {0};
        memcpy(eight, from + i, sizeof(uint16_t) * (size_t)(n - i));
        store(to + i, load_cached(eight, kind));
    }
}

static size_t cache_at(const session *s, int layer, int group, int position) {
    const model *m = s->model;
    return (((size_t)layer * m->groups + group) * s->capacity + position) * m->width;
}

static int takes_split(const job *j, const matrix *m) { return j->s->decompose && m->kind == INT8; }

/* ---- one token ---- */

static void note(const job *j, int place, const split *s) {
    if (!j->s->marks) return;
    for (int i = 0; i < s->count; i++) j->s->marks[(size_t)place * j->s->marks_stride + s->index[i]] = 1;
}

/* Ask for the first weights of a chunk before its input is ready. */
static void begin(const matrix *m, int chunks, int chunk) {
    const char *data = (const char *)m->data + matrix_block_bytes(m) * (size_t)edge(matrix_blocks(m), chunks, chunk);
    for (int i = 0; i < BEGINNING; i += LINE) __builtin_prefetch(data + i);
}

/* The thread's own copy of what `m` is multiplied with: everybody makes it, which is quicker than to wait for it. */
static void prepare(job *j, scratch *own, int region, const matrix *m, const float *x, const float *gain, int place, int chunk) {
    begin(m, j->chunks[region], chunk);
    if (own->prepared == region) return;
    own->prepared = region;
    const float *from = x;
    if (gain) {
        normalise(x, gain, m->width, j->m->eps, own->x);
        from = own->x;
    } else if (!takes_split(j, m)) {
        memcpy(own->x, x, sizeof(float) * (size_t)m->width);
    }
    if (takes_split(j, m)) {
        decompose(from, m->width, j->s->threshold, &own->split);
        if (!chunk) note(j, place, &own->split); /* nobody takes another chunk before this one */
    }
}

static void product(job *j, scratch *own, const matrix *m, int region, int chunk, int add, float *out) {
    int blocks = matrix_blocks(m), chunks = j->chunks[region];
    int first = edge(blocks, chunks, chunk), last = edge(blocks, chunks, chunk + 1);
    int split = takes_split(j, m);
    multiply(m, split ? NULL : own->x, split ? &own->split : NULL, first, last, add, out);
}

/* One head against the cache; the new key and value are its group's, and the first head of the group stores them. */
static void attend(job *j, scratch *own, int layer, int head) {
    const model *m = j->m;
    const session *s = j->s;
    const int width = m->width, shared = m->heads / m->groups, group = head / shared, position = j->position;
    const float *rope = s->rope + (size_t)position * width;
    const int padded = (width + 4 * LANES - 1) / (4 * LANES) * 4 * LANES;
    float *q = own->panel, *k = q + padded, *v = k + padded, *y = v + padded;
    memset(q, 0, sizeof(float) * 4 * (size_t)padded);
    memcpy(q, j->qkv + (size_t)head * width, sizeof(float) * (size_t)width);
    memcpy(k, j->qkv + (size_t)(m->heads + group) * width, sizeof(float) * (size_t)width);
    memcpy(v, j->qkv + (size_t)(m->heads + m->groups + group) * width, sizeof(float) * (size_t)width);
    rotate(q, rope, width);
    rotate(k, rope, width);
    uint16_t *keys = s->keys + cache_at(s, layer, group, 0), *values = s->values + cache_at(s, layer, group, 0);
    uint16_t new_key[width], new_value[width];
    cache_store(new_key, k, width, m->cache_kind);
    cache_store(new_value, v, width, m->cache_kind);
    float scale = 1.0f / sqrtf((float)width), highest_score = -INFINITY, total = 0;
    for (int t = 0; t <= position; t++) {
        const uint16_t *row = t < position ? keys + (size_t)t * width : new_key;
        floats acc = {0}, other = {0};
        int i = 0;
        for (; i + 2 * LANES <= width; i += 2 * LANES) {
            acc += load_cached(row + i, m->cache_kind) * load(q + i);
            other += load_cached(row + i + LANES, m->cache_kind) * load(q + i + LANES);
        }
        for (; i + LANES <= width; i += LANES) acc += load_cached(row + i, m->cache_kind) * load(q + i);
        float score = sum(acc + other);
        if (i < width) {
            float rest[LANES] = {0};
            cache_load(rest, row + i, width - i, m->cache_kind);
            score += sum(load(rest) * load(q + i));
        }
        own->scores[t] = score *= scale;
        highest_score = score > highest_score || score != score ? score : highest_score;
    }
    for (int t = position + 1; t % LANES; t++) own->scores[t] = -INFINITY;
    floats sums = {0};
    for (int t = 0; t <= position; t += LANES) {
        floats e = exponential(load(own->scores + t) - highest_score);
        store(own->scores + t, e);
        sums += e;
    }
    total = sum(sums);
    for (int i = 0; i < width; i += 4 * LANES) {
        floats acc[4] = {{0}};
        const int columns = least(width - i, 4 * LANES);
        for (int t = 0; t <= position; t++) {
            const uint16_t *row = (t < position ? values + (size_t)t * width : new_value) + i;
            if (columns == 4 * LANES) {
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) acc[c] += load_cached(row + c * LANES, m->cache_kind) * own->scores[t];
                continue;
            }
            float some[4 * LANES];
            cache_load(some, row, columns, m->cache_kind);
            for (int c = 0; c * LANES < columns; c++) acc[c] += load(some + c * LANES) * own->scores[t];
        }
        for (int c = 0; c * LANES < columns; c++) store(y + i + c * LANES, acc[c]);
    }
    for (int i = 0; i < width; i++) j->attended[(size_t)head * width + i] = y[i] / total;
    if (head % shared == 0) {
        memcpy(keys + (size_t)position * width, new_key, sizeof(uint16_t) * (size_t)width);
        memcpy(values + (size_t)position * width, new_value, sizeof(uint16_t) * (size_t)width);
    }
}

/* The largest of some logits and what a softmax needs besides. */
static peak peak_of(const float *logits, int first, int last) {
    peak p = {logits[first], 0, first};
    floats best = all(-INFINITY), sums = {0};
    int i = first;
    for (; i + LANES <= last; i += LANES) best = larger(load(logits + i), best);
    float top = highest(best);
    for (; i < last; i++) top = logits[i] > top ? logits[i] : top;
    p.highest = top;
    for (p.place = first; p.place < last - 1 && logits[p.place] != top;) p.place++;
    for (i = first; i + LANES <= last; i += LANES) sums += exponential(load(logits + i) - top);
    p.total = sum(sums);
    for (; i < last; i++) p.total += exponential(all(logits[i] - top))[0];
    return p;
}

static void choose(const peak *peaks, int count, double *chosen) {
    peak best = peaks[0];
    double total = 0;
    for (int i = 1; i < count; i++)
        if (peaks[i].highest > best.highest) best = peaks[i];
    for (int i = 0; i < count; i++) total += peaks[i].total * exp((double)peaks[i].highest - best.highest);
    chosen[0] = best.place;
    chosen[1] = -log(total);
}

/* A chunk of the head's product and its peak. */
static void score(job *j, scratch *own, int region, int chunk, float *logits) {
    const matrix *head = &j->m->head;
    int blocks = matrix_blocks(head), chunks = j->chunks[region];
    product(j, own, head, region, chunk, 0, logits);
    int last = least(edge(blocks, chunks, chunk + 1) * LANES, j->m->vocabulary);
    j->peaks[chunk] = peak_of(logits, edge(blocks, chunks, chunk) * LANES, last);
}

static void step_work(void *context, int region, int reversed, int thread) {
    job *j = context;
    const model *m = j->m;
    scratch *own = j->threads + thread;
    int chunk = j->chunks[region] - 1 - reversed;
    if (region == 0) {
        matrix_row(&m->embedding, j->tokens[0], j->hidden);
        return;
    }
    int layer_number = (region - 1) / STEP_REGIONS;
    if (layer_number == m->layers) {
        if (region == STEP_REGIONS * m->layers + 1) {
            prepare(j, own, region, &m->head, j->hidden, m->norm, 4 * m->layers, chunk);
            score(j, own, region, chunk, j->logits);
        } else
            choose(j->peaks, j->chunks[region - 1], j->chosen);
        return;
    }
    const layer *l = m->layer + layer_number;
    switch ((region - 1) % STEP_REGIONS) {
    case 0:
        prepare(j, own, region, &l->qkv, j->hidden, l->attention_norm, 4 * layer_number, chunk);
        product(j, own, &l->qkv, region, chunk, 0, j->qkv);
        break;
    case 1:
        attend(j, own, layer_number, chunk);
        break;
    case 2:
        prepare(j, own, region, &l->output, j->attended, NULL, 4 * layer_number + 1, chunk);
        product(j, own, &l->output, region, chunk, 1, j->hidden);
        break;
    case 3:
        prepare(j, own, region, &l->gate_up, j->hidden, l->mlp_norm, 4 * layer_number + 2, chunk);
        product(j, own, &l->gate_up, region, chunk, 0, j->inner);
        break;
    default:
        prepare(j, own, region, &l->down, j->inner, NULL, 4 * layer_number + 3, chunk);
        product(j, own, &l->down, region, chunk, 1, j->hidden);
    }
}

void llmq_step(const session *s, int token, int position, float *logits, double *chosen) {
    const model *m = s->model;
    const int threads = pool_threads(s->pool), regions = STEP_REGIONS * m->layers + 3;
    int32_t tokens[1] = {token};
    int chunks[regions];
    job j = {.s = s, .m = m, .rows = 1, .position = position, .tokens = tokens, .logits = logits, .chosen = chosen, .chunks = chunks};
    arrange(&j, m, s->workspace, threads, s->capacity, 0, s->decompose);
    chunks[0] = chunks[regions - 1] = 1;
    chunks[regions - 2] = least(MOST_PEAKS, chunks_of(&m->head, 4 * threads));
    for (int i = 0; i < m->layers; i++) {
        const layer *l = m->layer + i;
        int *at = chunks + 1 + STEP_REGIONS * i;
        at[0] = chunks_of(&l->qkv, threads);
        at[1] = m->heads;
        at[2] = chunks_of(&l->output, threads);
        at[3] = chunks_of(&l->gate_up, threads);
        at[4] = chunks_of(&l->down, threads);
    }
    pool_run(s->pool, regions, chunks, step_work, &j);
}

/* ---- many tokens ---- */

static _Atomic uint8_t *marks_of(const job *j, int input) { return j->marks + (size_t)input * (size_t)j->widest; }

/* Rows of input for `m`, normalised where there is a gain, and for LLM.int8() rounded and surveyed. */
static void gather_rows(job *j, const matrix *m, int input, const float *from, int stride, const float *gain, int chunk) {
    for (int r = chunk * ROWS; r < least(j->rows, (chunk + 1) * ROWS); r++) {
        float *x = j->x + (size_t)r * j->widest;
        const float *source = from + (size_t)r * stride;
        if (gain)
            normalise(source, gain, m->width, j->m->eps, x);
        else
            memcpy(x, source, sizeof(float) * (size_t)m->width);
        if (takes_split(j, m)) j->absmax[r] = survey(x, m->width, j->s->threshold, marks_of(j, input));
    }
}

/* Codes of some rows, and the values of their outlier columns; the first chunk lists those. */
static void encode_rows(job *j, const matrix *m, int input, int chunk, scratch *own) {
    const _Atomic uint8_t *marks = marks_of(j, input);
    const float limit = j->s->decompose == EACH_ROW ? half_limit(j->s->threshold) : 0;
    int count = 0;
    int32_t *index = chunk ? own->split.index : j->index;
    for (int i = 0; i < m->width; i++)
        if (atomic_load_explicit(marks + i, memory_order_relaxed)) index[count++] = i;
    if (!chunk) {
        j->count = count;
        if (j->s->marks)
            for (int i = 0; i < count; i++) j->s->marks[(size_t)(4 * j->number + input) * j->s->marks_stride + index[i]] = 1;
    }
    for (int r = chunk * ROWS; r < least(j->rows, (chunk + 1) * ROWS); r++) {
        const float *x = j->x + (size_t)r * j->widest;
        encode(x, m->width, whole(m->width), j->absmax[r], limit, marks, j->codes + (size_t)r * j->widest);
        for (int i = 0; i < count; i++) j->outliers[(size_t)r * j->widest + i] = below(x[index[i]], limit) ? 0 : x[index[i]];
    }
}

static void product_rows(job *j, scratch *own, const matrix *m, int chunk, int add, float *out, int stride) {
    int split = takes_split(j, m), blocks = matrix_blocks(m);
    int most_blocks = m->paired ? PANEL_BLOCKS / 2 : PANEL_BLOCKS;
    batch b = {j->x, split ? j->codes : NULL, j->absmax, j->outliers, j->index, j->rows, j->widest, j->widest, j->count};
    multiply_rows(m, &b, chunk * most_blocks, least(blocks, (chunk + 1) * most_blocks), add, out, stride, own->panel);
}

static int qkv_stride(const model *m) { return whole((m->heads + 2 * m->groups) * m->width); }

/* Rotate queries and keys of some rows; keys and values go into the cache. */
static void append_rows(job *j, int chunk) {
    const model *m = j->m;
    const session *s = j->s;
    for (int r = chunk * ROWS; r < least(j->rows, (chunk + 1) * ROWS); r++) {
        float *row = j->qkv + (size_t)r * qkv_stride(m);
        const float *rope = s->rope + (size_t)r * m->width;
        for (int h = 0; h < m->heads + m->groups; h++) rotate(row + (size_t)h * m->width, rope, m->width);
        for (int g = 0; g < m->groups; g++) {
            size_t at = cache_at(s, j->number, g, r);
            cache_store(s->keys + at, row + (size_t)(m->heads + g) * m->width, m->width, m->cache_kind);
            cache_store(s->values + at, row + (size_t)(m->heads + m->groups + g) * m->width, m->width, m->cache_kind);
        }
    }
}

/* Causal attention of ROWS rows of the heads of one group, KEYS positions at a time (Dao et al. 2022). */
static void attend_rows(job *j, scratch *own, int chunk) {
    const model *m = j->m;
    const session *s = j->s;
    const int blocks = row_chunks(j->rows), group = chunk / blocks, first = chunk % blocks * ROWS;
    const int last = least(j->rows, first + ROWS), width = m->width, padded = whole(width), shared = m->heads / m->groups;
    const int columns = whole(m->heads * width);
    float *keys = own->panel, *values = keys + (size_t)KEYS * padded, *scores = values + (size_t)KEYS * padded;
    float peaks[ROWS], totals[ROWS];
    const float scale = 1.0f / sqrtf((float)width);
    for (int head = group * shared; head < (group + 1) * shared; head++) {
        for (int r = first; r < last; r++) {
            peaks[r - first] = -INFINITY, totals[r - first] = 0;
            memset(j->attended + (size_t)r * columns + (size_t)head * width, 0, sizeof(float) * (size_t)width);
        }
        for (int start = 0; start < last; start += KEYS) {
            int count = least(KEYS, last - start);
            for (int t = 0; t < KEYS; t++) {
                size_t at = cache_at(s, j->number, group, start + (t < count ? t : 0));
                float *row = scores; /* room for one row while keys are turned */
                cache_load(row, s->keys + at, width, m->cache_kind);
                for (int i = 0; i < width; i++) keys[(size_t)i * KEYS + t] = row[i];
                cache_load(values + (size_t)t * padded, s->values + at, width, m->cache_kind);
            }
            for (int r = first; r < last; r++) {
                if (r < start) continue;
                const float *q = j->qkv + (size_t)r * qkv_stride(m) + (size_t)head * width;
                floats acc[KEYS / LANES] = {{0}};
                for (int i = 0; i < width; i++)
#pragma GCC unroll 8
                    for (int c = 0; c < KEYS / LANES; c++) acc[c] += load(keys + (size_t)i * KEYS + c * LANES) * q[i];
                float top = peaks[r - first];
                for (int c = 0; c < KEYS / LANES; c++) store(scores + c * LANES, acc[c] * scale);
                for (int t = 0; t < KEYS; t++) {
                    if (start + t > r) scores[t] = -INFINITY;
                    top = scores[t] > top || scores[t] != scores[t] ? scores[t] : top;
                }
                float shrink = exponential(all(peaks[r - first] - top))[0];
                floats sums = {0};
                for (int t = 0; t < KEYS; t += LANES) {
                    floats e = exponential(load(scores + t) - top);
                    store(scores + t, e);
                    sums += e;
                }
                totals[r - first] = totals[r - first] * shrink + sum(sums);
                peaks[r - first] = top;
                float *y = j->attended + (size_t)r * columns + (size_t)head * width;
                int used = least(count, r - start + 1), i = 0;
                for (; i + 2 * LANES <= width; i += 2 * LANES) {
                    floats a = load(y + i) * shrink, b = load(y + i + LANES) * shrink;
                    for (int t = 0; t < used; t++) {
                        a += load(values + (size_t)t * padded + i) * scores[t];
                        b += load(values + (size_t)t * padded + i + LANES) * scores[t];
                    }
                    store(y + i, a), store(y + i + LANES, b);
                }
                for (; i < width; i++) {
                    y[i] *= shrink;
                    for (int t = 0; t < used; t++) y[i] += values[(size_t)t * padded + i] * scores[t];
                }
            }
        }
        for (int r = first; r < last; r++)
            for (int i = 0; i < width; i++) j->attended[(size_t)r * columns + (size_t)head * width + i] /= totals[r - first];
    }
}

static void clear_marks(job *j) {
    for (int i = 0; i < 4 * j->widest; i++) atomic_store_explicit(j->marks + i, 0, memory_order_relaxed);
}

static void embed_work(void *context, int region, int chunk, int thread) {
    job *j = context;
    (void)region, (void)thread;
    int stride = whole(j->m->hidden);
    for (int r = chunk * ROWS; r < least(j->rows, (chunk + 1) * ROWS); r++) matrix_row(&j->m->embedding, j->tokens[r], j->hidden + (size_t)r * stride);
}

/* Regions of one layer: for each matrix its input, codes and product; between the first two, rotation and attention. */
static void layer_work(void *context, int region, int reversed, int thread) {
    job *j = context;
    const model *m = j->m;
    const layer *l = j->layer;
    scratch *own = j->threads + thread;
    const int chunk = j->chunks[region] - 1 - reversed;
    const int hidden = whole(m->hidden), attended = whole(m->heads * m->width), inner = whole(m->inner);
    switch (region) {
    case 0: gather_rows(j, &l->qkv, 0, j->hidden, hidden, l->attention_norm, chunk); break;
    case 1: encode_rows(j, &l->qkv, 0, chunk, own); break;
    case 2: product_rows(j, own, &l->qkv, chunk, 0, j->qkv, qkv_stride(m)); break;
    case 3: append_rows(j, chunk); break;
    case 4: attend_rows(j, own, chunk); break;
    case 5: gather_rows(j, &l->output, 1, j->attended, attended, NULL, chunk); break;
    case 6: encode_rows(j, &l->output, 1, chunk, own); break;
    case 7: product_rows(j, own, &l->output, chunk, 1, j->hidden, hidden); break;
    case 8: gather_rows(j, &l->gate_up, 2, j->hidden, hidden, l->mlp_norm, chunk); break;
    case 9: encode_rows(j, &l->gate_up, 2, chunk, own); break;
    case 10: product_rows(j, own, &l->gate_up, chunk, 0, j->inner, inner); break;
    case 11: gather_rows(j, &l->down, 3, j->inner, inner, NULL, chunk); break;
    case 12: encode_rows(j, &l->down, 3, chunk, own); break;
    default: product_rows(j, own, &l->down, chunk, 1, j->hidden, hidden);
    }
}

/* Logits: of the last row as in a step, or of all. */
static void last_work(void *context, int region, int reversed, int thread) {
    job *j = context;
    const model *m = j->m;
    scratch *own = j->threads + thread;
    const int chunk = j->chunks[region] - 1 - reversed;
    if (region) {
        choose(j->peaks, j->chunks[0], j->chosen);
        return;
    }
    prepare(j, own, region, &m->head, j->hidden + (size_t)(j->rows - 1) * whole(m->hidden), m->norm, 4 * m->layers, chunk);
    score(j, own, region, chunk, j->logits);
}

static void every_work(void *context, int region, int reversed, int thread) {
    job *j = context;
    const model *m = j->m;
    const int chunk = j->chunks[region] - 1 - reversed;
    switch (region) {
    case 0: gather_rows(j, &m->head, 0, j->hidden, whole(m->hidden), m->norm, chunk); break;
    case 1: encode_rows(j, &m->head, 0, chunk, j->threads + thread); break;
    default: product_rows(j, j->threads + thread, &m->head, chunk, 0, j->logits, whole(m->vocabulary));
    }
}

static void layer_chunks(const job *j, const layer *l, int *chunks) {
    const matrix *all[] = {&l->qkv, &l->output, &l->gate_up, &l->down};
    const int rows = row_chunks(j->rows);
    for (int i = 0, at = 0; i < 4; i++) {
        chunks[at++] = rows;
        chunks[at++] = takes_split(j, all[i]) ? rows : 0;
        chunks[at++] = panel_chunks(all[i]);
        if (i == 0) {
            chunks[at++] = rows;
            chunks[at++] = rows * j->m->groups;
        }
    }
}

static void forget_prepared(job *j, int threads) {
    for (int t = 0; t < threads; t++) j->threads[t].prepared = -1;
}

int llmq_prefill(const session *s, const int32_t *tokens, int rows, int every, float *logits, double *chosen, int (*stopped)(void)) {
    const model *m = s->model;
    const int threads = pool_threads(s->pool);
    int chunks[PREFILL_REGIONS];
    job j = {.s = s, .m = m, .rows = rows, .every = every, .tokens = tokens, .logits = logits, .chosen = chosen, .chunks = chunks};
    arrange(&j, m, s->workspace, threads, s->capacity, rows, s->decompose);
    chunks[0] = row_chunks(rows);
    pool_run(s->pool, 1, chunks, embed_work, &j);
    for (j.number = 0; j.number < m->layers; j.number++) {
        if (stopped && stopped()) return 1;
        j.layer = m->layer + j.number;
        layer_chunks(&j, j.layer, chunks);
        clear_marks(&j);
        pool_run(s->pool, PREFILL_REGIONS, chunks, layer_work, &j);
    }
    forget_prepared(&j, threads);
    clear_marks(&j);
    if (every) {
        chunks[0] = row_chunks(rows);
        chunks[1] = takes_split(&j, &m->head) ? row_chunks(rows) : 0;
        chunks[2] = panel_chunks(&m->head);
        pool_run(s->pool, 3, chunks, every_work, &j);
    } else {
        chunks[0] = least(MOST_PEAKS, chunks_of(&m->head, 4 * threads));
        chunks[1] = 1;
        pool_run(s->pool, 2, chunks, last_work, &j);
    }
    return 0;
}
