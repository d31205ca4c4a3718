/* Random models of ugly shapes through the library, for the sanitizers: a program without Python around it.

   For each shape, kind and number of threads: reading n tokens and then one is reading n + 1, whoever does the work, and
   one thread and several give the same bits. Prints what it did; ends with 1 at the first difference. */
#include "../llmq/kernels/cpu/llama.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t state = 1;
static float random_float(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (float)(1 << 24) - 0.5f;
}
static int whole(int n) { return (n + 7) / 8 * 8; }
static void *memory(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(p, 0xff, (bytes + 63) / 64 * 64);
    return p;
}

static matrix make(int rows, int width, int kind, int paired, int bias) {
    matrix m = {.rows = rows, .width = width, .kind = kind, .paired = paired};
    int padded = paired ? 2 * whole(rows / 2) : whole(rows);
    char *source = memory((size_t)rows * width * 2), *data = memory((size_t)llmq_packed_bytes(&m));
    float *absmax = memory(sizeof(float) * (size_t)padded), *added = memory(sizeof(float) * (size_t)padded);
    for (size_t i = 0; i < (size_t)rows * width; i++) {
        float x = random_float();
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (kind == INT8) ((int8_t *)source)[i] = (int8_t)(x * 254);
        if (kind == HALF) ((uint16_t *)source)[i] = (uint16_t)((bits >> 16 & 0x8000) | (0x2c00 + (bits >> 13 & 0x3ff)));
        if (kind == BRAIN) ((uint16_t *)source)[i] = (uint16_t)(bits >> 16);
    }
    for (int i = 0; i < padded; i++) absmax[i] = 0.5f, added[i] = random_float();
    pack(source, &m, data);
    free(source);
    m.data = data;
    m.absmax = absmax;
    m.bias = bias ? added : NULL;
    if (!bias) free(added);
    return m;
}
static void drop(matrix m) { free((void *)m.data), free((void *)m.absmax), free((void *)m.bias); }

static float *gains(int n) {
    float *p = memory(sizeof(float) * (size_t)whole(n));
    for (int i = 0; i < whole(n); i++) p[i] = i < n ? 1 + random_float() : 0;
    return p;
}

static int never(void) { return 0; }

/* Read all but the last token, then the last; the logits, and the likeliest. */
static void answer(const model *m, int threads, int tokens, float threshold, float *logits, double *chosen, int at_once) {
    int32_t ids[64];
    for (int i = 0; i < tokens; i++) ids[i] = (i * 7 + 3) % m->vocabulary;
    size_t cache = sizeof(uint16_t) * (size_t)m->layers * m->groups * tokens * m->width;
    float *rope = memory(sizeof(float) * (size_t)tokens * m->width);
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < m->width / 2; i++) rope[t * m->width + i] = cosf(0.1f * t * (i + 1)), rope[t * m->width + m->width / 2 + i] = sinf(0.1f * t * (i + 1));
    pool *p = pool_new(threads, llmq_regions(m));
    int read = at_once ? tokens : tokens - 1;
    session s = {m, p, memory(cache), memory(cache), rope, tokens, threshold >= 0, threshold, 0, NULL, NULL};
    s.marks_stride = whole(m->hidden > m->inner ? m->hidden : m->inner) + whole(m->heads * m->width);
    s.marks = calloc((size_t)(4 * m->layers + 1), (size_t)s.marks_stride);
    if (read) {
        s.workspace = memory((size_t)llmq_workspace_bytes(m, pool_threads(p), tokens, read, threshold >= 0));
        llmq_prefill(&s, ids, read, 0, logits, chosen, never);
        free(s.workspace);
    }
    if (!at_once) {
        s.workspace = memory((size_t)llmq_workspace_bytes(m, pool_threads(p), tokens, 0, threshold >= 0));
        llmq_step(&s, ids[tokens - 1], tokens - 1, logits, chosen);
        free(s.workspace);
    }
    pool_free(p);
    free(s.keys), free(s.values), free(s.marks), free(rope);
}

static int check(const int *shape, int kind, float threshold, int tokens) {
    model m = {.layers = 2, .hidden = shape[0], .inner = shape[1], .heads = shape[2], .groups = shape[3], .width = shape[4],
               .vocabulary = shape[5], .cache_kind = kind == BRAIN ? BRAIN : HALF, .eps = 1e-5f};
    layer layers[2];
    int attended = m.heads * m.width;
    for (int i = 0; i < 2; i++) {
        layers[i].attention_norm = gains(m.hidden), layers[i].mlp_norm = gains(m.hidden);
        layers[i].qkv = make((m.heads + 2 * m.groups) * m.width, m.hidden, kind, 0, 1);
        layers[i].output = make(m.hidden, attended, kind, 0, 0);
        layers[i].gate_up = make(2 * m.inner, m.hidden, kind, 1, 0);
        layers[i].down = make(m.hidden, m.inner, kind, 0, 0);
    }
    m.layer = layers;
    m.embedding = make(m.vocabulary, m.hidden, kind == INT8 ? HALF : kind, 0, 0);
    m.head = kind == INT8 ? make(m.vocabulary, m.hidden, INT8, 0, 0) : m.embedding;
    m.norm = gains(m.hidden);
    int padded = whole(m.vocabulary), wrong = 0;
    float *one = memory(sizeof(float) * (size_t)padded), *two = memory(sizeof(float) * (size_t)padded);
    double first[2], second[2];
    answer(&m, 1, tokens, threshold, one, first, 0);
    answer(&m, 4, tokens, threshold, two, second, 0);
    wrong |= memcmp(one, two, sizeof(float) * (size_t)m.vocabulary) != 0 || first[0] != second[0];
    answer(&m, 3, tokens, threshold, two, second, 1);
    double difference = 0, size = 0;
    for (int i = 0; i < m.vocabulary; i++) difference += pow(one[i] - two[i], 2), size += pow(one[i], 2);
    /* A prompt pools its outlier columns, so with some the two are two different quantizations. */
    double bound = kind == INT8 && threshold > 0 ? 0.2 : 0.02;
    wrong |= !(sqrt(difference / (size + 1e-30)) < bound) || !isfinite(first[1]);
    printf("%s %d x %d, heads %d/%d x %d, %d words, kind %d, threshold %g, %d tokens: %.1e\n", wrong ? "WRONG" : "ok", m.hidden,
           m.inner, m.heads, m.groups, m.width, m.vocabulary, kind, threshold, tokens, sqrt(difference / (size + 1e-30)));
    for (int i = 0; i < 2; i++) {
        free((void *)layers[i].attention_norm), free((void *)layers[i].mlp_norm);
        drop(layers[i].qkv), drop(layers[i].output), drop(layers[i].gate_up), drop(layers[i].down);
    }
    if (kind == INT8) drop(m.head);
    drop(m.embedding), free((void *)m.norm), free(one), free(two);
    return wrong;
}

int main(void) {
    static const int shapes[][6] = {
        {8, 8, 1, 1, 2, 1}, {13, 7, 1, 1, 2, 3}, {1, 1, 1, 1, 2, 2},       {17, 31, 3, 1, 6, 101},
        {64, 64, 4, 2, 16, 259}, {97, 101, 5, 5, 10, 61}, {576, 40, 9, 3, 64, 1009},
    };
    int wrong = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int kind = 0; kind < 3; kind++)
            for (int tokens = 1; tokens < 40; tokens = tokens * 3 + 1)
                for (int t = 0; t < (kind == INT8 ? 3 : 1); t++) wrong |= check(shapes[i], kind, (float[]){-1, 0, 1}[t], tokens);
    return wrong;
}
